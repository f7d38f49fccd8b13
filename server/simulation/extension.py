"""Extension of a simulation by more rounds: what it needs for the bits of a longer run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedcore.config.in_round import planned_epochs
from fedcore.config.run import RunConfig
from fedcore.errors import ConfigError
from server.rounds.checkpointing.progress import Progress
from server.rounds.strategies.own import names_user_strategy

ROUNDS = "federation.rounds"
"""The only setting that an extension changes."""


def rounds_of(identity: Mapping[str, Any]) -> int:
    """Returns the number of rounds that a run of this identity was to have."""
    return int(identity["run"]["federation"]["rounds"])


def extended(where: Path, run: RunConfig, progress: Progress, *, before: int) -> Progress:
    """Returns the progress from which a run continues with another number of rounds.

    Guarantee:
        The remaining rounds give the bits of a run that had this number of rounds from the start.

    Args:
        where: The checkpoint, for error messages.
        run: The run, with its new number of rounds.
        progress: State after its last round.
        before: Number of rounds that it had so far.

    Raises:
        ConfigError: the bits would differ, or the run cannot continue.
    """
    rounds, done = run.federation.rounds, progress.round
    if rounds <= done:
        raise ConfigError(
            f"{where}: {ROUNDS} = {rounds}, but round {done} of this run is complete. Nothing "
            "was run; ask for more rounds, or start over with --fresh (in "
            "Python fresh=True)."
        )
    for reason in _depends_on_total(run, progress, before):
        raise ConfigError(
            f"{where}: this run of {before} rounds cannot continue to {ROUNDS} = {rounds} with "
            f"the results of a run of {rounds} from the start: {reason}. Nothing was run; resume "
            f"it with {before}, or start a run of {rounds} over with --fresh (in "
            "Python fresh=True)."
        )
    return replace(progress, over=False)


def _depends_on_total(run: RunConfig, progress: Progress, before: int) -> Iterator[str]:
    """Yields the reasons why earlier rounds would have been others in the longer run."""
    client, privacy, done = run.client, run.privacy, progress.round
    for name in client.schedule.names:
        if getattr(client.schedule, name).kind == "cosine":
            yield f"client.schedule.{name} is a cosine over all rounds"
    if run.client_private:
        yield "client-level privacy plans its noise and its budget for all rounds"
    if run.private:
        automatic = privacy.noise_multiplier == "auto"
        if automatic and privacy.participations is None:
            yield (
                "privacy.noise_multiplier = 'auto' without privacy.participations plans noise for "
                "all rounds"
            )
        shorter = run.model_copy(
            update={"federation": run.federation.model_copy(update={"rounds": before})}
        )
        planned = privacy.participations or before
        if automatic and planned_epochs(run, planned) != planned_epochs(shorter, planned):
            yield "client.schedule.epochs has more epochs in later rounds than noise is planned for"
    if names_user_strategy(run.federation.strategy):
        yield (
            f"federation.strategy = {run.federation.strategy!r} may use the number of rounds, as "
            "an algorithm of your own may"
        )
    due = _tuned_after(run, done, progress.best_round)
    if progress.over and done == before and due is not None:
        yield (
            f"{due} fine-tunes the model of round {done} for the next round, which it was not "
            "after the last round"
        )
    patience = run.federation.patience
    stopped = bool(patience) and done - progress.best_round >= patience
    if progress.over and (done < before or stopped):
        yield f"it ended after round {done}, for its patience or its budgets, and would end again"


def _tuned_after(run: RunConfig, number: int, best_round: int) -> str | None:
    """Returns the setting that may fine-tune the global model after a round; None if none does."""
    every, stall = run.finetune.every, run.finetune.after_stall
    if not run.finetune.epochs:
        return None
    if every is not None and number % every == 0:
        return f"finetune.every = {every}"
    if stall is not None and number - best_round >= stall:
        return f"finetune.after_stall = {stall}"
    return None
