"""The demo's digits model, trained for a few seconds, and what compression makes of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import ConcatDataset

from fedcore import Task, load_task
from fedcore.config.finetune import Finetune
from fedcore.config.run import CANDIDATES, Compression, RunConfig
from fedcore.seeds import torch_rng
from fedcore.task.definition import Examples
from fedcore.task.model import FullModel, build_model
from fedcore.training.local import train
from server.cloud import CloudData, read_cloud_data
from server.compression.compress import compress
from server.compression.compressed import Compressed

DIGITS = Path(__file__).parents[4] / "examples" / "digits" / "task.py"


def digits_task() -> Task:
    """The demo's task, with a smaller network that can be taught."""
    student = lambda: nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))  # noqa: E731
    return replace(load_task(DIGITS), student=student)


def build(task: Task) -> FullModel:
    """A task's model behind its preprocessing, untrained."""
    return build_model(task, configure())


def configure(**compression: object) -> RunConfig:
    """A run whose compression takes a second or two."""
    settings = {
        "prune_epochs": 2,
        "rounding_epochs": 2,
        "distil_epochs": 20,
        "timing_runs": 100,
        **compression,
    }
    return RunConfig(name="run", task="task.py", compression=Compression.model_validate(settings))


@pytest.fixture(scope="session")
def fresh() -> Callable[[Task], FullModel]:
    return build


@pytest.fixture(scope="session")
def quick_run() -> Callable[..., RunConfig]:
    return configure


@pytest.fixture(scope="session")
def digits() -> Task:
    return digits_task()


@pytest.fixture(scope="session")
def digits_cloud(digits: Task) -> CloudData:
    cloud = read_cloud_data(digits, None, holdout=0.3, seed=0)
    assert cloud is not None
    return cloud


@pytest.fixture(scope="session")
def digits_model(digits: Task) -> FullModel:
    """Trained on the data of all clients, until it is good."""
    module = build(digits)
    pooled: Examples = ConcatDataset(
        [digits.client_data(client, None) for client in digits.clients(None)]
    )
    train(
        module,
        pooled,
        digits.loss_of,
        Finetune(),
        epochs=4,
        batch_size=32,
        rng=torch_rng(0, "train"),
    )
    return module.eval()


@pytest.fixture(scope="session")
def compressed(digits: Task, digits_model: FullModel, digits_cloud: CloudData) -> Compressed:
    return compress(
        # 54 examples tell no less than 5 points
        configure(
            candidates=CANDIDATES, max_slowdown=9.0, max_accuracy_drop=0.05, reduce_range=False
        ),
        digits,
        digits_model,
        digits_cloud,
        progress=lambda line: None,
    )


@pytest.fixture
def calibration(digits_cloud: CloudData) -> torch.Tensor:
    return torch.stack([digits_cloud.train[row][0] for row in range(64)])
