"""The workloads: what every system is asked to do, read from the run files that fedcore gets."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

TASKS = Path(__file__).parent / "tasks"


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Example-level DP-SGD."""

    clip_norm: float
    noise_multiplier: float
    target_delta: float


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One workload, the same for every system."""

    name: str
    partition: str
    """The prepared data file it reads (`benchmarks.partitions`)."""
    cohort: int
    """Clients a round."""
    rounds: int
    """Rounds after which accuracy is compared, the first ones included that are not timed."""
    epochs: int
    batch_size: int
    learning_rate: float
    noise: Noise | None


def run_file(name: str) -> Path:
    """The run file of a workload."""
    return TASKS / f"{name}.toml"


def read_workload(name: str) -> Workload:
    """Reads a workload from its run file, so that no system can be given other settings.

    Raises:
        KeyError: the run file leaves a setting to fedcore's defaults that peers would not know.
    """
    run = tomllib.loads(run_file(name).read_text())
    client, privacy = run["client"], run.get("privacy")
    return Workload(
        name=name,
        partition=Path(run["task"]).stem,
        cohort=run["federation"]["cohort"],
        rounds=run["federation"]["rounds"],
        epochs=client["epochs"],
        batch_size=client["batch_size"],
        learning_rate=client["learning_rate"],
        noise=privacy
        and Noise(
            clip_norm=privacy["clip_norm"],
            noise_multiplier=privacy["noise_multiplier"],
            target_delta=privacy["target_delta"],
        ),
    )
