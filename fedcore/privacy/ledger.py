"""A client's ledger: every charge it ever made in a run, and what they come to.

A client charges its ledger before its update leaves, so a recorded epsilon is never below the true
one, whatever happens in between.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from flwr.app import ConfigRecord, Context

from fedcore.config import Privacy
from fedcore.errors import BudgetExhausted, PrivacyError
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


def charge(ledger: Ledger, new: Charge, privacy: Privacy, *, client: str) -> Ledger:
    """The ledger with one more charge.

    Raises:
        BudgetExhausted: it would pass ``privacy.max_epsilon``; nothing may be trained then.
    """
    after = Ledger((*ledger.charges, new))
    spent, needed = ledger.epsilon(privacy), after.epsilon(privacy)
    if needed > privacy.max_epsilon:
        raise BudgetExhausted(
            f"round {new.round}: client {client!r} has spent epsilon {spent:.2f} of "
            f"{privacy.max_epsilon:g} at delta {privacy.target_delta:g}, and this round would take "
            f"it to {needed:.2f}. It declined, and takes no further part unless its budget is "
            "raised."
        )
    return after


def read_ledger(context: Context) -> Ledger:
    """The ledger in a node's own state, which never leaves the node."""
    record = context.state.config_records.get(_RECORD)
    if record is None:
        return Ledger()
    try:
        return Ledger(tuple(Charge(**entry) for entry in json.loads(str(record[_KEY]))))
    except (KeyError, TypeError, ValueError) as error:
        raise PrivacyError(
            f"ledger: the recorded charges cannot be read ({error}). What was spent is unknown, so "
            "nothing was trained; restore the ledger from a backup."
        ) from None


def write_ledger(context: Context, ledger: Ledger) -> None:
    """Puts the ledger into the node's own state."""
    entries = [asdict(entry) for entry in ledger.charges]
    context.state[_RECORD] = ConfigRecord({_KEY: json.dumps(entries)})
