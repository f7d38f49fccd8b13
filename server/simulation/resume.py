"""Resume of an interrupted simulation from its checkpoint."""

from __future__ import annotations

from pathlib import Path

from fedcore.config.owner import OwnerPolicy
from fedcore.config.run import RunConfig
from fedcore.errors import ConfigError
from server.report.folder import CHECKPOINT, clear
from server.rounds.checkpointing.run_identity import check_same, identity_of
from server.simulation.checkpoint import Checkpoint, read_checkpoint
from server.simulation.checkpointer import FAILED


def open_checkpoint(folder: Path, run: RunConfig, owner: OwnerPolicy) -> Checkpoint:
    """Returns the run's checkpoint, and clears ``folder`` of files that will be written again.

    Args:
        folder: Folder of the run, locked by this process.
        run: Current configuration of the run.
        owner: Current policy that virtual clients comply with.

    Raises:
        ConfigError: there is no checkpoint, or it is of another run. Nothing was removed.
        DataError: the checkpoint is damaged. Nothing was removed.
    """
    path = folder / CHECKPOINT
    if not path.is_file():
        raise ConfigError(
            f"{folder}: this run was stopped before its first checkpoint. Nothing was run; start "
            "it again without --resume."
        )
    checkpoint = read_checkpoint(path)
    check_same(path, checkpoint.identity, identity_of(run, owner))
    clear(folder, keep=(CHECKPOINT, FAILED))
    return checkpoint
