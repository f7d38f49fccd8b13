"""Client-level privacy on MNIST by writer: accuracy at an epsilon, fedcore beside Flower.

512 writers are clients, a linear model is trained, and it is tested on people never seen. Every
system has the same clients, local training, expected cohort, rounds and bound; noise and epsilon
are counted by one accountant. Two assumptions are told apart, because they are worth a lot:

``secret``
    Who takes part is drawn at random and nobody learns it. fedcore draws each client on its own,
    as the accountant assumes. Flower asks a cohort of fixed size; it gets the same noise, as if it
    did too.
``known``
    Nothing is assumed of who takes part. fedcore correlates noise over rounds and lets clients
    rest between; in Flower a client may take part in every round, and its noise is for that.

``make bench NAME=client_dp`` runs it; ``runs/bench/client_dp.json`` has the figures.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.figures import Check, row
from benchmarks.measure import processor
from benchmarks.plot import plot_curves
from fedcore.config.owner import OPEN_POLICY
from fedcore.config.run import RunConfig
from fedcore.errors import DataError
from fedcore.files import write_json
from fedcore.flower.quiet import quiet
from fedcore.privacy.accounting import Charge, epsilon_of, noise_for
from fedcore.seeds import Simulated
from fedcore.task.definition import Task, data_folder, load_task
from fedcore.training.evaluate import evaluate
from server.rounds.app import Listener, Outcome, server_app
from server.simulation.federate import federate
from server.simulation.virtual.state import SimulationState

EPSILONS = (2.0, 4.0, 8.0)
DELTA, ROUNDS, COHORT, CLIP_NORM, LEARNING_RATE = 1e-4, 30, 128, 0.5, 0.05
FLOWER = "DifferentialPrivacyServerSideFixedClipping"
_SLACK = 0.01  # of accuracy: fedcore may not fall behind Flower by more
_EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "mnist_by_writer" / "task.py"


@dataclass(frozen=True)
class System:
    """One way of training under client-level privacy."""

    name: str
    assumes: str
    settings: Mapping[str, Any]
    """Of ``[privacy.client]``; none for Flower."""


SYSTEMS = (
    System("fedcore", "secret", {}),
    System("fedcore adaptive", "secret", {"clip_norm": "adaptive"}),
    System("flower", "secret", {}),
    System("fedcore matrix", "known", {"mechanism": "matrix"}),
    System("flower", "known", {}),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; 1 when a check does not hold."""
    options = _parser().parse_args(arguments)
    folder = data_folder()
    if folder is None:
        print(
            "FEDCORE_DATA is not set, and the benchmark needs MNIST by writer: set it to the "
            "folder that holds mnist_by_writer. Nothing was run.",
            file=sys.stderr,
        )
        return DataError.exit_code
    quiet()
    task = replace(load_task(_EXAMPLE), model=linear)
    began, runs = time.monotonic(), list[dict[str, Any]]()
    for seed in range(options.seeds):
        runs.append(_measured(task, None, None, seed))
        for epsilon in options.epsilons:
            for system in SYSTEMS:
                runs.append(_measured(task, system, epsilon, seed))
    checks = checks_of(runs)
    result = {
        "machine": {
            "processor": processor(),
            "versions": {name: metadata.version(name) for name in ("fedcore", "torch", "flwr")},
        },
        "settings": {
            "clients": len(task.clients(folder)),
            "cohort": COHORT,
            "rounds": ROUNDS,
            "clip_norm": CLIP_NORM,
            "target_delta": DELTA,
            "learning_rate": LEARNING_RATE,
        },
        "seconds": time.monotonic() - began,
        "rows": rows_of(runs),
        "checks": [asdict(check) for check in checks],
        "runs": runs,
    }
    write_json(options.out / "client_dp.json", result)
    plot_curves(curves_of(runs), options.out / "client_dp.png", "epsilon of a client", "accuracy")
    for check in checks:
        print(f"{'holds' if check.holds else 'BROKEN'} {check.name}: {check.value:.4g}")
    return 1 if any(not check.holds for check in checks) else 0


def linear() -> nn.Module:
    """784 inputs, 10 classes; zero at the start, so that no noise is spent on undoing it."""
    layer = nn.Linear(784, 10)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return nn.Sequential(nn.Flatten(), layer)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks.client_dp", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epsilons", type=float, nargs="+", default=list(EPSILONS))
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    return parser


def _measured(
    task: Task, system: System | None, epsilon: float | None, seed: int
) -> dict[str, Any]:
    """One run; ``system`` is None for training without privacy."""
    run, noise, spent = _run_of(task, system, epsilon, seed)
    started = time.monotonic()
    outcome = train(task, run)
    accuracy = evaluate(outcome.model, task.test_data(data_folder()), task.metrics)["accuracy"]
    if outcome.federated.protection is not None:
        noise = outcome.federated.protection.plan.noise_multiplier
        spent = outcome.federated.rounds[-1].client_epsilon
    found = {
        "system": system.name if system else "no privacy",
        "assumes": system.assumes if system else "none",
        "target_epsilon": epsilon,
        "epsilon": spent,
        "noise_multiplier": noise,
        "seed": seed,
        "accuracy": accuracy,
        "seconds": time.monotonic() - started,
    }
    print(found, flush=True)
    return found


def _run_of(
    task: Task, system: System | None, epsilon: float | None, seed: int
) -> tuple[RunConfig, float | None, float | None]:
    """The run, and for Flower the noise and the epsilon that it comes to."""
    federation: dict[str, Any] = {"rounds": ROUNDS, "cohort": COHORT, "weighting": "uniform"}
    privacy: dict[str, Any] = {}
    noise = spent = None
    if system is not None and epsilon is not None:
        if system.name == "flower":
            noise, spent = _flower(task, system.assumes, epsilon)
            options = {"noise_multiplier": noise, "clipping_norm": CLIP_NORM}
            federation |= {"strategy": FLOWER, "strategy_options": options}
        else:
            client = {"max_epsilon": epsilon, "target_delta": DELTA, "clip_norm": CLIP_NORM}
            privacy = {"unit": "client", "client": client | dict(system.settings)}
    run = RunConfig.model_validate(
        {
            "name": "client-dp",
            "task": str(_EXAMPLE),
            "seed": seed,
            "federation": federation,
            "client": {"epochs": 1, "batch_size": 10, "learning_rate": LEARNING_RATE},
            "privacy": privacy,
            "simulation": {"workers": 1, "training": "vectorised"},
        }
    )
    return run, noise, spent


def _flower(task: Task, assumes: str, epsilon: float) -> tuple[float, float]:
    """The noise that Flower's strategy is given, and the epsilon that it comes to."""
    rate = COHORT / len(task.clients(data_folder())) if assumes == "secret" else 1.0
    noise = noise_for(
        max_epsilon=epsilon,
        target_delta=DELTA,
        sample_rate=rate,
        steps=ROUNDS,
        accountant="prv",
    )
    charge = Charge(ROUNDS, noise, rate, ROUNDS)
    return noise, epsilon_of([charge], target_delta=DELTA, accountant="prv")


def train(task: Task, run: RunConfig) -> Outcome:
    """The rounds of a run over its virtual clients; the model is that of the last."""
    outcomes: list[Outcome] = []
    server = server_app(
        task,
        run,
        cloud=None,
        randomness=Simulated(run.seed),
        listener=Listener(lambda note: None, lambda record: None, outcomes.append),
    )
    federate(
        server,
        task,
        run,
        OPEN_POLICY,
        task.clients(data_folder()),
        state=SimulationState(),
        fleet=None,
        on_choice=lambda choice, workers: None,
    )
    return outcomes[0]


def rows_of(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Accuracy of each system at each epsilon, over seeds."""
    keys = dict.fromkeys((run["system"], run["assumes"], run["target_epsilon"]) for run in runs)
    found = []
    for system, assumes, epsilon in keys:
        values = _accuracies(runs, system, assumes, epsilon)
        workload = "mnist_by_writer" if epsilon is None else f"epsilon {epsilon:g}, {assumes}"
        found.append(asdict(row(system, workload, "accuracy", "fraction", values)))
    return found


def checks_of(runs: Sequence[Mapping[str, Any]]) -> list[Check]:
    """That fedcore keeps to its epsilon, and does not fall behind Flower at any."""
    checks = []
    private = [run for run in runs if run["epsilon"] is not None]
    over = [run["epsilon"] / run["target_epsilon"] for run in private]
    checks.append(_check("epsilon over its target", over, at_most=1.0))
    for epsilon in dict.fromkeys(run["target_epsilon"] for run in private):
        for ours, assumes in (("fedcore", "secret"), ("fedcore matrix", "known")):
            gains = [
                one - other
                for one, other in zip(
                    _accuracies(runs, ours, assumes, epsilon),
                    _accuracies(runs, "flower", assumes, epsilon),
                    strict=True,
                )
            ]
            name = f"accuracy of {ours} over flower, epsilon {epsilon:g}, {assumes} cohorts"
            checks.append(_check(name, gains, at_least=-_SLACK))
    return checks


def curves_of(
    runs: Sequence[Mapping[str, Any]],
) -> dict[str, list[tuple[float, Sequence[float]]]]:
    """Accuracies by epsilon, of each system."""
    names = dict.fromkeys((run["system"], run["assumes"]) for run in runs)
    epsilons = list(dict.fromkeys(run["target_epsilon"] for run in runs if run["epsilon"]))
    return {
        f"{system}, {assumes} cohorts" if assumes != "none" else system: [
            (epsilon, _accuracies(runs, system, assumes, epsilon if assumes != "none" else None))
            for epsilon in epsilons
        ]
        for system, assumes in names
    }


def _accuracies(
    runs: Sequence[Mapping[str, Any]], system: str, assumes: str, epsilon: float | None
) -> list[float]:
    return [
        run["accuracy"]
        for run in runs
        if (run["system"], run["assumes"], run["target_epsilon"]) == (system, assumes, epsilon)
    ]


def _check(
    name: str,
    values: Sequence[float],
    *,
    at_least: float | None = None,
    at_most: float | None = None,
) -> Check:
    """Judged by the median of gains, and by the largest of what may not be passed."""
    if at_most is not None:
        value, bound, holds = max(values), at_most, max(values) <= at_most
    else:
        assert at_least is not None
        value, bound = sorted(values)[len(values) // 2], at_least
        holds = value >= bound
    return Check(name=name, value=value, bound=bound, holds=holds, min=min(values), max=max(values))


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    sys.exit(main())
