"""``fedcore new``: writes a working task and configuration, on synthetic data."""

from __future__ import annotations

import argparse
import re
from importlib.resources import files
from os import PathLike
from pathlib import Path
from typing import NamedTuple

from fedcore.cli import Command
from fedcore.errors import ConfigError, FedcoreError
from fedcore.files import write_atomic
from fedcore.observability.foreign import say

KINDS = (
    "classification",
    "binary",
    "multilabel",
    "regression",
    "segmentation",
    "next_token",
    "sequence",
)
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")  # valid values of `name` in a run's file
_PLACEHOLDER = "NAME"


class NewTask(NamedTuple):
    """The files that `fedcore.new_task` wrote.

    Example::

        task, run = fedcore.new_task("churn")
        result = fedcore.simulate(task, run)
    """

    task: Path
    """The file that defines the task: what is learned, from which data."""
    run: Path
    """The run's file: how it is learned."""


def new_task(folder: str | PathLike[str], *, kind: str = KINDS[0]) -> NewTask:
    """Writes a task file and a run's file that work immediately, on data generated from a seed.

    Example::

        task, run = fedcore.new_task("churn", kind="regression")
        assert fedcore.check(task, run).ok
        result = fedcore.simulate(task, run)

    Args:
        folder: Created if missing; its last part names the run and the task.
        kind: ``"classification"``, ``"binary"``, ``"multilabel"``, ``"regression"``,
            ``"segmentation"``, ``"next_token"`` or ``"sequence"``.

    Returns:
        The paths of ``task.py`` and ``run.toml``.

    Raises:
        ConfigError: there is no such kind, the name cannot name a run, or one of the files exists
            already.
        DiskFull: the disk has no room; neither file is left.
        ResourceError: this user may not write there.
    """
    if kind not in KINDS:
        raise ConfigError(
            f"kind {kind!r}: expected one of {', '.join(KINDS)}. Nothing was written; choose the "
            "one that is nearest, and change its loss and metrics in the task."
        )
    folder = Path(folder)
    name = folder.name
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"fedcore new {folder}: {name!r} is not a valid run name; expected 1 to 64 of a-z, "
            "0-9, '_' and '-', with a letter or digit first. Nothing was written; choose another "
            "name."
        )
    if folder.exists() and not folder.is_dir():
        raise ConfigError(
            f"fedcore new {folder}: expected a new folder, but a file has that name. Nothing was "
            "written; choose another name."
        )
    paths = folder / "task.py", folder / "run.toml"
    for path in paths:
        if path.exists():
            raise ConfigError(
                f"{path}: this file exists already and is never overwritten. Nothing was written; "
                "choose another name, or move the file away."
            )
    try:
        for path, template in zip(paths, (f"{kind}.txt", "run.toml"), strict=True):
            text = files("fedcore").joinpath("templates", template).read_text()
            write_atomic(path, text.replace(_PLACEHOLDER, name).encode())
    except FedcoreError:  # one file is useless without the other
        for path in paths:
            path.unlink(missing_ok=True)
        raise
    return NewTask(*paths)


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name",
        metavar="NAME",
        type=Path,
        help=(
            "folder to write into; its last part is the run's name, e.g. turbines or work/turbines"
        ),
    )
    parser.add_argument(
        "--kind",
        choices=KINDS,
        default=KINDS[0],
        help="what the model learns, e.g. --kind regression (default: %(default)s)",
    )


def _run(options: argparse.Namespace) -> int:
    task, run = new_task(options.name, kind=options.kind)
    if not options.name.resolve().is_relative_to(Path.cwd()):
        say(f"note: {options.name.resolve()} is outside the current folder")
    say(f"wrote {task}: the task; its comments say what to replace")
    say(f"wrote {run}: the configuration of the run")
    say(f"next: fedcore check {task}, then fedcore simulate {run}")
    return 0


new = Command(
    help="write a working task and configuration as a starting point",
    arguments=_arguments,
    run=_run,
    example="fedcore new turbines --kind regression",
)
