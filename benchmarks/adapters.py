"""What adapters cost and save: bytes sent, and the share of the loss improvement that they keep.

``python -m benchmarks.adapters`` trains a dense network of 1.3 million parameters on 60 writers of
MNIST, and goes on with it over 40 other writers, whose scanner places each digit two pixels to the
right. ``whole`` trains all weights in the rounds, ``adapters`` those of `fedcore.with_adapters` at
rank 4, with the same rounds and clients. The loss is that on writers whom nothing has read.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import fedcore
from benchmarks.hybrid import FAST, LOSS
from benchmarks.seeded import Bound, Comparison, Figures, main
from benchmarks.shifted_tasks import Rows, joined, writers
from fedcore.config.run import ClientConfig
from fedcore.seeds import global_streams, numpy_rng, torch_rng
from fedcore.training.evaluate import evaluate
from fedcore.training.local import train

RATES = {"whole": 0.02, "adapters": 0.02}


def dense() -> nn.Sequential:
    """A network for images ``(B, 1, 14, 14)``."""
    return nn.Sequential(
        *(nn.Flatten(), nn.Linear(196, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU()),
        nn.Linear(1024, 10),
    )


def elsewhere(rows: Rows) -> TensorDataset:
    """Rows of the other scanner."""
    return TensorDataset(rows[0].roll(2, dims=-1), rows[1])


def moved_digits(folder: Path | None, seed: int) -> Figures:
    """Losses before the rounds and after, and bytes of an update."""
    every = [*writers(folder, "train").values()]
    drawn = [every[place] for place in numpy_rng(seed, "writers").permutation(len(every))]
    clients, test = drawn[60:100], elsewhere(joined([*writers(folder, "test").values()][:60]))
    trained = _pretrained(joined(drawn[:60]), seed)

    def whole() -> nn.Module:
        network = dense()
        network.load_state_dict(trained)
        return network

    found = {"before": evaluate(whole(), test, [LOSS])["loss"]}  # type: ignore[arg-type]
    models: dict[str, Callable[[], nn.Module]] = {
        "whole": whole,
        "adapters": lambda: fedcore.with_adapters(whole(), rank=4),
    }
    for system, model in models.items():
        task = fedcore.Task(
            name="moved",
            kind="classification",
            model=model,
            clients=lambda _: [f"writer-{number}" for number in range(len(clients))],
            client_data=lambda client, _: elsewhere(clients[int(client.split("-")[1])]),
            test_data=lambda _: test,
            example_input=torch.zeros(1, 14, 14),
            metrics=(fedcore.ACCURACY, LOSS),
        )
        result = fedcore.simulate(
            task,
            federation={"rounds": 8, "cohort": 10},
            client={
                "epochs": 3,
                "batch_size": 10,
                "momentum": 0.5,
                "learning_rate": RATES[system],
            },
            seed=seed,
            **FAST,
        )
        record = result.record
        found[system] = record.scores["loss"]["federated"]
        found[f"{system}, bytes"] = record.rounds[0].bytes_up / record.rounds[0].updates
    return found


def _pretrained(rows: Rows, seed: int) -> dict[str, Tensor]:
    with global_streams(seed, "pretrained"):
        network = dense()
        train(
            network,
            TensorDataset(*rows),  # type: ignore[arg-type]
            nn.functional.cross_entropy,
            ClientConfig(learning_rate=0.05, momentum=0.5),
            epochs=6,
            batch_size=32,
            rng=torch_rng(seed, "pretrained"),
        )
    return network.state_dict()


COMPARISONS = (
    Comparison(
        workload="moved digits",
        metric="loss, or bytes of an update",
        unit="nats, bytes",
        run=moved_digits,
        bounds=(
            Bound(
                name="share of the bytes",
                value=lambda one: one["adapters, bytes"] / one["whole, bytes"],
                most=0.02,
            ),
            Bound(
                name="share of the improvement",
                value=lambda one: (
                    (one["before"] - one["adapters"]) / (one["before"] - one["whole"])
                ),
                least=0.95,
            ),
        ),
        needs_data=True,
    ),
)


def bench(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; 1 when a check does not hold."""
    return main("adapters", COMPARISONS, description=__doc__, seeds=range(3), arguments=arguments)


if __name__ == "__main__":
    sys.exit(bench())
