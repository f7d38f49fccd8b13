"""The folder that a run writes its results to."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedcore.config import RunConfig
from fedcore.errors import ConfigError
from fedcore.files import disk_errors, write_atomic, write_json
from server.records import Finished
from server.report.html import report_html
from server.report.summary import summary

_MARK = "run.json"


@contextmanager
def open_folder(run: RunConfig, runs: Path) -> Iterator[Path]:
    """Empties ``runs/<name>``, marks it as this run's, and keeps other runs out meanwhile.

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
        held = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{folder}: a run of this name is going on. Nothing was run; wait for its end, or "
                "choose another `name`."
            ) from None
        with disk_errors(folder):
            for entry in folder.iterdir():
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        write_atomic(folder / _MARK, config_json(run))
        yield folder
    finally:
        os.close(held)


def config_json(run: RunConfig) -> bytes:
    """The resolved configuration, as it is digested in manifests."""
    return run.model_dump_json(indent=2).encode() + b"\n"


def write_results(
    folder: Path, finished: Finished, *, target_delta: float | None, seconds: float
) -> dict[str, Any]:
    """Writes ``summary.json`` and ``report.html``; the summary last, as the mark of a whole run."""
    figures = summary(
        finished.record,
        target_delta=target_delta,
        torch_p50_us=finished.torch_p50_us,
        seconds=seconds,
    )
    write_atomic(folder / "report.html", report_html(finished.record, figures).encode())
    write_json(folder / "summary.json", figures)
    return figures
