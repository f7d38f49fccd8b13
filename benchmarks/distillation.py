"""What FedDF gains over plain averaging: accuracy of the rounds' model, seed by seed.

``python -m benchmarks.distillation`` trains scikit-learn's digits over 15 clients whose labels are
as skewed as Dirichlet(0.1), six a round for 20 local epochs. The cloud has 400 images, of which
FedDF reads no label. Both strategies have the same rounds, clients and settings; accuracy is that
on 400 other images.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import fedcore
from benchmarks.seeded import Bound, Comparison, Figures, main
from fedcore.seeds import numpy_rng

ROUNDS = 6
STRATEGIES = ("FedAvg", "FedDF")


def skewed_digits(folder: Path | None, seed: int) -> Figures:
    """Accuracy of each strategy on the final test split."""
    bunch = load_digits()
    images = torch.tensor(bunch.data, dtype=torch.float32) / 8 - 1
    targets = torch.tensor(bunch.target)
    order = torch.from_numpy(numpy_rng(seed, "rows").permutation(len(images)))
    test, cloud, rest = torch.split(order, [400, 400, len(order) - 800])
    shares = fedcore.dirichlet(targets[rest], 15, alpha=0.1, seed=seed, min_examples=10)
    parts = {f"c{n}": rest[torch.as_tensor(rows)] for n, rows in enumerate(shares)}

    def rows_of(rows: Tensor) -> TensorDataset:
        return TensorDataset(images[rows], targets[rows])

    task = fedcore.Task(
        name="digits",
        kind="classification",
        model=lambda: nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)),
        clients=lambda _: [*parts],
        client_data=lambda client, _: rows_of(parts[client]),
        cloud_data=lambda _: rows_of(cloud),
        test_data=lambda _: rows_of(test),
        example_input=torch.zeros(64),
    )
    found = {}
    for strategy in STRATEGIES:
        result = fedcore.simulate(
            task,
            federation={"rounds": ROUNDS, "cohort": 6, "strategy": strategy},
            client={"epochs": 20, "batch_size": 10, "learning_rate": 0.05},
            finetune={"epochs": 0},
            compression={"candidates": ["fp32"], "timing_runs": 100},
            simulation={"workers": 1},
            progress=False,
            seed=seed,
        )
        found[strategy] = result.record.scores["accuracy"]["federated"]
    return found


COMPARISONS = (
    Comparison(
        workload="skewed digits",
        metric="accuracy",
        unit="fraction",
        run=skewed_digits,
        bounds=(
            Bound(
                name="FedDF over FedAvg", value=lambda one: one["FedDF"] - one["FedAvg"], least=0.01
            ),
        ),
    ),
)


def bench(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; 1 when a check does not hold."""
    return main(
        "distillation", COMPARISONS, description=__doc__, seeds=range(6), arguments=arguments
    )


if __name__ == "__main__":
    sys.exit(bench())
