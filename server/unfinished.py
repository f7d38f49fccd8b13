"""Whether a folder holds what a run that did not end has learnt."""

from __future__ import annotations

from pathlib import Path

from fedcore.errors import ConfigError
from server.live.journal.head import is_begun
from server.report.folder import CHECKPOINT, JOURNAL_FOLDER, is_complete


def drop_all(folder: Path) -> None:
    """Lets everything in a folder be dropped."""


def refuse_to_drop(folder: Path) -> None:
    """Refuses to begin again where that would drop what an interrupted run has learnt.

    A simulation that had no round over has learnt nothing, and a complete run may be replaced.

    Args:
        folder: Of a run of the same name, held by this process.

    Raises:
        ConfigError: there is such a run. Nothing was removed.
        DataError: its checkpoint is damaged. Nothing was removed.
    """
    if is_complete(folder):
        return
    if is_begun(folder / JOURNAL_FOLDER):
        raise ConfigError(
            f"{folder}: `fedcore server start` began this run over devices, and it is not "
            "complete; starting this one would drop it. Nothing was run; choose another `name`, "
            "or begin again with --fresh."
        )
    refuse_to_drop_simulated(folder)


def refuse_to_drop_simulated(folder: Path) -> None:
    """The same, for a simulation that was interrupted alone.

    Raises:
        ConfigError: there is one. Nothing was removed.
        DataError: its checkpoint is damaged. Nothing was removed.
    """
    if is_complete(folder) or not (folder / CHECKPOINT).is_file():
        return
    # Imported here: it brings torch, and a server listens before it has that.
    from server.simulation.checkpoint import read_checkpoint

    last = read_checkpoint(folder / CHECKPOINT).progress.round
    if last:
        raise ConfigError(
            f"{folder}: this simulation was interrupted after round {last}, and starting it would "
            "drop that. Nothing was run; go on with `fedcore simulate --resume`, or begin again "
            "with --fresh (from Python, resume=True or fresh=True)."
        )
