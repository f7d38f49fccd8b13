"""MNIST by writer: 539 people, each a client, tested on people never seen in training."""

import gzip
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import TensorDataset

from fedcore import Task, by_column

CLOUD_WRITERS = 27  # one writer in twenty lends its images to the cloud, and is no client then
HELDOUT_WRITERS = 9  # of those: they judge, so that the gate too asks about people never seen


def read(path: Path, dtype: str, header: int, shape: tuple[int, ...]) -> NDArray[np.generic]:
    """An IDX file: a header, then big-endian values."""
    return np.frombuffer(gzip.decompress(path.read_bytes()), dtype, offset=header).reshape(shape)


@cache
def load(folder: Path | None, split: str) -> dict[str, TensorDataset]:
    """Images and digits of each writer; QMNIST's labels say who wrote what."""
    if folder is None:
        raise FileNotFoundError("set FEDCORE_DATA to the folder that holds mnist_by_writer")
    here, prefix = folder / "mnist_by_writer", {"train": "train", "test": "t10k"}[split]
    pixels = read(here / f"{prefix}-images-idx3-ubyte.gz", "u1", 16, (-1, 1, 28, 28))
    labels = read(here / f"qmnist-{split}-labels-idx2-int.gz", ">i4", 12, (-1, 8))[: len(pixels)]
    images = torch.from_numpy(pixels.copy())
    digits = torch.from_numpy(labels[:, 0].astype(np.int64))
    return {
        writer: TensorDataset(images[rows], digits[rows])
        for writer, rows in by_column(labels[:, 2]).items()
    }


def joined(parts: list[TensorDataset]) -> TensorDataset:
    columns = zip(*(part.tensors for part in parts), strict=True)
    return TensorDataset(*map(torch.cat, columns))


def writers(folder: Path | None) -> list[str]:
    return list(load(folder, "train"))


def cloud(folder: Path | None, which: slice) -> TensorDataset:
    return joined([*load(folder, "train").values()][which])


class Scale(nn.Module):
    """Bytes to roughly zero mean and unit deviation; part of the exported model."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.float() - 33.3) / 78.6


def model() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * 49, 64), nn.ReLU(), nn.Linear(64, 10)),
    )


task = Task(
    name="mnist_by_writer",
    kind="classification",
    model=model,
    preprocess=Scale,
    clients=lambda folder: writers(folder)[CLOUD_WRITERS:],
    client_data=lambda client, folder: load(folder, "train")[client],
    cloud_data=lambda folder: cloud(folder, slice(HELDOUT_WRITERS, CLOUD_WRITERS)),
    cloud_heldout=lambda folder: cloud(folder, slice(HELDOUT_WRITERS)),
    test_data=lambda folder: joined([*load(folder, "test").values()]),
    example_input=torch.zeros(1, 28, 28, dtype=torch.uint8),
    labels=tuple("0123456789"),
)
