"""The results folder of a run: creation, locking, and final results."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedcore.config.run import RunConfig
from fedcore.errors import ConfigError
from fedcore.files import (
    disk_errors,
    lock_folder,
    remove,
    remove_unfinished,
    remove_unfinished_below,
    write_atomic,
    write_json,
)
from server.records import Finished

CHECKPOINT = "checkpoint.safetensors"
"""Checkpoint in a simulation's folder, from which the simulation resumes."""
JOURNAL_FOLDER = "journal"
"""Subfolder with the journal of a deployment."""
GLOBAL_MODEL = "global.safetensors"
"""The best model of the rounds; a server writes it when they have ended."""
MARK, SUMMARY = "run.json", "summary.json"
"""The configuration that marks a run's folder, and the figures that mark it as complete."""
_UNRELEASED = "unreleased.txt"
"""States why a run whose results are all there could not publish its model; it can be resumed."""
_ASIDE = ".replaced"
"""Holds what a new run replaces, until that has progress of its own."""


def _has_progress(folder: Path) -> bool:
    return (folder / CHECKPOINT).is_file() or (folder / JOURNAL_FOLDER).exists()


@contextmanager
def open_folder(
    run: RunConfig,
    runs: Path,
    *,
    before: Callable[[Path], None] = lambda folder: None,
    has_progress: Callable[[Path], bool] = _has_progress,
) -> Iterator[Path]:
    """Locks and empties ``runs/<name>``, and marks it as this run's.

    What was there is set aside, and put back if the run fails before it has progress: a run that
    cannot train replaces nothing.

    Args:
        run: The run.
        runs: Parent folder of the run's folder.
        before: Callback with the locked folder before it is emptied; an exception from it leaves
            everything unchanged.
        has_progress: Whether a run that failed left something to continue from; by default a
            checkpoint or a journal.

    Raises:
        ConfigError: the folder contains something that no run of fedcore wrote, or a run of this
            name is active.
    """
    folder = runs / run.name
    with disk_errors(folder):
        if folder.exists() and not folder.is_dir():
            raise _not_ours(folder)
        folder.mkdir(parents=True, exist_ok=True)
    with locked(folder), disk_errors(folder):
        if not (folder / MARK).is_file() and any(folder.iterdir()):
            raise _not_ours(folder)
        if not has_progress(folder):
            _put_back(folder)  # a process that was killed left it aside
        before(folder)
        _set_aside(folder)
        mark(folder, run)
        try:
            yield folder
        except BaseException:
            if not has_progress(folder):
                _put_back(folder)
            raise
        finally:
            if (folder / _ASIDE).exists():
                remove(folder / _ASIDE)


@contextmanager
def reopen_folder(run: RunConfig, runs: Path) -> Iterator[Path]:
    """Locks ``runs/<name>`` of an earlier run, and leaves its content unchanged.

    Raises:
        ConfigError: there is no such run, or it is still active.
    """
    folder = runs / run.name
    if not (folder / MARK).is_file():
        if folder.is_dir() and any(folder.iterdir()):
            raise ConfigError(
                f"{folder}: it has no {MARK}, which marks the folder of a run, so it was "
                "neither resumed nor emptied. Nothing was run; restore that file, or choose "
                "another `name`."
            )
        raise ConfigError(
            f"{folder}: no run of this name was started here, so there is none to resume. "
            "Nothing was run; leave --resume out, or pass its parent folder with --runs "
            "(in Python resume=True and runs)."
        )
    with locked(folder):
        yield folder


def _not_ours(folder: Path) -> ConfigError:
    return ConfigError(
        f"{folder}: this folder was not written by a run (it has no {MARK}), and a run would "
        "replace it. Nothing was run; choose another `name`, or move the folder."
    )


def complete(folder: Path) -> ConfigError:
    """Returns the error for a complete run that was to be resumed."""
    return ConfigError(
        f"{folder}: this run is complete: its results are in {SUMMARY}. Nothing was run; "
        "give it more rounds to continue it, or start over with --fresh (in Python fresh=True)."
    )


def mark(folder: Path, run: RunConfig) -> None:
    """Writes the mark of a run's folder: its configuration."""
    write_atomic(folder / MARK, config_json(run))


def is_complete(folder: Path) -> bool:
    """Returns whether the folder contains a complete run with all of its results, its release too.

    A run that could not publish its model has its results, and can be resumed.
    """
    return (folder / SUMMARY).is_file() and not (folder / _UNRELEASED).is_file()


def _set_aside(folder: Path) -> None:
    """Moves the content of a run's folder into a hidden one; its mark is copied."""
    aside = folder / _ASIDE
    if aside.exists():
        remove(aside)
    found = [entry for entry in folder.iterdir() if entry.name != MARK]
    if not found:
        return
    aside.mkdir()
    if (folder / MARK).is_file():
        write_atomic(aside / MARK, (folder / MARK).read_bytes())
    for entry in found:
        entry.rename(aside / entry.name)


def _put_back(folder: Path) -> None:
    """Undoes `_set_aside`, in place of what the run has written since; does nothing without it."""
    aside = folder / _ASIDE
    if not aside.is_dir():
        return
    clear(folder, keep=(_ASIDE,))
    for entry in aside.iterdir():
        entry.replace(folder / entry.name)
    aside.rmdir()


def restore_mark(folder: Path, run: RunConfig) -> None:
    """Restores the mark of a run's folder, with its configuration, if it was lost."""
    if not (folder / MARK).is_file():
        mark(folder, run)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Locks a folder against other runs, and removes what a killed run left half-written.

    Raises:
        ConfigError: a run is active in it.
    """
    refused = ConfigError(
        f"{folder}: a run of this name is in progress. Nothing was run; wait for its end, or "
        "choose another `name`."
    )
    with lock_folder(folder, refused):
        if (folder / MARK).is_file():
            remove_unfinished_below(folder)
        else:
            remove_unfinished(folder, MARK)  # the folder may be somebody else's
        yield


def clear(folder: Path, *, keep: Collection[str] = ()) -> None:
    """Empties a run's folder, except its mark and the names in ``keep``."""
    with disk_errors(folder):
        for entry in folder.iterdir():
            if entry.name not in {MARK, *keep}:
                remove(entry)


def results_around(path: Path) -> Path | None:
    """Returns the results folder that contains ``path``; None if there is none."""
    return next((one for one in path.resolve().parents if (one / MARK).is_file()), None)


def check_outside(path: Path, folder: Path) -> None:
    """Rejects an initial model inside the results folder that the run replaces.

    Raises:
        ConfigError: ``path`` is inside ``folder``.
    """
    if path.resolve().is_relative_to(folder.resolve()):
        raise ConfigError(
            f"federation.initial = {path}: it is among the results of an earlier run of this "
            "name, which this run would replace. Nothing was run; copy it elsewhere, or give "
            "this run another name."
        )


def config_json(run: RunConfig) -> bytes:
    """Returns the resolved configuration as JSON; manifests state its digest."""
    return run.model_dump_json(indent=2).encode() + b"\n"


def write_results(
    folder: Path, finished: Finished, *, target_delta: float | None, seconds: float
) -> dict[str, Any]:
    """Writes ``report.html``, then ``summary.json``, which marks the run as complete.

    Returns:
        The content of ``summary.json``.
    """
    # Imported here: they import plotting libraries, which most callers don't need.
    from server.report.html import report_html
    from server.report.summary import summary

    figures = summary(
        finished.record,
        target_delta=target_delta,
        torch_p50_us=finished.torch_p50_us,
        seconds=seconds,
    )
    write_atomic(folder / "report.html", report_html(finished.record, figures).encode())
    if finished.record.unreleased:
        write_atomic(folder / _UNRELEASED, finished.record.unreleased.encode() + b"\n")
    else:
        (folder / _UNRELEASED).unlink(missing_ok=True)
    write_json(folder / SUMMARY, figures)
    return figures
