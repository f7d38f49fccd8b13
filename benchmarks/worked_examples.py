"""The worked examples beside their baselines: the federation, all data in one place, each alone.

``python -m benchmarks.worked_examples --seeds 1 2 3`` runs each example of ``docs/examples.md``
whose data ``FEDCORE_DATA`` holds. ``pooled`` is the same run with one client that has all data,
``best alone`` and ``worst alone`` the same run with one client that has its own; network, settings,
rounds and passes over the data are equal. All are tested on the same rows. The air example's
``no change`` predicts that nothing changes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch.utils.data import ConcatDataset, DataLoader

import fedcore
from benchmarks.seeded import Bound, Comparison, Figures, main
from fedcore.config.settings import load_run
from fedcore.task.definition import Examples

EXAMPLES = Path(__file__).parents[1] / "examples"
DATA = {
    "hospitals": "heart_disease",
    "air": "beijing_air",
    "text": "shakespeare_plays",
    "spoken_digits": "spoken_digits",
}
"""The folder of each example's data, below what FEDCORE_DATA names."""
SMALLER_IS_BETTER = "rmse"


def compared(name: str, folder: Path | None, seed: int) -> Figures:
    """Returns the primary metric of each system on the example's final test."""
    task = fedcore.load_task(EXAMPLES / name / "task.py")
    assert task.clients is not None
    clients = list(task.clients(folder))
    parts = {client: task.client_data(client, folder) for client in clients}
    if task.test_data is not None:
        test = task.test_data(folder)
    else:
        assert task.client_test is not None
        test = ConcatDataset([task.client_test(client, folder) for client in clients])
    trained = partial(_trained, task, name, test, seed)
    alone = [trained({client: part}) for client, part in parts.items()]
    best, worst = (min, max) if task.primary.name == SMALLER_IS_BETTER else (max, min)
    found = {
        "federated": trained(parts),
        "pooled": trained({"all": ConcatDataset([*parts.values()])}),
        "best alone": best(alone),
        "worst alone": worst(alone),
    }
    if name == "air":
        (changes,) = (targets for _, targets in DataLoader(test, batch_size=len(test)))
        found["no change"] = changes.double().square().mean().sqrt().item()
    return found


def _trained(
    task: fedcore.Task, name: str, test: Examples, seed: int, parts: dict[str, Examples]
) -> float:
    """Returns the test metric of a federation of these clients."""
    result = fedcore.simulate(
        replace(
            task,
            clients=lambda _: [*parts],
            client_data=lambda client, _: parts[client],
            client_test=None,
            test_data=lambda _: test,
        ),
        load_run(EXAMPLES / name / "run.toml"),
        compression={"candidates": ["fp32"], "timing_runs": 100},
        simulation={"workers": 1},
        progress=False,
        seed=seed,
    )
    return result.record.scores[task.primary.name]["federated"]


def over_best_alone(name: str) -> Bound:
    """Bounds the federation by the best of those who train alone."""
    if name == "air":
        return Bound(
            name="federated over best alone",
            value=lambda one: one["federated"] / one["best alone"],
            most=1.0,
        )
    return Bound(
        name="federated over best alone",
        value=lambda one: one["federated"] / one["best alone"],
        least=1.0,
    )


def comparison(name: str) -> Comparison:
    """Returns the comparison of one example."""
    run: Callable[[Path | None, int], Figures] = partial(compared, name)
    metric = {"air": "rmse", "spoken_digits": "accuracy"}.get(name, "auc")
    return Comparison(
        workload=name,
        metric=metric,
        unit="log(1 + ug/m3)" if name == "air" else "fraction",
        run=run,
        bounds=(over_best_alone(name),),
        needs_data=True,
    )


def present(folder: Path) -> list[str]:
    """Returns the examples whose data are there."""
    return [name for name, part in DATA.items() if (folder / part).is_dir()]


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs the examples whose data are there; 1 when a check does not hold."""
    folder = os.environ.get("FEDCORE_DATA", "")
    names = present(Path(folder)) if folder else [*DATA]
    return main(
        "worked_examples",
        [comparison(name) for name in names],
        description=__doc__,
        seeds=(1, 2, 3),
        arguments=arguments,
    )


if __name__ == "__main__":
    sys.exit(run())
