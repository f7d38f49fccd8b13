"""The folder that a run writes its results to."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedcore.config.run import RunConfig
from fedcore.errors import ConfigError
from fedcore.files import disk_errors, held_alone, remove, write_atomic, write_json
from server.records import Finished

CHECKPOINT = "checkpoint.safetensors"
"""What a simulation goes on from, in its folder."""
JOURNAL_FOLDER = "journal"
"""Folder of the journal of a run over devices, in its folder."""
_MARK, _SUMMARY = "run.json", "summary.json"


@contextmanager
def open_folder(
    run: RunConfig, runs: Path, *, before: Callable[[Path], None] = lambda folder: None
) -> Iterator[Path]:
    """Empties ``runs/<name>``, marks it as this run's, and keeps other runs out meanwhile.

    Args:
        run: The run.
        runs: Where its folder is.
        before: Given the folder once no other run has it, and before it is emptied; what it raises
            leaves everything as it was.

    Raises:
        ConfigError: the folder holds something that no run of fedcore wrote, or a run of this
            name is going on.
    """
    folder = runs / run.name
    with disk_errors(folder):
        if folder.exists():
            ours = folder.is_dir() and ((folder / _MARK).is_file() or not any(folder.iterdir()))
            if not ours:
                raise ConfigError(
                    f"{folder}: this folder was not written by a run (it has no {_MARK}), and a "
                    "run would replace it. Nothing was run; choose another `name`, or move it."
                )
        folder.mkdir(parents=True, exist_ok=True)
    with held(folder):
        before(folder)
        clear(folder)
        write_atomic(folder / _MARK, config_json(run))
        yield folder


@contextmanager
def reopen_folder(run: RunConfig, runs: Path) -> Iterator[Path]:
    """Gives ``runs/<name>`` as a run that did not end left it, and keeps other runs out meanwhile.

    Raises:
        ConfigError: there is no such run, it did end, or it is still going on.
    """
    folder = runs / run.name
    if not (folder / _MARK).is_file():
        if folder.is_dir() and any(folder.iterdir()):
            raise ConfigError(
                f"{folder}: it has no {_MARK}, by which the folder of a run is known, so it is "
                "neither gone on with nor emptied. Nothing was run; put that file back, or choose "
                "another `name` to run again."
            )
        raise ConfigError(
            f"{folder}: no run of this name was begun here, so there is none to resume. Nothing "
            "was run; leave --resume out, or name the folder that it is below by --runs."
        )
    with held(folder):
        if is_complete(folder):
            raise ConfigError(
                f"{folder}: this run is complete: its results are in {_SUMMARY}. Nothing was run; "
                "leave --resume out to run it again."
            )
        yield folder


def is_complete(folder: Path) -> bool:
    """Whether a run came to its end here, with all of its results."""
    return (folder / _SUMMARY).is_file()


def mark_again(folder: Path, run: RunConfig) -> None:
    """Marks the folder of ``run``, with its configuration, where its mark was lost."""
    if not (folder / _MARK).is_file():
        write_atomic(folder / _MARK, config_json(run))


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keeps other runs out of a folder meanwhile.

    Raises:
        ConfigError: a run is going on in it.
    """
    refused = ConfigError(
        f"{folder}: a run of this name is going on. Nothing was run; wait for its end, or choose "
        "another `name`."
    )
    with held_alone(folder, refused):
        yield


def clear(folder: Path, *, keep: Collection[str] = ()) -> None:
    """Empties a run's folder, but for its mark and what ``keep`` names."""
    with disk_errors(folder):
        for entry in folder.iterdir():
            if entry.name not in {_MARK, *keep}:
                remove(entry)


def results_around(path: Path) -> Path | None:
    """The folder of a run whose results ``path`` would lie among; None where it lies among none."""
    return next((one for one in path.resolve().parents if (one / _MARK).is_file()), None)


def check_outside(path: Path, folder: Path) -> None:
    """Refuses to begin from a file among results that the run would replace.

    Raises:
        ConfigError: ``path`` lies in ``folder``.
    """
    if path.resolve().is_relative_to(folder.resolve()):
        raise ConfigError(
            f"federation.initial = {path}: it lies among the results of a run of this name, which "
            "this run replaces. Nothing was run; copy it elsewhere, or give this run another name."
        )


def config_json(run: RunConfig) -> bytes:
    """The resolved configuration, as it is digested in manifests."""
    return run.model_dump_json(indent=2).encode() + b"\n"


def write_results(
    folder: Path, finished: Finished, *, target_delta: float | None, seconds: float
) -> dict[str, Any]:
    """Writes ``summary.json`` and ``report.html``; the summary last, as the mark of a whole run."""
    # Imported here: they draw plots, and not everyone who opens a folder does.
    from server.report.html import report_html
    from server.report.summary import summary

    figures = summary(
        finished.record,
        target_delta=target_delta,
        torch_p50_us=finished.torch_p50_us,
        seconds=seconds,
    )
    write_atomic(folder / "report.html", report_html(finished.record, figures).encode())
    write_json(folder / _SUMMARY, figures)
    return figures
