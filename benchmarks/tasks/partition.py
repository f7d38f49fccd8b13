"""Reads a prepared partition: clients' examples one after the other, in one file."""

from functools import cache
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import TensorDataset


@cache
def tensors(folder: Path | None, name: str) -> dict[str, Tensor]:
    """Images, labels and where each client's begin; mapped, so that processes share the pages."""
    if folder is None:
        raise FileNotFoundError("set FEDCORE_DATA to the folder that holds the partitions")
    return load_file(folder / f"{name}.safetensors")


def clients(folder: Path | None, name: str) -> list[str]:
    """One name a client."""
    return [f"client-{number:04d}" for number in range(len(tensors(folder, name)["offsets"]) - 1)]


def client_data(client: str, folder: Path | None, name: str) -> TensorDataset:
    """The examples of one client: a slice, nothing is copied."""
    parts, number = tensors(folder, name), int(client.removeprefix("client-"))
    begin, end = parts["offsets"][number : number + 2].tolist()
    return TensorDataset(parts["images"][begin:end], parts["labels"][begin:end])


def test_data(folder: Path | None, name: str) -> TensorDataset:
    """The 10,000 test images."""
    parts = tensors(folder, name)
    return TensorDataset(parts["test_images"], parts["test_labels"])
