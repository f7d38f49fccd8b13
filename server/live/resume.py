"""Whether a run over devices begins, goes on, or is refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedcore.config.owner import OPEN_POLICY
from fedcore.config.run import Finetune, RunConfig
from fedcore.errors import ConfigError
from server.live.journal.head import is_begun
from server.live.journal.journal import Journal, Reached, create, nothing, reopen
from server.report.folder import JOURNAL_FOLDER, clear, held, is_complete, mark_again, open_folder
from server.rounds.run_identity import check_same, identity_of
from server.unfinished import drop_all, refuse_to_drop_simulated

AFTER_ROUNDS = (
    *("compression.", "release.", "serving."),
    *(f"finetune.{name}" for name in Finetune.model_fields if name != "holdout"),
)
"""Settings that nothing depends on before the rounds are over; what is held out judges them."""
STEPS = "steps"
"""Folder of what the steps after the rounds have come to so far."""


class Complete(Exception):
    """A run that is to be gone on with, and of which nothing is left to be done; says so."""


def has_journal(run: RunConfig, runs: Path) -> bool:
    """Whether a run of this name was begun below ``runs``, and may have to go on."""
    return is_begun(runs / run.name / JOURNAL_FOLDER)


@contextmanager
def open_run(
    run: RunConfig, runs: Path, *, resume: bool, fresh: bool, reached: Reached = nothing
) -> Iterator[tuple[Path, Journal]]:
    """The folder ``runs/<name>`` and the journal in it, which no other process has meanwhile.

    Args:
        run: The run as it is asked for now.
        runs: Where its folder is.
        resume: Go on with a run that did not end; begin one where there is none.
        fresh: Begin one, whatever there is.
        reached: Hears of the journal's points.

    Raises:
        Complete: it did end, and was to be resumed.
        ConfigError: a run did not end, and neither is asked for; it was another run; or it is
            still going on.
        DataError: its journal is damaged, and nothing is left to mend it from.
    """
    folder = runs / run.name
    if not fresh and has_journal(run, runs) and (resume or not is_complete(folder)):
        with held(folder):
            found = _unfinished(folder, run, resume=resume, reached=reached)
            if found is not None:
                try:
                    mark_again(folder, run)  # its journal tells whose folder it is
                    # Steps of rounds that are not over are those of a run that a backup replaced.
                    clear(
                        folder, keep=(JOURNAL_FOLDER, STEPS) if found.ended else (JOURNAL_FOLDER,)
                    )
                    yield folder, found
                finally:
                    found.close()
                return
    with open_folder(run, runs, before=drop_all if fresh else refuse_to_drop_simulated) as folder:
        begun = create(folder / JOURNAL_FOLDER, identity_of(run, OPEN_POLICY), reached=reached)
        try:
            yield folder, begun
        finally:
            begun.close()


def _unfinished(folder: Path, run: RunConfig, *, resume: bool, reached: Reached) -> Journal | None:
    """The journal of a run that goes on; None where one is to be begun."""
    journal = reopen(folder / JOURNAL_FOLDER, reached=reached)
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
                f"{folder}: this run was interrupted after round {journal.round}, and starting it "
                "would drop that. Nothing was run; go on with --resume, or begin again with "
                "--fresh."
            )
        now, free = identity_of(run, OPEN_POLICY), AFTER_ROUNDS if journal.ended else ()
        check_same(folder / JOURNAL_FOLDER, journal.identity, now, free=free)
        if over:
            what = "results are in summary.json" if released else "model is in global.safetensors"
            raise Complete(
                f"{folder}: this run is complete: its {what}. Nothing is left to be done; --fresh "
                "in place of --resume runs it again."
            )
    except BaseException:
        journal.close()
        raise
    return journal
