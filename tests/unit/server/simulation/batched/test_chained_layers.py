"""Chains with normalisations, dropout and recurrent layers: clients learn as if alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fedcore import Task
from fedcore.errors import ConfigError
from fedcore.task.definition import Examples, Folder
from tests.unit.server.simulation.batched.test_same_as_alone import PRIVATE, TASK, Bench, data


def normed_chain(drop: float) -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU(), nn.Dropout(drop), nn.Linear(8, 4))
    return nn.Sequential(*layers)


class OneByOne(nn.Module):
    """Reads its four numbers one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.GRU(1, 5, batch_first=True), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0][:, -1])  # type: ignore[no-any-return]


def as_sequence(name: str, folder: Folder) -> Examples:
    inputs, targets = data(name, folder).tensors  # type: ignore[attr-defined]
    return TensorDataset(inputs.unsqueeze(2), targets)  # type: ignore[return-value]


SEQUENCES = replace(TASK, model=OneByOne, client_data=as_sequence, example_input=torch.zeros(4, 1))


@pytest.mark.parametrize("privacy", [None, PRIVATE], ids=["plain", "private"])
@pytest.mark.parametrize(
    "task",
    [replace(TASK, model=lambda: normed_chain(0.0)), SEQUENCES],
    ids=["layer norm", "gru"],
)
def test_chains_of_norms_and_recurrent_layers(task: Task, privacy: dict[str, Any] | None) -> None:
    assert Bench(task, privacy=privacy).gap() < 1e-5


def test_a_chain_drops_what_a_client_alone_drops() -> None:
    task = replace(TASK, model=lambda: normed_chain(0.4))
    assert Bench(task, client={"epochs": 2}).gap() < 1e-5
    private = Bench(task, privacy=PRIVATE, simulation={"training": "vectorised"})
    with pytest.raises(ConfigError, match="one client at a time"):
        private.scheduler().executor_for(private.order, private.asked)


def normed_images(drop: float) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 8, 3), nn.GroupNorm(4, 8), nn.MaxPool2d(2), nn.ReLU(), nn.Dropout(drop)),
        *(nn.Flatten(), nn.Linear(8 * 2 * 2, 8), nn.ReLU(), nn.Dropout(drop), nn.Linear(8, 4)),
    )


def as_images(name: str, folder: Folder) -> Examples:
    inputs, targets = data(name, folder).tensors  # type: ignore[attr-defined]
    rng = torch.Generator().manual_seed(len(name) + int(targets.sum()))
    images = torch.randn(len(inputs), 1, 15, 15, generator=rng)  # of which few have ties
    return TensorDataset(images, targets)  # type: ignore[return-value]


@pytest.mark.parametrize("privacy", [None, PRIVATE], ids=["plain", "private"])
def test_convolutions_with_norms(privacy: dict[str, Any] | None) -> None:
    images = replace(TASK, client_data=as_images, example_input=torch.zeros(1, 15, 15))
    task = replace(images, model=lambda: normed_images(0.0))
    assert Bench(task, privacy=privacy, client={"epochs": 2}).gap() < 1e-5
    if privacy is None:
        task = replace(images, model=lambda: normed_images(0.4))
        assert Bench(task, client={"epochs": 2}).gap() < 1e-5
