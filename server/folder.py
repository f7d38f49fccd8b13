"""The folder that a run writes its results to."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from fedcore.config import RunConfig
from fedcore.errors import ConfigError
from fedcore.files import disk_errors, write_atomic, write_json
from server.records import Finished
from server.report.html import report_html
from server.report.summary import summary

_MARK = "run.json"


def open_folder(run: RunConfig, runs: Path) -> Path:
    """Empties ``runs/<name>`` and marks it as this run's.

    Raises:
        ConfigError: the folder holds something that no run of fedcore wrote.
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
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
    write_atomic(folder / _MARK, config_json(run))
    return folder


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
