"""What a round's end means for the run, and what is said of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedcore.errors import BudgetExhausted
from server.client_privacy import allows
from server.inbound import Tally
from server.norms import NormBound
from server.progress import Progress

if TYPE_CHECKING:
    from server.rounds import Federation


def announce(
    federation: Federation, progress: Progress, tally: Tally, bound: NormBound | None
) -> None:
    """Says whose updates were clipped, and that clients failed, if more did than ever before.

    Not every round: a client that fails tends to fail again.
    """
    if bound is not None and tally.clipped:
        named = [(federation.peers.name(node), length) for node, length in tally.clipped]
        federation.on_note(bound.note(progress.round + 1, named))
    if tally.failed <= progress.most_failed:
        return
    advice = federation.keeper.failures(progress, tally.reasons)
    federation.on_note(
        f"round {progress.round + 1}: {tally.failed} of {tally.asked} clients failed. First: "
        f"{' '.join([tally.reasons[0], *advice])}"
    )


def is_over(federation: Federation, progress: Progress) -> bool:
    """Whether the round that ended was the last; says so where more were planned."""
    settings = federation.run.federation
    if progress.round >= settings.rounds:
        return True
    protection, following = progress.protection, progress.round + 1
    if protection is not None and not allows(federation.run, protection, rounds=following):
        federation.on_note(
            f"Ended before round {following}: it would take the client-level epsilon past "
            f"privacy.client.max_epsilon = {federation.run.privacy.client.max_epsilon:g}."
        )
        return True
    if not settings.patience or progress.round - progress.best_round < settings.patience:
        return False
    federation.on_note(
        f"Stopped after round {progress.round}: none was better than round {progress.best_round} "
        f"for federation.patience = {settings.patience} rounds."
    )
    return True


def end_early(federation: Federation, number: int, tally: Tally) -> None:
    """Says that budgets are spent; that is an error where no client ever took part."""
    if number == 1:
        raise BudgetExhausted(
            f"round 1: all {tally.declined} clients declined. Nothing was trained; raise "
            "privacy.max_epsilon or privacy.noise_multiplier, or take fewer client.epochs. Last: "
            f"{tally.spent}"
        )
    spent = "all" if tally.all_declined else f"{tally.declined} of"
    federation.on_note(
        f"Ended before round {number}: the privacy budget of {spent} {tally.asked} clients asked "
        "is spent."
    )
