"""A client's ledger: every charge it ever made in a run, and what they come to.

A run's budget holds for its own charges, an owner's for those of all runs on the same data.

A client charges its ledger before its update leaves, so a recorded epsilon is never below the true
one, whatever happens in between.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from flwr.app import ConfigRecord, Context, RecordDict

from fedcore.config import Privacy
from fedcore.errors import BudgetExhausted, PrivacyError
from fedcore.owner import OPEN_POLICY, OwnerPolicy
from fedcore.privacy.accounting import Charge, epsilon_of

_RECORD, _KEY = "fedcore.ledger", "charges"


@dataclass(frozen=True)
class Ledger:
    """Charges in the order in which they were made."""

    charges: tuple[Charge, ...] = ()

    def epsilon(self, privacy: Privacy) -> float:
        """What all charges together have spent."""
        return epsilon_of(
            self.charges, target_delta=privacy.target_delta, accountant=privacy.accountant
        )


@dataclass(frozen=True)
class OtherRuns:
    """What other runs have spent on the same data: an owner's budget covers them, too."""

    charges: tuple[Charge, ...] = ()
    target_delta: float = 1.0
    """The least delta that anything on these data was counted at."""


NO_OTHER_RUNS = OtherRuns()


def charge(
    ledger: Ledger,
    new: Charge,
    privacy: Privacy,
    *,
    client: str,
    owner: OwnerPolicy = OPEN_POLICY,
    others: OtherRuns = NO_OTHER_RUNS,
) -> Ledger:
    """The ledger with one more charge.

    Guarantee:
        What all runs together have spent on these data stays within ``owner.max_epsilon``, at
        ``owner.target_delta``, or, where the owner sets none, at the least delta of any run. All
        charges are composed by one accountant, whatever the runs are called.

    Args:
        ledger: Of this run.
        new: What the next training spends.
        privacy: Of this run.
        client: Whose ledger it is.
        owner: What the owner allows, over all runs.
        others: What other runs have spent on the same data.

    Raises:
        BudgetExhausted: it would pass ``privacy.max_epsilon`` in this run, or the owner's over all
            of them; nothing may be trained then.
    """
    after = Ledger((*ledger.charges, new))
    _check(ledger, after, privacy, f"round {new.round}: client {client!r} has spent", "")
    if owner.max_epsilon is not None:
        delta = owner.target_delta or min(privacy.target_delta, others.target_delta)
        _check(
            Ledger((*others.charges, *ledger.charges)),
            Ledger((*others.charges, *after.charges)),
            privacy.model_copy(update={"max_epsilon": owner.max_epsilon, "target_delta": delta}),
            f"round {new.round}: over all runs client {client!r} has spent",
            " that its owner allows",
        )
    return after


def _check(before: Ledger, after: Ledger, privacy: Privacy, who: str, whose: str) -> None:
    spent, needed = before.epsilon(privacy), after.epsilon(privacy)
    if needed > privacy.max_epsilon:
        raise BudgetExhausted(
            f"{who} epsilon {spent:.2f} of {privacy.max_epsilon:g}{whose} at delta "
            f"{privacy.target_delta:g}, and this round would take it to {needed:.2f}. It declined, "
            "and takes no further part unless its budget is raised."
        )


def read_ledger(context: Context) -> Ledger:
    """The ledger in a node's own state, which never leaves the node."""
    return ledger_in(context.state)


def write_ledger(context: Context, ledger: Ledger) -> None:
    """Puts the ledger into the node's own state."""
    put_ledger(context.state, ledger)


def ledger_in(state: RecordDict) -> Ledger:
    """The ledger in a state, an empty one where nothing was charged.

    Raises:
        PrivacyError: it cannot be read.
    """
    record = state.config_records.get(_RECORD)
    if record is None:
        return Ledger()
    try:
        return Ledger(tuple(Charge(**entry) for entry in json.loads(str(record[_KEY]))))
    except (KeyError, TypeError, ValueError) as error:
        raise PrivacyError(
            f"ledger: the recorded charges cannot be read ({error}). What was spent is unknown, so "
            "nothing was trained; restore the ledger from a backup."
        ) from None


def put_ledger(state: RecordDict, ledger: Ledger) -> None:
    """Puts a ledger into a state, in place of the one before."""
    entries = [asdict(entry) for entry in ledger.charges]
    state[_RECORD] = ConfigRecord({_KEY: json.dumps(entries)})
