"""What fixes a run: two runs that share it give the same bits."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from fedcore.config.owner import OwnerPolicy
from fedcore.config.run import IN_MEMORY, RunConfig
from fedcore.errors import ConfigError
from fedcore.files import read_bytes, sha256_hex
from server.rounds.own_strategy import file_of

_MAX_FILE_BYTES = 64 << 20  # of a task or a trace
TASK, STRATEGY, TRACE = "task file", "strategy file", "trace"
_FREE = {"run.simulation.workers", "run.simulation.engine"}
"""These may change, and no bit does but for the order of float32 sums where clients are trained
side by side: a machine with less memory may go on with fewer workers."""


def identity_of(run: RunConfig, owner: OwnerPolicy) -> dict[str, Any]:
    """The configuration, the owner's policy, and digests of the files that belong to them.

    Modules that a task's or a strategy's file imports are not looked at, nor is the data, nor is a
    task that was made in memory.
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
    """What differs between two identities, in words; empty where the same run goes on.

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
            continue  # an earlier version began it, which had no such setting
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
    """Refuses to go on with a run that was begun otherwise, but for what is ``free``.

    Raises:
        ConfigError: they differ; says in what.
    """
    if found := changes(before, now, free=free):
        raise ConfigError(
            f"{where}: this checkpoint was written by another run, which differs in "
            f"{', '.join(found)}. Nothing was run; set back what was changed, or begin again with "
            "--fresh."
        )


def _digest(path: Path, what: str) -> str:
    more = "Nothing was run; name one that is there in the run's file."
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
