"""Runs in a folder of results, and how two of them differ: settings and final figures.

`list_runs` and `compare_runs` are part of the Python API. Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from os import PathLike
from pathlib import Path
from typing import Any

from fedcore.errors import ConfigError, DataError
from fedcore.files import read_bytes
from server.report.folder import CHECKPOINT, GLOBAL_MODEL, JOURNAL_FOLDER, MARK, SUMMARY
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
    """One run in a folder of results, from `fedcore.list_runs`.

    Example::

        complete = [run for run in fedcore.list_runs() if run.state == "complete"]
        best = max(complete, key=lambda run: run.figures["accuracy.released"])
        best.settings["federation"]["rounds"]
    """

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
    """Differences of two runs, each value first of the one and then of the other.

    Example::

        found = fedcore.compare_runs("churn", "churn-2")
        found.settings  # {"client.learning_rate": (0.1, 0.05)}
        found.figures["accuracy.released"]
    """

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


def list_runs(runs: str | PathLike[str] = "runs") -> list[FoundRun]:
    """Lists the runs in a folder of results, the latest last.

    Example::

        for run in fedcore.list_runs("runs"):
            print(run.name, run.state, run.figures)

    Args:
        runs: Parent folder of the results of simulations and of servers.

    Returns:
        All runs, ordered by the time of their last change; empty if there are none.

    Raises:
        ConfigError: there is no such folder.
        DataError: a run's files cannot be read.
    """
    folder = Path(runs)
    if not folder.is_dir():
        raise ConfigError(
            f"{folder}: there is no such folder. Nothing was read; pass the parent folder of the "
            "results with --runs."
        )
    found = [read_run(one) for one in folder.iterdir() if (one / MARK).is_file()]
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
    live, settings = (folder / JOURNAL_FOLDER).is_dir(), _read(folder / MARK)
    summary = _read(folder / SUMMARY) if (folder / SUMMARY).is_file() else {}
    complete = bool(summary) or (live and _has_ended(folder, settings))
    unfinished = live or (folder / CHECKPOINT).is_file()
    return FoundRun(
        name=folder.name,
        folder=folder,
        state="complete" if complete else "unfinished" if unfinished else "begun",
        changed=f"{datetime.fromtimestamp(files[0].stat().st_mtime, UTC):%Y-%m-%dT%H:%M:%SZ}",
        settings=settings,
        figures=dict(_figures(summary)),
        task=found if isinstance(found := summary.get("task"), Mapping) else None,
    )


def _has_ended(folder: Path, settings: Mapping[str, Any]) -> bool:
    """Returns whether a server's run that releases nothing has written its model, the last step."""
    release = settings.get("release")
    releases = isinstance(release, Mapping) and release.get("repository") is not None
    return not releases and (folder / GLOBAL_MODEL).is_file()


def compare_runs(
    one: FoundRun | str | PathLike[str],
    other: FoundRun | str | PathLike[str],
    *,
    runs: str | PathLike[str] = "runs",
) -> ComparedRuns:
    """Returns the settings that differ between two runs, and the final figures of both.

    Example::

        found = fedcore.compare_runs("churn", "churn-2", runs="runs")
        for name, (before, after) in found.figures.items():
            print(name, before, after)

    Args:
        one: A run: its name below ``runs``, its folder, or one from `fedcore.list_runs`.
        other: The run to compare it with.
        runs: Parent folder of the results, for names.

    Raises:
        ConfigError: a folder is not that of a run.
        DataError: a run's files cannot be read.
    """
    first, second = _named(Path(runs), one), _named(Path(runs), other)
    flat = dict(by_dotted_name(first.settings)), dict(by_dotted_name(second.settings))
    keys = [key for key in dict.fromkeys([*flat[0], *flat[1]]) if key != "name"]
    names = dict.fromkeys([*first.figures, *second.figures])
    return ComparedRuns(
        (first.name, second.name),
        {key: (a, b) for key in keys if (a := flat[0].get(key)) != (b := flat[1].get(key))},
        {name: (first.figures.get(name), second.figures.get(name)) for name in names},
        (first.task, second.task),
    )


def _named(runs: Path, name: FoundRun | str | PathLike[str]) -> FoundRun:
    """Returns the run of a name below ``runs``, or in a folder."""
    if isinstance(name, FoundRun):
        return name
    below = runs / name
    return read_run(below if below.is_dir() or not Path(name).is_dir() else Path(name))


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
