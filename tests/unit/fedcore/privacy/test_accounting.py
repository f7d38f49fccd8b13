from __future__ import annotations

import itertools
from typing import Any

import pytest
from opacus.accountants import RDPAccountant
from opacus.accountants.analysis import rdp

from fedcore.errors import PrivacyError
from fedcore.privacy.accounting import Accountant, Charge, epsilon_of, noise_for

DELTA = 1e-5
ROUNDS = [Charge(number, 1.0, 1 / 16, 16) for number in range(1, 11)]


def epsilon(charges: list[Charge], accountant: Accountant = "rdp") -> float:
    return epsilon_of(charges, target_delta=DELTA, accountant=accountant)


def test_ten_rounds_cost_what_opacus_says_of_all_their_steps() -> None:
    carried = epsilon(ROUNDS)
    assert carried == pytest.approx(6.09, abs=0.01)
    assert epsilon(ROUNDS[:1]) == pytest.approx(2.76, abs=0.01)
    theirs = RDPAccountant()
    for charge in ROUNDS:
        for _ in range(charge.steps):
            theirs.step(noise_multiplier=charge.noise_multiplier, sample_rate=charge.sample_rate)
    assert carried == pytest.approx(theirs.get_epsilon(delta=DELTA), rel=1e-12)


def test_a_step_is_looked_into_once_however_many_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[object] = []
    compute = rdp.compute_rdp

    def counted(**given: Any) -> Any:
        calls.append(given)
        return compute(**given)

    monkeypatch.setattr(rdp, "compute_rdp", counted)
    theirs = RDPAccountant()
    for steps in range(1, 40):
        theirs.history = [(1.0625, 0.0625, steps)]
        found = epsilon([Charge(1, 1.0625, 0.0625, steps)])
        calls_of_ours = len(calls)
        assert found == theirs.get_epsilon(delta=DELTA)
        del calls[calls_of_ours:]
    assert len(calls) == 1


def test_prv_is_tighter_than_rdp() -> None:
    assert epsilon(ROUNDS, "prv") == pytest.approx(5.43, abs=0.02)


def test_mixed_rounds_compose_in_any_order() -> None:
    charges = [Charge(1, 1.0, 0.1, 10), Charge(2, 2.0, 0.5, 4), Charge(3, 1.0, 0.1, 6)]
    theirs = RDPAccountant()
    theirs.history = [(1.0, 0.1, 16), (2.0, 0.5, 4)]
    expected = theirs.get_epsilon(delta=DELTA)
    assert epsilon(charges) == pytest.approx(expected, rel=1e-12)
    assert epsilon(charges[::-1]) == epsilon(charges)


def test_each_round_adds_to_what_was_spent() -> None:
    spent = [epsilon(ROUNDS[:count]) for count in range(11)]
    assert spent[0] == 0.0
    assert all(before < after for before, after in itertools.pairwise(spent))


def test_a_round_without_steps_costs_nothing() -> None:
    assert epsilon([Charge(1, 1.0, 0.5, 0)]) == 0.0
    assert epsilon([*ROUNDS[:1], Charge(2, 3.0, 0.5, 0)]) == epsilon(ROUNDS[:1])


def test_less_noise_more_data_a_step_and_a_smaller_delta_cost_more() -> None:
    base = epsilon([Charge(1, 1.0, 0.1, 10)])
    assert epsilon([Charge(1, 0.9, 0.1, 10)]) > base
    assert epsilon([Charge(1, 1.0, 0.2, 10)]) > base
    stricter = epsilon_of([Charge(1, 1.0, 0.1, 10)], target_delta=1e-7, accountant="rdp")
    assert stricter > base


@pytest.mark.parametrize("max_epsilon", [0.3, 1.0, 8.0])
@pytest.mark.parametrize(
    ("sample_rate", "steps"), [(1.0, 1), (1.0, 40), (0.25, 160), (1 / 64, 1000)]
)
def test_the_noise_keeps_the_budget_and_one_percent_less_does_not(
    max_epsilon: float, sample_rate: float, steps: int
) -> None:
    noise = noise_for(
        max_epsilon=max_epsilon,
        target_delta=DELTA,
        sample_rate=sample_rate,
        steps=steps,
        accountant="rdp",
    )
    assert epsilon([Charge(1, noise, sample_rate, steps)]) <= max_epsilon
    assert epsilon([Charge(1, 0.99 * noise, sample_rate, steps)]) > max_epsilon


def test_prv_keeps_a_budget_below_what_rdp_can_count(recwarn: pytest.WarningsRecorder) -> None:
    asked = {"max_epsilon": 0.1, "target_delta": DELTA, "sample_rate": 1.0, "steps": 1}
    with pytest.raises(
        PrivacyError, match=r"set privacy\.accountant to 'prv', which reaches lower"
    ):
        noise_for(**asked, accountant="rdp")  # type: ignore[arg-type]
    noise = noise_for(**asked, accountant="prv")  # type: ignore[arg-type]
    assert epsilon([Charge(1, noise, 1.0, 1)], "prv") <= 0.1
    assert epsilon([Charge(1, 0.99 * noise, 1.0, 1)], "prv") > 0.1
    assert not recwarn.list


def test_the_noise_holds_when_the_steps_are_spread_over_rounds() -> None:
    noise = noise_for(
        max_epsilon=2.0, target_delta=DELTA, sample_rate=1.0, steps=60, accountant="rdp"
    )
    rounds = [Charge(number, noise, 1.0, 6) for number in range(1, 11)]
    assert 1.95 < epsilon(rounds) <= 2.0


def test_prv_takes_less_noise_for_the_same_budget() -> None:
    asked = {"max_epsilon": 2.0, "target_delta": DELTA, "sample_rate": 0.25, "steps": 100}
    tight = noise_for(**asked, accountant="prv")  # type: ignore[arg-type]
    assert tight < noise_for(**asked, accountant="rdp")  # type: ignore[arg-type]
    assert epsilon([Charge(1, tight, 0.25, 100)], "prv") <= 2.0


def test_a_budget_that_no_noise_keeps_is_refused_with_the_way_out() -> None:
    with pytest.raises(PrivacyError, match=r"max_epsilon = 1e-09 .*allow more epsilon"):
        noise_for(
            max_epsilon=1e-9, target_delta=1e-12, sample_rate=1.0, steps=10**6, accountant="rdp"
        )
