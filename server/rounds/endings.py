"""End of a round: notes on clipped and failed updates, and whether the run ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedcore.errors import BudgetExhausted
from fedcore.observability.words import counted
from server.records import RoundRecord
from server.rounds.aggregation.norm_bound import MIN_UPDATES, NormBound
from server.rounds.checkpointing.progress import Progress
from server.rounds.client_privacy.mechanism import allows
from server.rounds.inbound import Tally

if TYPE_CHECKING:
    from server.rounds.federation import Federation


def announce(
    federation: Federation,
    progress: Progress,
    records: Sequence[RoundRecord],
    tally: Tally,
    bound: NormBound | None,
) -> None:
    """Reports clipped updates, too few updates for a bound, and a record number of failures.

    Failures are reported only where they exceed those of every earlier round: the same clients tend
    to fail again. That a round has too few updates to bound one is reported for the first such
    round.
    """
    said_before = bool(records) and 0 < records[-1].updates < MIN_UPDATES
    if bound is not None and bound.is_undetermined(tally.updates) and not said_before:
        federation.on_note(
            f"WARNING: round {progress.round + 1}: {counted(tally.updates, 'update')}, which "
            f'federation.max_update_norm = "adaptive" does not bound: it needs {MIN_UPDATES} '
            "updates in a round to estimate a usual norm, and no round so far had that many. "
            "Updates are aggregated without a bound; set max_update_norm to a number, or use more "
            "devices."
        )
    if bound is not None and tally.clipped:
        named = [(federation.peers.name(node), length) for node, length in tally.clipped]
        federation.on_note(bound.note(progress.round + 1, named))
    if tally.failed <= progress.most_failed:
        return
    advice = federation.checkpointer.advice(progress, tally.reasons)
    federation.on_note(
        f"round {progress.round + 1}: {tally.failed} of {counted(tally.selected, 'client')} "
        "failed. First: "
        f"{' '.join([tally.reasons[0], *advice])}"
    )


def is_over(federation: Federation, progress: Progress) -> bool:
    """Whether the run ends with the round that has just completed; notes an early end.

    Ends it after the last planned round, when the client-level budget allows no further round, and
    when no round improved on the best for ``federation.patience`` rounds.
    """
    settings = federation.run.federation
    if progress.round >= settings.rounds:
        return True
    protection, following = progress.protection, progress.round + 1
    if protection is not None and not allows(federation.run, protection, rounds=following):
        federation.on_note(
            f"Ended before round {following}: it would raise the client-level epsilon above "
            f"privacy.client.max_epsilon = {federation.run.privacy.client.max_epsilon:g}."
        )
        return True
    if not settings.patience or progress.round - progress.best_round < settings.patience:
        return False
    federation.on_note(
        f"Stopped after round {progress.round}: no round improved on round {progress.best_round} "
        f"for federation.patience = {counted(settings.patience, 'round')}."
    )
    return True


def end_early(federation: Federation, number: int, tally: Tally) -> None:
    """Reports that the run ends because privacy budgets are spent.

    Raises:
        BudgetExhausted: it is round 1, so nothing was trained.
    """
    if number == 1:
        who = "the client" if tally.declined == 1 else f"all {tally.declined} clients"
        raise BudgetExhausted(
            f"round 1: {who} declined. Nothing was trained; {_remedy(tally)}. Last: {tally.spent}"
        )
    whose = f"{tally.declined} of {counted(tally.selected, 'client')} asked"
    if tally.all_declined:
        whose = f"all {tally.selected} clients asked" if tally.selected > 1 else "the client asked"
    owners = f" ({tally.owners} of them: the owner's budget)" if tally.owners else ""
    federation.on_note(
        f"Ended before round {number}: the privacy budget of {whose} is spent{owners}."
    )


def _remedy(tally: Tally) -> str:
    if not tally.owners:
        return "raise privacy.max_epsilon or privacy.noise_multiplier, or use fewer client.epochs"
    spent = "of all" if tally.owners == tally.declined else f"of {tally.owners} of them"
    return (
        f"the budgets {spent} that owners allow over all runs are spent, which "
        "privacy.max_epsilon of this run does not change: use other devices, or have the owners "
        "raise their budgets"
    )
