"""What layers that stay on clients gain: accuracy on clients' own test data, seed by seed.

``python -m benchmarks.personalisation`` trains scikit-learn's digits over 20 clients whose labels
are as skewed as Dirichlet(0.1), and MNIST over 20 writers who each name the digits in an order of
their own. ``global`` is the model of the rounds, ``local head`` the same rounds with
``client.local``: each client then answers with its own head. ``alone`` trains each client's model
on its own data, for as many epochs. A client's test data are a third of its rows, which nothing in
its run reads before the end; accuracy is over all clients' test rows together.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import fedcore
from benchmarks.seeded import Bound, Comparison, Figures, main
from benchmarks.shifted_tasks import network, writers
from fedcore.config.run import ClientConfig
from fedcore.seeds import global_streams, numpy_rng, torch_rng
from fedcore.training.evaluate import outputs_of
from fedcore.training.local import train

ROUNDS = 12
CLIENT: dict[str, Any] = {"epochs": 2, "batch_size": 10, "learning_rate": 0.05, "momentum": 0.5}
Parts = Mapping[str, tuple[TensorDataset, TensorDataset]]
"""Training and test data by client."""


def halves(parts: Mapping[str, tuple[Tensor, Tensor]], seed: int) -> Parts:
    """Splits each client's rows into two thirds and one third."""
    found = {}
    for name, columns in parts.items():
        count = len(columns[0])
        order = torch.from_numpy(numpy_rng(seed, "split", name).permutation(count))
        first, rest = order[: count * 2 // 3], order[count * 2 // 3 :]
        both = [TensorDataset(*(one[rows] for one in columns)) for rows in (first, rest)]
        found[name] = (both[0], both[1])
    return found


def skewed_digits(folder: Path | None, seed: int) -> Figures:
    """Clients that each have hardly more than two digits."""
    bunch = load_digits()
    images = torch.tensor(bunch.data, dtype=torch.float32) / 8 - 1
    targets = torch.tensor(bunch.target)
    shares = fedcore.dirichlet(targets, 20, alpha=0.1, seed=seed, min_examples=20)
    parts = {f"c{n}": (images[list(rows)], targets[list(rows)]) for n, rows in enumerate(shares)}
    return compared(
        lambda: nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)),
        halves(parts, seed),
        head="2.*",
        seed=seed,
    )


def permuted_writers(folder: Path | None, seed: int) -> Figures:
    """Writers who do not agree on the digits' names."""
    every = [*writers(folder, "train").values()]
    chosen = numpy_rng(seed, "writers").permutation(len(every))[:20]
    parts = {}
    for place in chosen:
        images, digits = every[place]
        names = torch.from_numpy(numpy_rng(seed, "names", int(place)).permutation(10))
        parts[f"w{place}"] = (images, names[digits])
    return compared(network, halves(parts, seed), head="9.*", seed=seed)


def compared(model: Any, parts: Parts, *, head: str, seed: int) -> Figures:
    """Returns the accuracy of each system on all clients' test data."""
    first = next(iter(parts.values()))[0]
    task = fedcore.Task(
        name="personal",
        kind="classification",
        model=model,
        clients=lambda _: [*parts],
        client_data=lambda client, _: parts[client][0],
        client_test=lambda client, _: parts[client][1],
        example_input=torch.zeros_like(first[0][0]),
    )
    found = {}
    for system, local in (("global", []), ("local head", [head])):
        result = fedcore.simulate(
            task,
            federation={"rounds": ROUNDS},
            client={**CLIENT, "local": local},
            compression={"candidates": ["fp32"], "timing_runs": 100},
            simulation={"workers": 1},
            progress=False,
            seed=seed,
        )
        found[system] = result.record.scores["accuracy"]["federated"]
    return {**found, "alone": _alone(model, parts, seed)}


def _alone(model: Any, parts: Parts, seed: int) -> float:
    right = []
    for name, (rows, test) in parts.items():
        with global_streams(seed, "alone"):
            own = model()
            train(
                own,
                rows,  # type: ignore[arg-type]
                nn.functional.cross_entropy,
                ClientConfig(**CLIENT),
                epochs=ROUNDS * CLIENT["epochs"],
                batch_size=CLIENT["batch_size"],
                rng=torch_rng(seed, "alone", name),
            )
        outputs, targets = outputs_of(own, test)  # type: ignore[arg-type]
        right.append((outputs.argmax(1) == targets).numpy())
    return float(np.concatenate(right).mean())


def better(least: float) -> Bound:
    """Bounds by how much local heads beat the global model."""
    return Bound(
        name="local head over global",
        value=lambda one: one["local head"] - one["global"],
        least=least,
    )


COMPARISONS = (
    Comparison(
        workload="skewed digits",
        metric="accuracy",
        unit="fraction",
        run=skewed_digits,
        bounds=(better(0.02),),
    ),
    Comparison(
        workload="writers' names",
        metric="accuracy",
        unit="fraction",
        run=permuted_writers,
        bounds=(better(0.05),),
        needs_data=True,
    ),
)


def bench(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; 1 when a check does not hold."""
    return main(
        "personalisation",
        COMPARISONS,
        description=__doc__,
        seeds=range(6),
        arguments=arguments,
    )


if __name__ == "__main__":
    sys.exit(bench())
