"""A client's privacy ledger: all charges of a run, their total epsilon, and the budget checks.

A run's budget limits the charges of that run, an owner's budget those of all runs that may have
used the same data.

A client charges its ledger before it sends an update, so a recorded epsilon is never below the true
one, whatever happens in between.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

from flwr.app import ConfigRecord, Context, RecordDict

from fedcore.config.owner import OPEN_POLICY, OwnerPolicy
from fedcore.config.run import Privacy
from fedcore.errors import BudgetExhausted, LedgerFull, OwnersBudgetExhausted, PrivacyError
from fedcore.observability.words import counted, epsilon_text
from fedcore.privacy.accounting import Charge, epsilon_of

_RECORD, _KEY = "fedcore.ledger", "charges"
_MAX_ROUNDS = 1 << 16
"""Upper limit of the search for rounds that fit."""
_NEAR_ROUNDS, _MAX_STEPS = 16, 3000
"""Within this many rounds of a spent budget, and up to this many steps, PRV accounting also counts
what fits; it takes half a second for so many steps, and memory for more. Earlier, Renyi accounting,
which is instant, gives an estimate, mostly some percent below the PRV count."""


@dataclass(frozen=True)
class Ledger:
    """A run's charges, in the order in which they were made."""

    charges: tuple[Charge, ...] = ()

    def epsilon(self, privacy: Privacy) -> float:
        """Returns the epsilon that all charges together have spent."""
        return epsilon_of(
            self.charges, target_delta=privacy.target_delta, accountant=privacy.accountant
        )


@dataclass(frozen=True)
class OtherRuns:
    """Charges of other runs on the same data, which an owner's budget also covers."""

    charges: tuple[Charge, ...] = ()
    target_delta: float = 1.0
    """Smallest delta at which any run on these data was counted."""
    max_epsilon: float | None = None
    """The owner's budget for these data, where it differs from the device's."""
    max_charges: int | None = None
    """Maximum number of this run's charges, given those of all other runs on any data; None for no
    limit."""


NO_OTHER_RUNS = OtherRuns()
FULL = (
    "A ledger never drops charges, so nothing was charged or trained; a server that caused so "
    "many may be hostile. To let this device continue, lower each max_epsilon in the owner's "
    "file by what `fedcore privacy show` reports as spent, keep this folder, pass an empty one "
    "with --state, and remove ledger.mark and ledger.count."
)
"""An owner's options when a ledger is full, for error messages."""


@dataclass(frozen=True)
class RemainingRounds:
    """Number of further rounds that fit into a budget."""

    rounds: int
    exact: bool
    """False for an estimate, where exact counting would take too long."""

    def __str__(self) -> str:
        return f"{'' if self.exact else 'about '}{counted(self.rounds, 'more round')}"


def charge(
    ledger: Ledger,
    new: Charge,
    privacy: Privacy,
    *,
    client: str,
    owner: OwnerPolicy = OPEN_POLICY,
    others: OtherRuns = NO_OTHER_RUNS,
) -> Ledger:
    """Returns the ledger with one more charge.

    Guarantee:
        The total of all runs on these data stays within ``owner.max_epsilon``, at
        ``owner.target_delta`` or, where the owner sets none, at the smallest delta of any run. A
        single accountant composes all charges, whatever the runs are called.

    Args:
        ledger: This run's ledger.
        new: The next training's charge.
        privacy: This run's privacy settings.
        client: Name of the ledger's client.
        owner: The owner's limits, over all runs.
        others: Charges of other runs on the same data.

    Raises:
        LedgerFull: This run has reached the maximum number of charges.
        BudgetExhausted: The charge would exceed ``privacy.max_epsilon`` in this run; the client
            must not train.
        OwnersBudgetExhausted: The charge would exceed the owner's budget over all runs; the client
            must not train.
    """
    if others.max_charges is not None and len(ledger.charges) >= others.max_charges:
        raise LedgerFull(
            f"round {new.round}: client {client!r} has {counted(len(ledger.charges), 'charge')} "
            f"of this run in its ledger, the limit is {others.max_charges} beside those of all "
            f"other runs. {FULL}"
        )
    after = Ledger((*ledger.charges, new))
    whole = owners_budget(privacy, owner, others)
    if whole is not None:
        _check(
            Ledger((*others.charges, *ledger.charges)),
            Ledger((*others.charges, *after.charges)),
            whole,
            f"round {new.round}: over all runs, client {client!r} has spent",
            kind=OwnersBudgetExhausted,
        )
    # The run's budget comes second: if both are exceeded, raising it would not help.
    _check(ledger, after, privacy, f"round {new.round}: client {client!r} has spent")
    return after


def owners_budget(privacy: Privacy, owner: OwnerPolicy, others: OtherRuns) -> Privacy | None:
    """Returns the budget over all runs with its delta; None where the owner sets none."""
    limits = [one for one in (owner.max_epsilon, others.max_epsilon) if one is not None]
    if not limits:
        return None
    delta = owner.target_delta or min(privacy.target_delta, others.target_delta)
    return privacy.model_copy(update={"max_epsilon": min(limits), "target_delta": delta})


def remaining_rounds(
    ledger: Ledger,
    privacy: Privacy,
    *,
    owner: OwnerPolicy = OPEN_POLICY,
    others: OtherRuns = NO_OTHER_RUNS,
) -> RemainingRounds | None:
    """Returns how many more rounds like the latest fit into all budgets; None before the first."""
    new = next((one for one in reversed(ledger.charges) if not one.evaluates), None)
    if new is None:
        return None
    found = remaining_charges(ledger.charges, new, privacy)
    whole = owners_budget(privacy, owner, others)
    if whole is not None:
        over_all = remaining_charges((*others.charges, *ledger.charges), new, whole)
        found = min(found, over_all, key=lambda one: one.rounds)
    return found


def remaining_charges(charges: Sequence[Charge], new: Charge, privacy: Privacy) -> RemainingRounds:
    """Returns how many more charges like ``new`` fit into ``privacy.max_epsilon``."""
    if not new.steps:
        return RemainingRounds(_MAX_ROUNDS, exact=False)
    # Merged by mechanism: few, however many charges.
    made_by: dict[tuple[float, float, str], int] = {}
    for one in charges:
        mechanism = (one.noise_multiplier, one.sample_rate, one.part)
        made_by[mechanism] = made_by.get(mechanism, 0) + one.steps
    made = -(-made_by.pop((new.noise_multiplier, new.sample_rate, new.part), 0) // new.steps)
    other = tuple(
        Charge(0, noise, rate, steps, part) for (noise, rate, part), steps in made_by.items()
    )
    most = _most(other, replace(new, round=0), privacy.model_copy(update={"accountant": "rdp"}))
    exact = privacy.accountant == "rdp" and most < _MAX_ROUNDS
    if not exact and most - made <= _NEAR_ROUNDS and most * new.steps <= _MAX_STEPS:
        most, exact = _most(other, replace(new, round=0), privacy, near=most), True
    return RemainingRounds(max(0, most - made), exact)


def _most(other: tuple[Charge, ...], new: Charge, privacy: Privacy, near: int | None = None) -> int:
    """Returns how many rounds like ``new`` fit in addition to ``other``; ``near`` is a guess."""

    def fits(rounds: int) -> bool:
        alike = replace(new, steps=new.steps * rounds)
        return Ledger((*other, alike)).epsilon(privacy) <= privacy.max_epsilon

    if near is None:
        return _last(fits, 0, _MAX_ROUNDS + 1)
    if not fits(near):
        return _last(fits, 0, near)
    low, high = near, near + 2
    while fits(high):
        low, high = high, 2 * high
    return _last(fits, low, high)


def _last(fits: Callable[[int], bool], low: int, high: int) -> int:
    """Returns the largest number below ``high`` that fits, or ``low`` where none does."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _check(
    before: Ledger,
    after: Ledger,
    privacy: Privacy,
    who: str,
    *,
    kind: type[BudgetExhausted] = BudgetExhausted,
) -> None:
    spent, needed = before.epsilon(privacy), after.epsilon(privacy)
    if needed > privacy.max_epsilon:
        whose = " that its owner allows" if kind is OwnersBudgetExhausted else ""
        raise kind(
            f"{who} epsilon {epsilon_text(spent)} of {privacy.max_epsilon:g}{whose} at delta "
            f"{privacy.target_delta:g}, and this round would raise that to "
            f"{epsilon_text(needed)}. It declined, and will not take part again unless its "
            "budget is raised."
        )


def read_ledger(context: Context) -> Ledger:
    """Returns the ledger in a node's local state, which never leaves the node."""
    return ledger_in(context.state)


def write_ledger(context: Context, ledger: Ledger) -> None:
    """Writes the ledger to the node's local state."""
    put_ledger(context.state, ledger)


def ledger_in(state: RecordDict) -> Ledger:
    """Returns the ledger in a state; an empty one if there are no charges.

    Raises:
        PrivacyError: The recorded ledger cannot be read.
    """
    record = state.config_records.get(_RECORD)
    if record is None:
        return Ledger()
    try:
        return Ledger(tuple(Charge(**entry) for entry in json.loads(str(record[_KEY]))))
    except (KeyError, TypeError, ValueError) as error:
        raise PrivacyError(
            f"ledger: the recorded charges cannot be read ({error}). The epsilon spent is "
            "unknown, so nothing was trained; restore the ledger from a backup."
        ) from None


def put_ledger(state: RecordDict, ledger: Ledger) -> None:
    """Writes a ledger to a state, in place of the previous one."""
    entries = [asdict(entry) for entry in ledger.charges]
    state[_RECORD] = ConfigRecord({_KEY: json.dumps(entries)})
