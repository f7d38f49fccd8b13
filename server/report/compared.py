"""Runs in a folder of results, and how two of them differ: settings and final figures.

Start with `find_runs` and `compare_runs`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedcore.errors import ConfigError, DataError
from fedcore.files import read_bytes
from server.report.folder import CHECKPOINT, JOURNAL_FOLDER, MARK, SUMMARY
from server.report.settings import by_dotted_name

_MAX_BYTES = 64 << 20
_NO_FIGURES = (
    "clients",
    "test",
    "settings",
    "client_privacy",
    "training",
    "virtual",
    "release",
    "seconds",
)
"""Entries of ``summary.json`` that are not compared: of single clients, or of how it was run."""


@dataclass(frozen=True)
class FoundRun:
    """One run in a folder of results."""

    name: str
    folder: Path
    state: str
    """``complete``; ``unfinished``, which a resume continues; or ``begun``: no checkpoint yet."""
    changed: str
    """Time of its last change, in UTC."""
    settings: Mapping[str, Any]
    """The run's configuration, in full."""
    figures: Mapping[str, float | None]
    """Final figures by dotted name; empty for a run that is not complete."""
    task: Mapping[str, str | None] | None = None
    """Name, kind and digest of the file of its task; None if the run is not complete."""


@dataclass(frozen=True)
class ComparedRuns:
    """Differences of two runs, each value first of the one and then of the other."""

    names: tuple[str, str]
    settings: Mapping[str, tuple[Any, Any]]
    """Settings that differ, by their dotted keys."""
    figures: Mapping[str, tuple[float | None, float | None]]
    """Final figures, by dotted names; None for one that a run does not have."""
    tasks: tuple[Mapping[str, str | None] | None, Mapping[str, str | None] | None] = (None, None)
    """Each run's task, see `FoundRun.task`."""

    @property
    def same_task(self) -> bool | None:
        """Whether both ran one task with one content; None if that is not known."""
        one, other = self.tasks
        if one is None or other is None:
            return None
        if one != other:
            return False
        return True if one.get("sha256") else None


def find_runs(runs: Path) -> list[FoundRun]:
    """Returns the runs in a folder of results, the latest last.

    Raises:
        ConfigError: there is no such folder.
        DataError: a run's files cannot be read.
    """
    if not runs.is_dir():
        raise ConfigError(
            f"{runs}: there is no such folder. Nothing was read; pass the parent folder of the "
            "results with --runs."
        )
    found = [read_run(one) for one in runs.iterdir() if (one / MARK).is_file()]
    return sorted(found, key=lambda one: (one.changed, one.name))


def read_run(folder: Path) -> FoundRun:
    """Reads the run in one folder of results.

    Raises:
        ConfigError: the folder is not that of a run.
        DataError: its files cannot be read.
    """
    if not (folder / MARK).is_file():
        raise ConfigError(
            f"{folder}: it has no {MARK}, so it is not the folder of a run. Nothing was read; "
            "`fedcore runs list` shows the runs."
        )
    files = [path for name in (SUMMARY, CHECKPOINT, MARK) if (path := folder / name).is_file()]
    unfinished = (folder / CHECKPOINT).is_file() or (folder / JOURNAL_FOLDER).is_dir()
    complete = (folder / SUMMARY).is_file()
    summary = _read(folder / SUMMARY) if complete else {}
    return FoundRun(
        name=folder.name,
        folder=folder,
        state="complete" if complete else "unfinished" if unfinished else "begun",
        changed=f"{datetime.fromtimestamp(files[0].stat().st_mtime, UTC):%Y-%m-%dT%H:%M:%SZ}",
        settings=_read(folder / MARK),
        figures=dict(_figures(summary)),
        task=found if isinstance(found := summary.get("task"), Mapping) else None,
    )


def compare_runs(one: FoundRun, other: FoundRun) -> ComparedRuns:
    """Returns the settings that differ between two runs, and the final figures of both."""
    flat = dict(by_dotted_name(one.settings)), dict(by_dotted_name(other.settings))
    keys = [key for key in dict.fromkeys([*flat[0], *flat[1]]) if key != "name"]
    names = dict.fromkeys([*one.figures, *other.figures])
    return ComparedRuns(
        (one.name, other.name),
        {key: (a, b) for key in keys if (a := flat[0].get(key)) != (b := flat[1].get(key))},
        {name: (one.figures.get(name), other.figures.get(name)) for name in names},
        (one.task, other.task),
    )


def _figures(summary: Mapping[str, Any]) -> Iterator[tuple[str, float | None]]:
    """Yields the final figures in ``summary.json``; leaves out those that the run does not have."""
    kept = {key: value for key, value in summary.items() if key not in _NO_FIGURES}
    for key, value in by_dotted_name(kept):
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield key, value
    seconds = summary.get("seconds")
    if isinstance(seconds, Mapping) and isinstance(seconds.get("total"), int | float):
        yield "seconds.total", seconds["total"]


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_bytes(path, max_bytes=_MAX_BYTES, what="this file"))
        if not isinstance(found, dict):
            raise ValueError("it is no object")
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: not the file that a run writes: {error}. Nothing was compared; run it "
            "again, or move the folder elsewhere."
        ) from None
    return found
