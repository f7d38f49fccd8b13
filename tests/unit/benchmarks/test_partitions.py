"""The data that every system reads: the same for everyone, each example with one client."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

from benchmarks.partitions import DEVIATION, MEAN, equal_clients, lay_out, prepare


def write_mnist(folder: Path, *, train: int, test: int) -> NDArray[np.uint8]:
    """Files in the format of MNIST and QMNIST; returns the training pixels."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    kept = {}
    for split, prefix, count in (("train", "train", train), ("test", "t10k", test)):
        pixels = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = np.zeros((count, 8), dtype=">i4")
        labels[:, 0] = np.arange(count) % 10
        labels[:, 2] = 100 + np.arange(count) % 3
        images = struct.pack(">4i", 2051, count, 28, 28) + pixels.tobytes()
        columns = struct.pack(">3i", 3074, count, 8) + labels.tobytes()
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
        (folder / f"qmnist-{split}-labels-idx2-int.gz").write_bytes(gzip.compress(columns))
        kept[split] = pixels
    return kept["train"]


def test_writers_keep_their_own_images(tmp_path: Path) -> None:
    pixels = write_mnist(tmp_path / "mnist", train=10, test=4)
    found = load_file(prepare(tmp_path / "mnist", "writers", tmp_path / "out"))
    assert found["offsets"].tolist() == [0, 4, 7, 10]
    assert found["labels"].tolist() == [0, 3, 6, 9, 1, 4, 7, 2, 5, 8]
    expected = (pixels[3].astype(np.float32) - MEAN) / DEVIATION
    np.testing.assert_allclose(found["images"][1, 0], expected, rtol=1e-6)
    assert found["test_images"].shape == (4, 1, 28, 28)
    assert found["test_labels"].tolist() == [0, 1, 2, 3]


def test_the_same_data_gives_the_same_bytes(tmp_path: Path) -> None:
    write_mnist(tmp_path / "mnist", train=30, test=4)
    first = prepare(tmp_path / "mnist", "writers", tmp_path / "one").read_bytes()
    second = prepare(tmp_path / "mnist", "writers", tmp_path / "two").read_bytes()
    assert first == second


def test_a_prepared_file_is_not_made_again(tmp_path: Path) -> None:
    write_mnist(tmp_path / "mnist", train=30, test=4)
    path = prepare(tmp_path / "mnist", "writers", tmp_path / "out")
    path.write_bytes(b"kept")
    assert prepare(tmp_path / "nowhere", "writers", tmp_path / "out").read_bytes() == b"kept"


@pytest.mark.parametrize("examples", [60, 50])
def test_equal_clients_share_no_example(examples: int) -> None:
    rows = equal_clients(examples)
    assert [len(each) for each in rows] == [examples] * 1000
    assert len(np.unique(np.concatenate(rows))) == 1000 * examples
    again = equal_clients(examples)
    assert all(np.array_equal(one, two) for one, two in zip(rows, again, strict=True))


def test_lay_out_follows_the_clients() -> None:
    pixels = np.arange(4, dtype=np.uint8).reshape(4, 1, 1, 1)
    rows = [np.array([2]), np.array([0, 3])]
    found = lay_out(pixels, np.array([5, 6, 7, 8]), rows)
    assert found["labels"].tolist() == [7, 5, 8]
    assert found["offsets"].tolist() == [0, 1, 3]
