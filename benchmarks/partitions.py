"""Prepares the data of the workloads: one file a partition, which every system reads."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from fedcore.files import read_bytes, write_atomic
from fedcore.task.partition import by_column, iid

MEAN, DEVIATION = 33.318, 78.567  # of MNIST's training pixels, 0..255
_CLIENTS = 1000
_MAX_BYTES = 32 << 20  # 32 MiB; the largest of the files has 10
_EXAMPLES = {"w2": 60, "w1": 50}
_SPLITS = {"train": "train", "test": "t10k"}
Rows = Sequence[NDArray[np.int64]]


def prepare(mnist: Path, name: str, out: Path) -> Path:
    """Writes the partition ``name`` below ``out``, unless it is there, and returns its path.

    The file holds ``images`` (float32, normalised; flat for ``w2``, else ``(N, 1, 28, 28)``),
    ``labels`` (int64), clients' examples one after the other, ``offsets`` (client ``i`` has rows
    ``offsets[i]`` to ``offsets[i + 1]``), ``test_images`` and ``test_labels``. All from one fixed
    seed, so that every run of the benchmark, and every system, has the same clients.

    Args:
        mnist: The folder of MNIST's and QMNIST's files.
        name: ``w2``, ``w1`` or ``writers``.
        out: The folder to write to.

    Raises:
        DataError: a file of MNIST is missing or cannot be read.
    """
    path = out / f"{name}.safetensors"
    if not path.exists():
        pixels, labels = read_mnist(mnist, "train")
        rows: Rows
        if name == "writers":
            rows = list(by_column(labels[:, 2]).values())
        else:
            rows = equal_clients(_EXAMPLES[name])
        arrays = lay_out(pixels, labels[:, 0], rows)
        tested, answers = read_mnist(mnist, "test")
        arrays |= {"test_images": _normalised(tested), "test_labels": answers[:, 0].astype("i8")}
        if name == "w2":
            for key in ("images", "test_images"):
                arrays[key] = arrays[key].reshape(len(arrays[key]), -1)
        write_atomic(path, save(arrays))
    return path


def equal_clients(examples: int) -> Rows:
    """A thousand clients of so many examples: the first images, dealt at random."""
    return iid(_CLIENTS * examples, _CLIENTS, seed=0)


def lay_out(
    pixels: NDArray[np.uint8], digits: NDArray[np.integer], rows: Rows
) -> dict[str, NDArray[np.generic]]:
    """Clients' images and labels one after the other, and where each client's begin."""
    order = np.concatenate(rows)
    offsets = np.cumsum([0, *map(len, rows)]).astype(np.int64)
    images = _normalised(pixels[order])
    return {"images": images, "labels": digits[order].astype(np.int64), "offsets": offsets}


def _normalised(pixels: NDArray[np.uint8]) -> NDArray[np.generic]:
    return ((pixels.astype(np.float32) - MEAN) / DEVIATION).astype(np.float32)


def read_mnist(mnist: Path, split: str) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """Pixels ``(N, 1, 28, 28)``, and QMNIST's labels: column 0 the digit, column 2 the writer."""
    files = (f"{_SPLITS[split]}-images-idx3-ubyte.gz", f"qmnist-{split}-labels-idx2-int.gz")
    images, labels = (
        gzip.decompress(read_bytes(mnist / name, max_bytes=_MAX_BYTES, what="a file of MNIST"))
        for name in files
    )
    pixels = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 1, 28, 28)
    columns = np.frombuffer(labels, ">i4", offset=12).reshape(-1, 8)
    return pixels, columns[: len(pixels)].astype(np.int32)
