"""Logistic regression with a million registered clients, each with its own 60 of MNIST's images."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import overload

import torch
from models import logistic
from partition import tensors, test_data
from torch.utils.data import TensorDataset

from fedcore import Task

CLIENTS, EXAMPLES = 1_000_000, 60


class Names(Sequence[str]):
    """The names of all clients, made when one is asked for."""

    def __len__(self) -> int:
        """A million."""
        return CLIENTS

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        """One name, or some."""
        numbers = range(CLIENTS)[index]
        if isinstance(numbers, range):
            return [f"client-{number:06d}" for number in numbers]
        return f"client-{numbers:06d}"


@cache
def images(folder: Path | None) -> torch.Tensor:
    """W2's images, copied: a mapped file's pages, read one by one, would look like a leak."""
    return tensors(folder, "w2")["images"].clone()


def client_data(client: str, folder: Path | None) -> TensorDataset:
    """Sixty images that the client's number draws."""
    labels = tensors(folder, "w2")["labels"]
    rng = torch.Generator().manual_seed(int(client.removeprefix("client-")))
    rows = torch.randint(len(labels), (EXAMPLES,), generator=rng)
    return TensorDataset(images(folder)[rows], labels[rows])


task = Task(
    name="million",
    kind="classification",
    model=logistic,
    clients=lambda folder: Names(),
    client_data=client_data,
    test_data=lambda folder: test_data(folder, "w2"),
    example_input=torch.zeros(784),
)
