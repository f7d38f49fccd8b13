"""Handwritten digits: 20 clients with unequal, skewed data, and a cloud with a tenth of it."""

from functools import cache

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

from fedcore import Task, dirichlet, iid

CLIENTS = 20


@cache
def digits() -> dict[str, TensorDataset]:
    """The 1,797 images that scikit-learn ships, split into test, cloud and clients."""
    bunch = load_digits()
    images = torch.tensor(bunch.data, dtype=torch.float32)
    targets = torch.tensor(bunch.target)
    tenths = iid(len(images), 10, seed=0)
    test, cloud = torch.tensor([*tenths[0], *tenths[1]]), torch.tensor(tenths[9])
    rest = torch.tensor([row for part in tenths[2:9] for row in part])
    parts = {"test": test, "cloud": cloud}
    shares = dirichlet(targets[rest], CLIENTS, alpha=0.5, seed=0, min_examples=10)
    for number, rows in enumerate(shares):
        parts[f"client-{number:02d}"] = rest[torch.tensor(rows)]
    return {name: TensorDataset(images[rows], targets[rows]) for name, rows in parts.items()}


class Scale(nn.Module):
    """Pixels 0..16 to -1..1; part of the exported model."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / 8 - 1


task = Task(
    name="digits",
    kind="classification",
    model=lambda: nn.Sequential(
        nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)
    ),
    preprocess=Scale,
    clients=lambda folder: [name for name in digits() if name.startswith("client")],
    client_data=lambda client, folder: digits()[client],
    cloud_data=lambda folder: digits()["cloud"],
    test_data=lambda folder: digits()["test"],
    example_input=torch.zeros(64),
    labels=tuple("0123456789"),
)
