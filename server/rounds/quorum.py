"""Whether enough clients answered a round, and whether enough have a budget for another."""

from __future__ import annotations

import math

from fedcore.errors import RoundFailed
from fedcore.observability.words import counted
from server.rounds.inbound import Tally

_ROUNDING = 1e-9  # 0.55 times 20 is a little more than 11 in floating point


def check_quorum(tally: Tally, quorum: float, cohort: int, number: int, *, others: int = 0) -> None:
    """Fails a round that too few clients answered; those whose budget is spent do not count.

    Where those whose budget is not spent cannot make up a quorum of the cohort, however many of
    them answered, it is the end of the run and no failure: ``tally.over`` says so.

    Args:
        tally: Of the round.
        quorum: The share of a cohort whose updates a round needs.
        cohort: Updates that are enough.
        number: Of the round, from 1; its first one ends no run, but where all declined.
        others: Clients that were not asked, and whose budget may not be spent.

    Raises:
        RoundFailed: clients failed for different reasons, or were silent.
        FedcoreError: of the kind that every client failed with, where it is one kind.
    """
    willing = tally.asked - tally.declined
    needed, whole = _of(quorum, min(willing, cohort)), _of(quorum, min(tally.asked, cohort))
    first, left = number == 1, willing + others
    tally.over = tally.all_declined if first else bool(tally.declined and left < whole)
    if tally.over or tally.updates >= needed:
        return
    silent = willing - tally.updates - tally.failed
    reasons = "; ".join(tally.reasons[:3]) or "no reason was given"
    kind = tally.kinds.pop() if len(tally.kinds) == 1 and not silent else RoundFailed
    raise kind(
        f"round {number}: {tally.updates} of {counted(willing, 'client')} sent an update, and "
        f"federation.quorum = {quorum:g} needs {needed} ({tally.failed} failed, {silent} silent at "
        "the deadline). The round was dropped, and what came before it is kept: see to the "
        f"clients, and go on with --resume. First: {reasons}"
    )


def _of(quorum: float, clients: int) -> int:
    """The least whole number of clients that is the quorum's share of them."""
    return math.ceil(quorum * clients - _ROUNDING)
