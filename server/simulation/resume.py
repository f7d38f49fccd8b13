"""Resume of an interrupted simulation from its checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fedcore.config.owner import OwnerPolicy
from fedcore.config.run import RunConfig
from fedcore.errors import ConfigError
from fedcore.task.definition import Task
from fedcore.task.model import build_model
from fedcore.updates.pack import layout_of
from server.release.once import PUBLISHED
from server.report.folder import CHECKPOINT, clear, complete, is_complete, mark
from server.rounds.checkpointing.run_identity import check_same, free_after_rounds, identity_of
from server.simulation.checkpoint import Checkpoint, read_checkpoint
from server.simulation.checkpointer import FAILED
from server.simulation.extension import ROUNDS, extended, rounds_of


def open_checkpoint(folder: Path, run: RunConfig, owner: OwnerPolicy, task: Task) -> Checkpoint:
    """Returns the run's checkpoint, and clears ``folder`` of files that will be written again.

    A run whose number of rounds has changed continues with the new one, see `extended`.

    Args:
        folder: Folder of the run, locked by this process.
        run: Current configuration of the run.
        owner: Current policy that virtual clients comply with.
        task: The run's task.

    Raises:
        ConfigError: there is no checkpoint, it is of another run or of an earlier version, or the
            run is complete. Nothing was removed.
        DataError: the checkpoint is damaged. Nothing was removed.
    """
    path = folder / CHECKPOINT
    if not path.is_file():
        if is_complete(folder):
            raise complete(folder)
        raise ConfigError(
            f"{folder}: this run was stopped before its first checkpoint. Nothing was run; start "
            "it again without --resume (in Python resume=True)."
        )
    checkpoint = read_checkpoint(path)
    identity, before = identity_of(run, owner), rounds_of(checkpoint.identity)
    later = free_after_rounds(run) if checkpoint.progress.over else ()
    check_same(path, checkpoint.identity, identity, free=(ROUNDS, *later))
    if before != run.federation.rounds:
        progress = extended(path, run, checkpoint.progress, before=before)
        checkpoint = replace(checkpoint, progress=progress, identity=identity)
    elif is_complete(folder):
        raise complete(folder)
    _check_weights(path, checkpoint, task, run)
    # A complete run that gets more rounds has released its model, and releases another one.
    unreleased = () if is_complete(folder) else (PUBLISHED,)
    clear(folder, keep=(CHECKPOINT, FAILED, *unreleased))
    mark(folder, run)
    return checkpoint


def _check_weights(path: Path, checkpoint: Checkpoint, task: Task, run: RunConfig) -> None:
    """Rejects weights of another number than travel of the task's model."""
    got, expected = (
        checkpoint.progress.weights.size,
        layout_of(build_model(task, run).model).size,
    )
    if got != expected:
        raise ConfigError(
            f"{path}: this checkpoint has {got:,} weights and other numbers of the model, expected "
            f"{expected:,}. An earlier version of fedcore sent other parts of the model, or what "
            "the task imports has changed. Nothing was run or removed; resume it with the version "
            "and files that began it, or start over with --fresh (in Python fresh=True)."
        )
