"""Rollback of an unfinished run to an earlier round, for example after a poisoned update.

`roll_back_run` is part of the Python API; ``fedcore server rollback`` calls it.
"""

from __future__ import annotations

import os
from contextlib import closing
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from fedcore.config.run import RunConfig
from fedcore.config.settings import run_with
from fedcore.crypto.roster import check_server_folder
from fedcore.errors import ConfigError, PrivacyError
from server.live.journal.journal import reopen
from server.operator_log import AUDIT, Audit
from server.report.folder import JOURNAL_FOLDER, locked


@dataclass(frozen=True)
class RolledBack:
    """Result of `fedcore.roll_back_run`.

    Example::

        done = fedcore.roll_back_run("churn/run.toml", 7)
        done.round, done.dropped
    """

    round: int
    """Round after which the run will continue."""
    dropped: tuple[int, ...]
    """Rounds that will run again."""
    mended: str = ""
    """Description of damage to the journal that was repaired, in a sentence; empty if none."""


def roll_back_run(
    run: RunConfig | str | PathLike[str],
    round: int,
    *,
    runs: str | PathLike[str] = "runs",
    identity: str | PathLike[str] = "authority/server",
    **settings: Any,
) -> RolledBack:
    """Returns an unfinished run of a server to an earlier round's model, while no server runs.

    First drain or revoke the device that spoilt the later rounds, or it sends the same again.

    Example::

        done = fedcore.roll_back_run("churn/run.toml", 7, identity="authority/server")
        done.dropped  # rounds that will run again once the server resumes

    Args:
        run: The run, or its file.
        round: Round whose model becomes the global one; 0 for the initial model.
        runs: Parent folder of the results.
        identity: The server's folder, whose audit log records the rollback.
        settings: Sections or settings of the run to override.

    Raises:
        ConfigError: there is no such run, a server is running it, it has ended, or that round's
            model is not kept. Nothing was changed.
        PrivacyError: the run has client-level privacy, whose budget the dropped rounds spent.
            Nothing was changed.
        DataError: that round's model is damaged, or there is no such identity. The run is
            unchanged.
    """
    found = run_with(run, settings)
    check_server_folder(Path(identity))
    by = f"uid {os.getuid()}"
    return roll_back(found, Path(runs), round, identity=Path(identity), by=by)


def roll_back(run: RunConfig, runs: Path, number: int, *, identity: Path, by: str) -> RolledBack:
    """Restores the state after round ``number`` of a run that no server is running.

    Args:
        run: The run's configuration.
        runs: Folder that contains one folder per run.
        number: Round whose model becomes the global one; 0 for the initial model.
        identity: The server's folder, whose audit log gets a line before anything changes.
        by: The user, for that line.

    Raises:
        ConfigError: there is no such run, a server is running it, it has ended, or that round's
            model is not kept. Nothing was changed.
        PrivacyError: the run has client-level privacy: the budget that the dropped rounds spent
            must count. Nothing was changed.
        DataError: that round's model is damaged. The run is unchanged.
    """
    folder = runs / run.name
    if not folder.is_dir():
        raise ConfigError(
            f"{folder}: there is no run here. Nothing was changed; pass its parent folder with "
            "--runs."
        )
    with locked(folder):
        journal = reopen(folder / JOURNAL_FOLDER)
        if journal is None or journal.start is None:
            raise ConfigError(f"{folder}: no round of this run is complete. Nothing was changed.")
        with closing(journal), closing(Audit(identity / AUDIT)) as audit:
            kept, last = journal.rounds_kept(), journal.round
            if journal.ended:
                raise ConfigError(
                    f"{folder}: this run is complete, and its results are written. Nothing was "
                    "changed; roll back a published model with `fedcore release rollback`."
                )
            if number not in kept:
                named = " and ".join(map(str, kept))
                raise ConfigError(
                    f"{folder}: the model of round {number} is not kept; the models of rounds "
                    f"{named} are. Nothing was changed; for an earlier one, restore the folder "
                    "from a backup written at that time (`fedcore server backup`)."
                )
            if journal.start.progress.protection is not None:
                raise PrivacyError(
                    f"{folder}: this run protects clients, and each completed round has spent "
                    "some of their epsilon, which a rollback would forget. Nothing was changed; "
                    "start a new run with federation.initial."
                )
            audit.record(by=by, action="rollback", outcome="begun", round=number, run=run.name)
            journal.roll_back(number)
    return RolledBack(number, tuple(range(number + 1, last + 1)), journal.repairs)
