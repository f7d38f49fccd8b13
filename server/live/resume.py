"""Decides whether a deployment starts a new run, resumes an unfinished one, or is rejected."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedcore.config.owner import OPEN_POLICY
from fedcore.config.run import RunConfig
from fedcore.errors import ConfigError
from server.live.journal.head import is_begun
from server.live.journal.journal import Journal, OnPoint, create, ignore_point, reopen
from server.report.folder import (
    JOURNAL_FOLDER,
    clear,
    is_complete,
    locked,
    open_folder,
    restore_mark,
)
from server.rounds.checkpointing.run_identity import check_same, free_after_rounds, identity_of
from server.unfinished import allow_drop, require_no_simulated_progress

STEPS = "steps"
"""Subfolder for the results of completed steps after the rounds."""


class RunComplete(Exception):
    """The run to resume is already complete; the message explains where its results are."""


def has_journal(run: RunConfig, runs: Path) -> bool:
    """Whether ``runs`` contains a journal of a run of this name, which can perhaps be resumed."""
    return is_begun(runs / run.name / JOURNAL_FOLDER)


@contextmanager
def open_run(
    run: RunConfig, runs: Path, *, resume: bool, fresh: bool, on_point: OnPoint = ignore_point
) -> Iterator[tuple[Path, Journal]]:
    """Opens the folder ``runs/<name>`` and its journal, for exclusive use until exit.

    Args:
        run: The run's configuration.
        runs: Folder that contains one folder per run.
        resume: Resume an unfinished run; start a new one if there is none.
        fresh: Start a new run, and drop an unfinished one.
        on_point: Called at each of the journal's `POINTS`.

    Raises:
        RunComplete: ``resume`` is set, and the run is complete.
        ConfigError: there is an unfinished run, and neither ``resume`` nor ``fresh`` is set; the
            run to resume has other settings; or another process is running it.
        DataError: the journal is damaged, and no copy is left to repair it from.
    """
    folder = runs / run.name
    if not fresh and has_journal(run, runs) and (resume or not is_complete(folder)):
        with locked(folder):
            found = _unfinished(folder, run, resume=resume, on_point=on_point)
            if found is not None:
                try:
                    restore_mark(folder, run)  # the journal proves that the folder is this run's
                    # Steps of unfinished rounds are left over from before a backup was restored.
                    clear(
                        folder, keep=(JOURNAL_FOLDER, STEPS) if found.ended else (JOURNAL_FOLDER,)
                    )
                    yield folder, found
                finally:
                    found.close()
                return
    with open_folder(
        run, runs, before=allow_drop if fresh else require_no_simulated_progress
    ) as folder:
        begun = create(folder / JOURNAL_FOLDER, identity_of(run, OPEN_POLICY), on_point=on_point)
        try:
            yield folder, begun
        finally:
            begun.close()


def _unfinished(folder: Path, run: RunConfig, *, resume: bool, on_point: OnPoint) -> Journal | None:
    """Opens the journal of the run to resume; returns None if a new run must start."""
    journal = reopen(folder / JOURNAL_FOLDER, on_point=on_point)
    if journal is None:
        return None
    try:
        released = is_complete(folder)
        over = released or (journal.ended and run.release.repository is None)
        if over and not resume:
            journal.close()
            return None
        if not resume:
            raise ConfigError(
                f"{folder}: this run was interrupted after round {journal.round}, and starting "
                "it would discard that. Nothing was run; continue with --resume, or start over "
                "with --fresh."
            )
        now, free = identity_of(run, OPEN_POLICY), free_after_rounds(run) if journal.ended else ()
        check_same(folder / JOURNAL_FOLDER, journal.identity, now, free=free)
        if over:
            what = "results are in summary.json" if released else "model is in global.safetensors"
            raise RunComplete(
                f"{folder}: this run is complete: its {what}. Nothing is left to do; to run it "
                "again, pass --fresh instead of --resume."
            )
    except BaseException:
        journal.close()
        raise
    return journal
