"""The systems that are measured, each a command; and what one run of a command comes to."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.figures import Run
from benchmarks.measure import Observed, ProgramFailed, observe
from benchmarks.workloads import Workload, run_file

ROOT = Path(__file__).parent.parent
_LIMIT_S = 1800.0


@dataclass(frozen=True)
class System:
    """One way to run a workload."""

    name: str
    program: str | None
    """The module under `benchmarks.peers`; None for fedcore."""
    options: tuple[str, ...] = ()


FEDCORE = System("fedcore", None)
FLOWER = System("flower", "flower")
FLOWER_STOCK = System("flower-stock", "flower", ("--stock",))
PFL = System("pfl", "pfl")
PFL_STOCK = System("pfl-stock", "pfl", ("--stock",))
FEDJAX = System("fedjax", "fedjax")
BARE = System("bare", "bare")
OPACUS = System("opacus", "opacus")


@dataclass(frozen=True)
class Place:
    """Where a campaign runs."""

    peers_python: Path
    """The interpreter of the peers' environment."""
    data: Path
    """The folder of prepared partitions."""
    scratch: Path
    """Results of single runs go below it."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One run as its process told it."""

    observed: Observed
    ends_s: tuple[float, ...]
    accuracy: float
    bytes_per_round: int | None
    epsilon: float | None
    epsilon_max: float | None
    chosen: str
    """What the system says of the options it chose; empty when it says nothing."""


def measure(
    system: System,
    workload: Workload,
    *,
    rounds: int,
    seed: int,
    place: Place,
    settings: Sequence[str] = (),
) -> Measured:
    """Runs a system in a process of its own; fedcore with ``settings`` over its run file.

    Raises:
        ProgramFailed: it failed, or its answer is not what was asked for.
    """
    if system.program is None:
        measured = _fedcore(workload, rounds, seed, place, settings)
    else:
        measured = _peer(system, workload, rounds, seed, place)
    if len(measured.ends_s) != rounds:
        raise ProgramFailed(
            f"{system.name} on {workload.name}: {len(measured.ends_s)} rounds were told of and "
            f"{rounds} asked for. Its figures were not used."
        )
    return measured


def _peer(system: System, workload: Workload, rounds: int, seed: int, place: Place) -> Measured:
    command = [
        *(str(place.peers_python), "-m", f"benchmarks.peers.{system.program}"),
        *("--workload", workload.name, "--rounds", str(rounds), "--seed", str(seed)),
        *("--data", str((place.data / f"{workload.partition}.safetensors").resolve())),
        *system.options,
    ]
    environment = {
        "PYTHONPATH": str(ROOT),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_HOME": str((place.scratch / "flower").resolve()),
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    observed = observe(command, environment=environment, folder=ROOT, limit_s=_LIMIT_S)
    result = _last_object(observed, command)
    chosen = ", ".join(f"{name} {value}" for name, value in result["chosen"].items())
    return Measured(
        observed=observed,
        ends_s=tuple(result["ends_s"]),
        accuracy=result["accuracy"],
        bytes_per_round=result["bytes_per_round"],
        epsilon=result["epsilon"],
        epsilon_max=result["epsilon_max"],
        chosen=chosen,
    )


def _fedcore(
    workload: Workload, rounds: int, seed: int, place: Place, settings: Sequence[str]
) -> Measured:
    """Fedcore by its command line alone: its events, as they arrive, are what is timed."""
    command = [
        *(sys.executable, "-m", "fedcore.cli", "simulate", str(run_file(workload.name))),
        *("--fresh", "--json", "--runs", str((place.scratch / "runs").resolve())),
        *("--set", f"federation.rounds={rounds}", "--set", f"seed={seed}"),
        *(word for setting in settings for word in ("--set", setting)),
    ]
    environment = {"FEDCORE_DATA": str(place.data.resolve()), "PYTHONPATH": str(ROOT)}
    observed = observe(command, environment=environment, folder=place.scratch, limit_s=_LIMIT_S)
    events = [(when, json.loads(line)) for when, line in observed.lines]
    ended = [(when, event) for when, event in events if event["event"] == "round_finished"]
    notes = [str(event["text"]) for _, event in events if event["event"] == "noted"]
    failed = sum(event["failed"] for _, event in ended)
    if failed:
        raise ProgramFailed(f"{' '.join(command)}: {failed} clients failed: {' '.join(notes)}")
    # Rounds of a few milliseconds are told together: when each ended it says itself. The last one
    # is told as the rounds end.
    when, last = ended[-1]
    began_s = when - last["elapsed_s"]
    return Measured(
        observed=observed,
        ends_s=tuple(began_s + event["elapsed_s"] for _, event in ended),
        accuracy=_last_object(observed, command)["accuracy"]["federated"],
        bytes_per_round=last["bytes_up"] + last["bytes_down"],
        epsilon=ended[0][1]["epsilon_max"],  # after one round: of one participation
        epsilon_max=last["epsilon_max"],
        chosen=" ".join(notes),
    )


def _last_object(observed: Observed, command: Sequence[str]) -> dict[str, Any]:
    for _, line in reversed(observed.lines):
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            return found
    raise ProgramFailed(f"{' '.join(command)}: it printed no result. Its figures were not used.")


def run_of(
    system: System,
    workload: Workload,
    repeat: int,
    *,
    accurate: Measured,
    timed: Measured,
    warmup: int,
) -> Run:
    """The figures of a repeat.

    Args:
        system: What ran.
        workload: What it ran.
        repeat: From 0.
        accurate: The run of exactly the workload's rounds: accuracy, start-up, what was spent.
        timed: The run that was timed, the same one or a longer one.
        warmup: Rounds at its beginning that are not timed.
    """
    seconds = seconds_per_round(timed.ends_s, warmup)
    return Run(
        system=system.name,
        workload=workload.name,
        repeat=repeat,
        seconds_per_round=seconds,
        clients_per_s=workload.cohort / seconds,
        start_up_s=accurate.ends_s[0] - accurate.observed.launched_s,
        peak_bytes=timed.observed.peak_bytes(timed.ends_s[-1]),
        bytes_per_round=timed.bytes_per_round,
        accuracy=accurate.accuracy,
        epsilon=accurate.epsilon,
        epsilon_max=accurate.epsilon_max,
    )


def seconds_per_round(ends_s: Sequence[float], warmup: int) -> float:
    """The mean time of a round in steady state, after ``warmup`` of them (at least one).

    >>> seconds_per_round([5.0, 6.0, 6.5, 7.0], warmup=2)
    0.5
    """
    assert 1 <= warmup < len(ends_s)
    return (ends_s[-1] - ends_s[warmup - 1]) / (len(ends_s) - warmup)
