"""Identity of a run: two runs with the same identity give the same bits."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from fedcore.config.finetune import Finetune
from fedcore.config.owner import OwnerPolicy
from fedcore.config.run import IN_MEMORY, RunConfig
from fedcore.errors import ConfigError
from fedcore.files import read_bytes, sha256_hex
from server.rounds.strategies.own import file_of

_MAX_FILE_BYTES = 64 << 20  # of a task, strategy or trace file
AFTER_ROUNDS = (
    *("compression.", "release.", "serving."),
    *(f"finetune.{name}" for name in Finetune.model_fields if name != "holdout"),
)
"""Prefixes of settings that affect only the steps after the rounds: a resume may change them once
the rounds have ended. ``finetune.holdout`` is not among them: held-out data evaluates the rounds.
"""
IN_ROUNDS = tuple(one for one in AFTER_ROUNDS if not one.startswith("finetune."))
"""`AFTER_ROUNDS` of a run whose rounds start from fine-tuned models."""
TASK, STRATEGY, TRACE = "task file", "strategy file", "trace"
_FREE = {
    *("run.simulation.workers", "run.simulation.engine"),
    *("run.tracking.mlflow", "run.tracking.experiment"),
}
"""Settings that may change on resume, so that a machine with less memory can use fewer workers, and
figures can go elsewhere.
They affect no bit, except the order of float32 sums where clients are trained in batches."""


def free_after_rounds(run: RunConfig) -> Collection[str]:
    """Returns the prefixes of settings that a resume may change once the rounds have ended."""
    return IN_ROUNDS if run.finetune.in_rounds else AFTER_ROUNDS


def identity_of(run: RunConfig, owner: OwnerPolicy) -> dict[str, Any]:
    """Returns the configuration, the owner's policy, and digests of the run's files.

    Does not cover modules that a task's or strategy's file imports, the data, or a task that was
    defined in memory.
    """
    files = {} if run.task == IN_MEMORY else {TASK: run.path(run.task)}
    strategy = file_of(run)
    if strategy is not None:
        files[STRATEGY] = strategy
    if run.simulation.trace is not None:
        files[TRACE] = run.path(run.simulation.trace)
    return {
        "run": run.model_dump(mode="json"),
        "owner": owner.model_dump(mode="json"),
        **{what: _digest(path, what) for what, path in files.items()},
    }


def changes(
    before: Mapping[str, Any], now: Mapping[str, Any], *, free: Collection[str] = ()
) -> list[str]:
    """Returns the differences between two identities, in words; empty where they are the same run.

    Settings of the run whose names begin with one of ``free`` may differ.
    """
    old, new = dict(_flat(before)), dict(_flat(now))
    found = []
    for key in sorted(old.keys() | new.keys()):
        if key in _FREE or old.get(key) == new.get(key):
            continue
        if any(key.startswith(f"run.{one}") for one in free):
            continue
        if key not in old and key in _defaults() and new[key] == _defaults()[key]:
            continue  # a version without this setting started the run
        if isinstance(old.get(key), str) and key in (TASK, STRATEGY, TRACE):
            found.append(f"the {key}")
        else:
            found.append(
                f"{key.removeprefix('run.')} ({old.get(key)!r} then, {new.get(key)!r} now)"
            )
    return found


def check_same(
    where: Path,
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    *,
    free: Collection[str] = (),
) -> None:
    """Rejects a checkpoint of a run with another identity, apart from settings in ``free``.

    Raises:
        ConfigError: the identities differ; the message names the differences.
    """
    if found := changes(before, now, free=free):
        raise ConfigError(
            f"{where}: this checkpoint was written by another run, which differs in "
            f"{', '.join(found)}. Nothing was run; undo these changes, or start over with "
            "--fresh (in Python fresh=True)."
        )


def _digest(path: Path, what: str) -> str:
    more = "Nothing was run; set the run's file to an existing one."
    return sha256_hex(
        read_bytes(path, max_bytes=_MAX_FILE_BYTES, what=f"the {what}", otherwise=more)
    )


@cache
def _defaults() -> dict[str, Any]:
    run = RunConfig(name="run", task="task.py")
    return dict(_flat({"run": run.model_dump(mode="json")}))


def _flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value
