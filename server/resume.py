"""Where a run that was interrupted goes on."""

from __future__ import annotations

from pathlib import Path

from fedcore.config import RunConfig
from fedcore.errors import ConfigError
from fedcore.owner import OwnerPolicy
from server.checkpoint import CHECKPOINT, Checkpoint, read_checkpoint
from server.folder import clear, is_complete
from server.identity import check_same, identity_of
from server.journal_head import is_begun
from server.keeper import FAILED

JOURNAL = "journal"
"""Folder of the journal of a run over devices, in its folder."""


def refuse_to_drop(folder: Path) -> None:
    """Refuses to begin anew where that would drop what an interrupted run has learnt.

    A simulation that had no round over has learnt nothing, and a complete run may be replaced.

    Args:
        folder: Of a run of the same name, held by this process.

    Raises:
        ConfigError: there is such a run. Nothing was removed.
        DataError: its checkpoint is damaged. Nothing was removed.
    """
    if is_complete(folder):
        return
    if is_begun(folder / JOURNAL):
        raise ConfigError(
            f"{folder}: `fedcore server start` began this run over devices, and it is not "
            "complete; starting this one would drop it. Nothing was run; choose another `name`, "
            "or begin anew with --fresh."
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
    last = read_checkpoint(folder / CHECKPOINT).progress.round
    if last:
        raise ConfigError(
            f"{folder}: this simulation was interrupted after round {last}, and starting it would "
            "drop that. Nothing was run; go on with `fedcore simulate --resume`, or begin anew "
            "with --fresh."
        )


def pick_up(folder: Path, run: RunConfig, owner: OwnerPolicy) -> Checkpoint:
    """The run's checkpoint; what else lies in ``folder`` and will be written again is removed.

    Args:
        folder: The run's, held by this process.
        run: The run as it is asked for now.
        owner: What virtual clients keep to now.

    Raises:
        ConfigError: there is none, or it is of another run. Nothing was removed.
        DataError: it is damaged. Nothing was removed.
    """
    path = folder / CHECKPOINT
    if not path.is_file():
        raise ConfigError(
            f"{folder}: this run was stopped before its first checkpoint. Nothing was run; begin "
            "it anew without --resume."
        )
    checkpoint = read_checkpoint(path)
    check_same(path, checkpoint.identity, identity_of(run, owner))
    clear(folder, keep=(CHECKPOINT, FAILED))
    return checkpoint
