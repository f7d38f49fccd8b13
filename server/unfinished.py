"""Protects the progress of interrupted runs from being overwritten by a new run."""

from __future__ import annotations

from pathlib import Path

from fedcore.errors import ConfigError, DataError
from server.live.journal.head import is_begun
from server.report.folder import CHECKPOINT, JOURNAL_FOLDER, is_complete


def allow_drop(folder: Path) -> None:
    """Permits everything in the folder to be dropped: the check for ``--fresh``."""


def require_no_progress(folder: Path) -> None:
    """Rejects starting a run over if that would drop a complete run, or progress of another one.

    A simulation without a finished round has no progress to lose.

    Args:
        folder: The folder of a run of the same name, locked by this process.

    Raises:
        ConfigError: there is a complete run, or an interrupted one with progress. Nothing was
            removed.
        DataError: its checkpoint is damaged. Nothing was removed.
    """
    if is_complete(folder):
        raise ConfigError(
            f"{folder}: this run is complete, and running it again would replace its model and "
            "results. Nothing was run; choose another `name`, or start over with --fresh (from "
            "Python, fresh=True)."
        )
    if is_begun(folder / JOURNAL_FOLDER):
        raise ConfigError(
            f"{folder}: `fedcore server start` started this run over devices, and it is not "
            "complete; starting this one would discard it. Nothing was run; choose another "
            "`name`, or start over with --fresh (in Python fresh=True)."
        )
    require_no_simulated_progress(folder)


def has_finished_round(folder: Path) -> bool:
    """Returns whether the folder has a checkpoint of a simulation that has finished a round.

    A checkpoint that cannot be read may be one.
    """
    # Imported here: it imports torch, and a server starts listening before that.
    from server.simulation.checkpoint import read_checkpoint

    path = folder / CHECKPOINT
    try:
        return path.is_file() and read_checkpoint(path).progress.round > 0
    except DataError:
        return True


def require_no_simulated_progress(folder: Path) -> None:
    """Rejects starting a run over if that would drop the progress of an interrupted simulation.

    Raises:
        ConfigError: there is such a simulation. Nothing was removed.
        DataError: its checkpoint is damaged. Nothing was removed.
    """
    if is_complete(folder) or not (folder / CHECKPOINT).is_file():
        return
    # Imported here: it imports torch, and a server starts listening before that.
    from server.simulation.checkpoint import read_checkpoint

    last = read_checkpoint(folder / CHECKPOINT).progress.round
    if last:
        raise ConfigError(
            f"{folder}: this simulation was interrupted after round {last}, and starting it "
            "would discard that. Nothing was run; continue with `fedcore simulate --resume`, or "
            "start over with --fresh (from Python, resume=True or fresh=True)."
        )
