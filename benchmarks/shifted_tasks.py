"""Tasks in which the cloud does not look like the devices, and some in which its data help."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from benchmarks.partitions import read_mnist
from fedcore import ACCURACY, RMSE, Metric, Task, by_column, dirichlet, load_task
from fedcore.seeds import numpy_rng, torch_rng

CLIENTS = 40
ENGINES = Path(__file__).resolve().parents[1] / "examples" / "turbofan"
SETTINGS: dict[str, dict[str, Any]] = {
    "federation": {"rounds": 12, "holdout": 0.25},
    "client": {"epochs": 3, "batch_size": 10, "learning_rate": 0.05, "momentum": 0.5},
    "finetune": {"epochs": 5, "learning_rate": 0.01},
    "compression": {"prune_epochs": 5, "timing_runs": 100},
    "simulation": {"workers": 1, "training": "vectorised"},
}
Rows = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Workload:
    """One task of the benchmark, made anew for each seed."""

    name: str
    helps: bool
    """Whether the cloud's data look like the devices', so that they should help."""
    make: Callable[[Path | None, int], Drawn]
    """Returns the task from the data folder and the seed."""
    metric: Metric = ACCURACY
    """By which models are compared; the task's primary one."""
    run: Path | None = None
    """A run file whose settings hold where ``settings`` say nothing."""
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: SETTINGS)


@dataclass(frozen=True)
class Drawn:
    """A task, and clients that nothing in its run has read."""

    task: Task
    unseen: TensorDataset


@cache
def writers(folder: Path | None, split: str) -> dict[int, Rows]:
    """Images ``(N, 1, 14, 14)`` of about unit deviation, and digits, of each writer."""
    if folder is None:
        raise FileNotFoundError("set FEDCORE_DATA to the folder that holds mnist_by_writer")
    pixels, labels = read_mnist(folder / "mnist_by_writer", split)
    images = torch.from_numpy(pixels.copy()).float().unsqueeze(1) / 255
    images = nn.functional.avg_pool2d(images.reshape(-1, 1, 28, 28), 2) * 4 - 0.5
    digits = torch.from_numpy(labels[:, 0].astype(np.int64))
    return {int(who): (images[rows], digits[rows]) for who, rows in by_column(labels[:, 2]).items()}


def joined(parts: list[Rows]) -> Rows:
    images, digits = zip(*parts, strict=True)
    return torch.cat(images), torch.cat(digits)


def network() -> nn.Module:
    """A small convolutional network for images ``(B, 1, 14, 14)``."""
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(16 * 9, 32), nn.ReLU(), nn.Linear(32, 10)),
    )


def mnist(name: str, cloud: Callable[[list[Rows], int], Rows]) -> Callable[..., Drawn]:
    """A task over writers of MNIST, whose cloud is made of writers who are no clients."""

    def make(folder: Path | None, seed: int) -> Drawn:
        every = [*writers(folder, "train").values()]
        order = numpy_rng(seed, "writers").permutation(len(every))
        drawn = [every[place] for place in order]
        clients, rest = drawn[:CLIENTS], drawn[CLIENTS:]
        tests = [*writers(folder, "test").values()]
        half = len(tests) // 2
        lent = cloud(rest, seed)
        task = Task(
            name=name,
            kind="classification",
            model=network,
            clients=lambda _: [f"writer-{number}" for number in range(CLIENTS)],
            client_data=lambda client, _: TensorDataset(*clients[int(client.split("-")[1])]),
            cloud_data=lambda _: TensorDataset(*lent),
            test_data=lambda _: TensorDataset(*joined(tests[:half])),
            example_input=torch.zeros(1, 14, 14),
        )
        return Drawn(task, TensorDataset(*joined(tests[half:])))

    return make


def other_inputs(rest: list[Rows], seed: int) -> Rows:
    """Three writers through another scanner: white on black became black on white, and askew."""
    images, digits = joined(rest[:3])
    return 3 - images.roll(2, dims=-1), digits


def other_labels(rest: list[Rows], seed: int) -> Rows:
    """Twenty writers, of whom hardly anything but the digits 0 to 3 is kept."""
    images, digits = joined(rest[:20])
    rare = torch.rand(len(digits), generator=torch_rng(seed, "rare digits")) < 0.02
    kept = (digits < 4) | rare
    return images[kept], digits[kept]


def one_writer(rest: list[Rows], seed: int) -> Rows:
    """A single writer."""
    return rest[0]


def many_writers(rest: list[Rows], seed: int) -> Rows:
    """Thirty writers, as different from each other as the clients are."""
    return joined(rest[:30])


def digits(folder: Path | None, seed: int) -> Drawn:
    """scikit-learn's digits over skewed clients, and a cloud with a third of them."""
    bunch = load_digits()
    images = torch.tensor(bunch.data, dtype=torch.float32).reshape(-1, 64) / 8 - 1
    targets = torch.tensor(bunch.target)
    order = torch.from_numpy(numpy_rng(seed, "rows").permutation(len(images)))
    unseen, test, cloud, rest = torch.split(order, [400, 200, 500, len(order) - 1100])
    shares = dirichlet(targets[rest], 15, alpha=0.5, seed=seed, min_examples=10)
    parts = {f"client-{n}": rest[torch.as_tensor(rows)] for n, rows in enumerate(shares)}

    def rows_of(rows: Tensor) -> TensorDataset:
        return TensorDataset(images[rows], targets[rows])

    task = Task(
        name="digits",
        kind="classification",
        model=lambda: nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)),
        clients=lambda _: [*parts],
        client_data=lambda client, _: rows_of(parts[client]),
        cloud_data=lambda _: rows_of(cloud),
        test_data=lambda _: rows_of(test),
        example_input=torch.zeros(64),
    )
    return Drawn(task, rows_of(unseen))


def engines(folder: Path | None, seed: int) -> Drawn:
    """``examples/turbofan`` where the operator has worn out thirty engines of its own.

    The cloud judges, on five engines that train nothing. Windows of one engine overlap, so what
    clients held back would look like what they trained on.
    """
    example = load_task(ENGINES / "task.py")
    order = [str(1 + place) for place in numpy_rng(seed, "engines").permutation(100)]
    unseen, heldout, cloud, clients = order[:20], order[20:25], order[25:55], order[55:]

    def rows_of(units: list[str]) -> TensorDataset:
        return TensorDataset(*joined([example.client_data(unit, folder).tensors for unit in units]))

    task = replace(
        example,
        clients=lambda _: clients,
        client_data=lambda client, _: example.client_data(client, folder),
        cloud_data=lambda _: rows_of(cloud),
        cloud_heldout=lambda _: rows_of(heldout),
    )
    return Drawn(task, rows_of(unseen))


WORKLOADS = (
    Workload("inputs", False, mnist("inputs", other_inputs)),
    Workload("labels", False, mnist("labels", other_labels)),
    Workload("writer", False, mnist("writer", one_writer)),
    Workload("writers", True, mnist("writers", many_writers)),
    Workload("digits", True, digits),
    Workload(
        *("engines", True, engines),
        metric=RMSE,
        run=ENGINES / "run.toml",
        settings={"federation": {"cohort": 11}, "simulation": {"workers": 1}},
    ),
)
