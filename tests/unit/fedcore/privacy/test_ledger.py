from __future__ import annotations

import itertools
from typing import Literal

import pytest
from flwr.app import ConfigRecord, Context, RecordDict

from fedcore.config.owner import OwnerPolicy
from fedcore.config.run import Privacy
from fedcore.errors import BudgetExhausted, PrivacyError
from fedcore.observability.words import epsilon_text
from fedcore.privacy.accounting import Charge
from fedcore.privacy.ledger import (
    Ledger,
    OtherRuns,
    RemainingRounds,
    charge,
    owners_budget,
    read_ledger,
    remaining_charges,
    remaining_rounds,
    write_ledger,
)

PRIVACY = Privacy(unit="example", max_epsilon=4.0, target_delta=1e-5, accountant="rdp")


def context() -> Context:
    return Context(run_id=1, node_id=2, node_config={}, state=RecordDict(), run_config={})


def rounds(count: int) -> list[Charge]:
    return [Charge(number, 1.0, 1 / 16, 16) for number in range(1, count + 1)]


def test_a_new_node_has_spent_nothing() -> None:
    assert read_ledger(context()) == Ledger()
    assert Ledger().epsilon(PRIVACY) == 0.0


def test_a_ledger_survives_in_the_nodes_state_bit_for_bit() -> None:
    ledger = Ledger((Charge(1, 1.0 / 3.0, 1 / 7, 16), Charge(4, 2.5, 1.0, 1)))
    node = context()
    write_ledger(node, ledger)
    assert read_ledger(node) == ledger


def test_charges_add_up_until_the_budget_is_spent() -> None:
    ledger, spent = Ledger(), [0.0]
    for new in rounds(3):
        ledger = charge(ledger, new, PRIVACY, client="anna")
        spent.append(ledger.epsilon(PRIVACY))
    assert all(before < after for before, after in itertools.pairwise(spent))
    assert 3.0 < spent[-1] <= 4.0
    text = epsilon_text(spent[-1])
    said = rf"round 4: client 'anna' has spent epsilon {text} of 4 at .* It declined"
    with pytest.raises(BudgetExhausted, match=said):
        charge(ledger, rounds(4)[3], PRIVACY, client="anna")


def test_a_charge_that_is_refused_leaves_the_ledger_as_it_was() -> None:
    ledger = Ledger(tuple(rounds(2)))
    with pytest.raises(BudgetExhausted):
        charge(ledger, Charge(3, 0.1, 1.0, 100), PRIVACY, client="anna")
    assert ledger.charges == tuple(rounds(2))


def test_exactly_the_budget_may_be_spent() -> None:
    ledger = Ledger(tuple(rounds(3)))
    exact = PRIVACY.model_copy(update={"max_epsilon": ledger.epsilon(PRIVACY)})
    assert charge(Ledger(tuple(rounds(2))), rounds(3)[2], exact, client="anna") == ledger


def made(
    count: int, privacy: Privacy, owner: OwnerPolicy, others: OtherRuns, like: Charge
) -> tuple[Ledger, int]:
    """A ledger of ``count`` charges, and how many more like them are let through."""
    ledger = Ledger((like,) * count)
    more = 0
    try:
        while more < 200:
            after = charge(ledger, like, privacy, client="a", owner=owner, others=others)
            ledger, more = after, more + 1
    except BudgetExhausted:
        pass
    return Ledger((like,) * count), more


@pytest.mark.parametrize("accountant", ["rdp", "prv"])
@pytest.mark.parametrize(
    ("owner", "others"),
    [
        (OwnerPolicy(), OtherRuns()),
        (OwnerPolicy(max_epsilon=3.0), OtherRuns()),
        (OwnerPolicy(max_epsilon=3.9), OtherRuns((Charge(1, 1.5, 0.1, 40),), 1e-6)),
        (OwnerPolicy(), OtherRuns((Charge(1, 1.0, 1 / 16, 16),), 1e-5, max_epsilon=3.5)),
        (OwnerPolicy(max_epsilon=0.5), OtherRuns()),
    ],
    ids=["the run's", "the owner's", "other runs", "of the data", "none"],
)
def test_the_room_that_is_told_is_what_is_let_through(
    accountant: Literal["rdp", "prv"], owner: OwnerPolicy, others: OtherRuns
) -> None:
    privacy = PRIVACY.model_copy(update={"accountant": accountant})
    ledger, more = made(1, privacy, owner, others, Charge(1, 1.0, 1 / 16, 16))
    assert remaining_rounds(ledger, privacy, owner=owner, others=others) == RemainingRounds(
        more, exact=True
    )
    said = f"{more} more round{'' if more == 1 else 's'}"
    assert str(remaining_rounds(ledger, privacy, owner=owner, others=others)) == said


def test_room_for_many_rounds_is_an_estimate_and_takes_no_time() -> None:
    like = Charge(1, 4.0, 0.01, 100)
    privacy = PRIVACY.model_copy(update={"accountant": "prv", "max_epsilon": 8.0})
    found = remaining_charges((like,) * 3, like, privacy)
    assert not found.exact
    assert str(found) == f"about {found.rounds} more rounds"
    exact = remaining_charges((like,) * 3, like, privacy.model_copy(update={"accountant": "rdp"}))
    assert (exact.rounds, exact.exact) == (found.rounds, True)
    last = Ledger((like,) * (3 + exact.rounds))
    assert last.epsilon(PRIVACY) <= 8.0 < Ledger((*last.charges, like)).epsilon(PRIVACY)


def test_before_the_first_round_nothing_is_told_of_room() -> None:
    assert remaining_rounds(Ledger(), PRIVACY) is None
    assert remaining_charges((), Charge(1, 1.0, 1.0, 0), PRIVACY).exact is False


def test_the_budget_of_the_data_and_the_devices_both_hold() -> None:
    others = OtherRuns(max_epsilon=2.0, target_delta=1e-7)
    whole = owners_budget(PRIVACY, OwnerPolicy(max_epsilon=3.0), others)
    assert whole is not None
    assert (whole.max_epsilon, whole.target_delta) == (2.0, 1e-7)
    assert owners_budget(PRIVACY, OwnerPolicy(), OtherRuns()) is None


@pytest.mark.parametrize(
    "record",
    [
        {"charges": "not json"},
        {"charges": "[1, 2]"},
        {"charges": '[{"round": 1}]'},
        {"charges": '{"round": 1}'},
        {"charges": "7"},
        {"charges": '[{"round": 1, "noise_multiplier": "x", "sample_rate": 1.0, "steps": 1}]'},
        {"charges": '[{"round": 1, "noise_multiplier": 1.0, "sample_rate": 1.0, "steps": -5}]'},
        {"charges": '[{"round": 1, "noise_multiplier": 0.0, "sample_rate": 1.0, "steps": 5}]'},
        {"charges": '[{"round": 1, "noise_multiplier": 1.0, "sample_rate": 7.0, "steps": 5}]'},
        {"other": "[]"},
    ],
)
def test_a_ledger_that_cannot_be_read_stops_training(record: dict[str, str]) -> None:
    node = context()
    node.state["fedcore.ledger"] = ConfigRecord(dict(record))
    with pytest.raises(PrivacyError, match="The epsilon spent is unknown, so nothing was trained"):
        read_ledger(node)
