"""What the cloud and the clients gain from each other: loss on unseen data, seed by seed.

``python -m benchmarks.hybrid`` trains the small GPT of ``examples/shakespeare`` over roles, with
five plays in the cloud, and a network over MNIST's writers, with 5 % of them in the cloud.
``federated`` is the model of rounds that no cloud touches, ``cloud alone`` a network trained on the
cloud's data, ``fine-tuned`` the federated model after training on the cloud's data for as many
epochs. ``every`` (of writers) is the model of rounds that went on from fine-tuned models,
fine-tuned at the end like the others.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import TensorDataset

import fedcore
from benchmarks.seeded import Bound, Comparison, Figures, main
from benchmarks.shifted_tasks import joined, network, writers
from fedcore.seeds import numpy_rng
from fedcore.task.metrics import Metric

EXAMPLE = Path(__file__).parents[1] / "examples" / "shakespeare"
FAST: dict[str, Any] = {
    "compression": {"candidates": ["fp32"], "timing_runs": 100},
    "simulation": {"workers": 1},
    "progress": False,
}


def shakespeare(folder: Path | None, seed: int) -> Figures:
    """Loss per character on plays that nothing has read."""
    run = fedcore.load_run(EXAMPLE / "small.toml").model_copy(update={"seed": seed})
    result = fedcore.simulate(
        None,
        run,
        federation={"rounds": 10, "cohort": 8},
        finetune={"epochs": 3, "every": None},
        **FAST,
    )
    scores = result.record.scores["perplexity"]
    return _figures({system: math.log(one) for system, one in scores.items()})


def few_writers(folder: Path | None, seed: int) -> Figures:
    """Loss on the writers of the test set."""
    whole = [*writers(folder, "train").values()]
    drawn = [whole[place] for place in numpy_rng(seed, "writers").permutation(len(whole))]
    lent, clients = drawn[: len(drawn) // 20], drawn[len(drawn) // 20 :]
    test = TensorDataset(*joined([*writers(folder, "test").values()]))
    task = fedcore.Task(
        name="writers",
        kind="classification",
        model=network,
        clients=lambda _: [f"writer-{number}" for number in range(len(clients))],
        client_data=lambda client, _: TensorDataset(*clients[int(client.split("-")[1])]),
        cloud_data=lambda _: TensorDataset(*joined(lent)),
        test_data=lambda _: test,
        example_input=torch.zeros(1, 14, 14),
        metrics=(fedcore.ACCURACY, LOSS),
    )
    found = []
    for every in (None, 5):
        result = fedcore.simulate(
            task,
            federation={"rounds": 15, "cohort": 15},
            client={"epochs": 3, "batch_size": 10, "learning_rate": 0.05, "momentum": 0.5},
            finetune={"epochs": 5, "learning_rate": 0.01, "every": every},
            seed=seed,
            **FAST,
        )
        found.append(result.record.scores["loss"])
    return {**_figures(found[0]), "every": found[1]["finetuned"]}


def _loss(outputs: torch.Tensor, targets: torch.Tensor) -> float:
    return torch.nn.functional.cross_entropy(outputs, targets).item()


LOSS = Metric("loss", _loss, higher_is_better=False)


def _figures(scores: Mapping[str, float]) -> dict[str, float]:
    return {
        "federated": scores["federated"],
        "cloud alone": scores["cloud_alone"],
        "fine-tuned": scores["finetuned"],
    }


BOUNDS = tuple(
    Bound(
        name=f"fine-tuned over {other}",
        value=lambda one, other=other: one["fine-tuned"] / one[other],  # type: ignore[misc]
        most=1.0,
    )
    for other in ("federated", "cloud alone")
)
COMPARISONS = tuple(
    Comparison(
        workload=workload, metric="loss", unit="nats", run=run, bounds=BOUNDS, needs_data=True
    )
    for workload, run in (("shakespeare", shakespeare), ("writers", few_writers))
)


def bench(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; 1 when a check does not hold."""
    return main("hybrid", COMPARISONS, description=__doc__, seeds=range(3), arguments=arguments)


if __name__ == "__main__":
    sys.exit(bench())
