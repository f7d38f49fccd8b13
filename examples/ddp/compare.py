"""MNIST as the cloud's data, and one training in two ways side by side."""

import gzip
import math
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

import fedcore
from fedcore import Task, iid
from fedcore.task.model import build_model

CLIENTS = 5  # of 10,000 images each; the cloud has as many


@cache
def mnist(folder: Path | None, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Images, of shape (N, 28, 28) in bytes, and digits."""
    if folder is None:
        raise FileNotFoundError("set FEDCORE_DATA to the folder that holds mnist_by_writer")
    here, prefix = folder / "mnist_by_writer", {"train": "train", "test": "t10k"}[split]
    pixels = gzip.decompress((here / f"{prefix}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((here / f"qmnist-{split}-labels-idx2-int.gz").read_bytes())
    images = torch.from_numpy(np.frombuffer(pixels, "u1", offset=16).reshape(-1, 28, 28).copy())
    digits = np.frombuffer(labels, ">i4", offset=12).reshape(-1, 8)[: len(images), 0]
    return images, torch.from_numpy(digits.astype(np.int64))


def part(folder: Path | None, number: int) -> TensorDataset:
    images, digits = mnist(folder, "train")
    rows = torch.tensor(iid(len(images), CLIENTS + 1, seed=0)[number])
    return TensorDataset(images[rows], digits[rows])


def made(name: str, model: Callable[[], nn.Module], scale: type[nn.Module]) -> Task:
    return Task(
        name=name,
        kind="classification",
        model=model,
        preprocess=scale,
        clients=lambda folder: [str(number) for number in range(CLIENTS)],
        client_data=lambda client, folder: part(folder, int(client)),
        cloud_data=lambda folder: part(folder, CLIENTS),
        test_data=lambda folder: TensorDataset(*mnist(folder, "test")),
        example_input=torch.zeros(28, 28, dtype=torch.uint8),
        labels=tuple("0123456789"),
    )


def compare(file: str, ways: Mapping[str, Mapping[str, object]], **settings: object) -> None:
    """Trains the task of a file in each way from the same weights, and prints what came of it."""
    task, curves = fedcore.load_task(Path(file)), list[tuple[float, ...]]()
    settings = {"epochs": 5, "remember": 0.0, **settings}
    for way, more in ways.items():
        run = fedcore.RunConfig(name=task.name, task=file, seed=1, finetune={**settings, **more})
        start, begun = build_model(task, run), perf_counter()
        tuned = fedcore.finetune(file, run, start, progress=False)
        curves.append(tuned.curve)
        furthest = max(abs(a - b) for a, b in zip(curves[0], tuned.curve, strict=True))
        print(
            f"{way}: accuracy {tuned.after:.4f} on held-out images, last loss "
            f"{math.fsum(tuned.curve[-20:]) / 20:.4f}, {perf_counter() - begun:.1f} s; a step's "
            f"loss differs by at most {furthest:.1e} from the first line's"
        )
