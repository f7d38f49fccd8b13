"""Quorum of a round: enough updates, and enough clients with budget left for another round."""

from __future__ import annotations

from fedcore.errors import RoundFailed
from fedcore.observability.words import counted
from server.rounds.cohort import quorum_of
from server.rounds.inbound import Tally


def check_quorum(tally: Tally, quorum: float, cohort: int, number: int, *, others: int = 0) -> None:
    """Fails a round with too few updates; clients that declined for their budget do not count.

    Sets ``tally.over``, which ends the run without an error, where the clients with budget left are
    fewer than a quorum of the cohort. Round 1 ends the run only where every client declined.

    Args:
        tally: Replies of the round; ``over`` is set.
        quorum: Share of a cohort whose updates a round needs.
        cohort: Number of updates that suffice.
        number: Number of the round, from 1.
        others: Clients that were not asked and may have budget left.

    Raises:
        RoundFailed: clients failed for different reasons, or did not reply.
        FedcoreError: every client replied, and all failures are of this kind.
    """
    willing = tally.selected - tally.declined
    needed = quorum_of(quorum, min(willing, cohort))
    whole = quorum_of(quorum, min(tally.selected, cohort))
    first, left = number == 1, willing + others
    tally.over = tally.all_declined if first else bool(tally.declined and left < whole)
    if tally.over or tally.updates >= needed:
        return
    silent = willing - tally.updates - tally.failed
    reasons = "; ".join(one.rstrip(".") for one in tally.reasons[:3]) or "no reason was given"
    kind = tally.kinds.pop() if len(tally.kinds) == 1 and not silent else RoundFailed
    raise kind(
        f"round {number}: {tally.updates} of {counted(willing, 'client')} sent an update, and "
        f"federation.quorum = {quorum:g} needs {needed} ({tally.failed} failed, {silent} silent "
        "at the deadline). The round was dropped, and the rounds before it are kept; check the "
        f"clients, and continue with --resume (in Python resume=True). First: {reasons}."
    )
