from __future__ import annotations

import itertools
import math
import time

import pytest
from opacus.accountants import RDPAccountant
from scipy.stats import norm

from fedcore.config.run import Privacy
from fedcore.errors import BudgetExhausted, PrivacyError
from fedcore.privacy import accounting
from fedcore.privacy.accounting import (
    FILTER_ORDERS,
    FILTER_SHARE,
    MAX_NOISE,
    MIN_NOISE,
    Accountant,
    Charge,
    Settings,
    epsilon_of,
    noise_for,
)
from fedcore.privacy.ledger import Ledger, charge
from fedcore.privacy.losses import MechanismSteps, composed_epsilon, gaussian_epsilon
from fedcore.privacy.renyi import renyi_divergences

DELTA = 1e-5
ROUNDS = [Charge(number, 1.0, 1 / 16, 16) for number in range(1, 11)]
ACCOUNTANTS: tuple[Accountant, ...] = ("rdp", "prv")


def epsilon(
    charges: list[Charge],
    accountant: Accountant = "prv",
    *,
    delta: float = DELTA,
    settings: Settings = "fixed",
) -> float:
    return epsilon_of(charges, target_delta=delta, accountant=accountant, settings=settings)


def opacus(charges: list[Charge], delta: float = DELTA) -> float:
    theirs = RDPAccountant()
    theirs.history = [(c.noise_multiplier, c.sample_rate, c.steps) for c in charges]
    return float(theirs.get_epsilon(delta=delta))


def test_ten_rounds_cost_what_is_known_of_all_their_steps() -> None:
    assert epsilon(ROUNDS) == pytest.approx(5.419, abs=0.001)  # dp-accounting's PLD: 5.418
    assert epsilon(ROUNDS, "rdp") == pytest.approx(6.09, abs=0.06)  # Opacus: 6.09
    assert epsilon(ROUNDS[:1], "rdp") == pytest.approx(opacus(ROUNDS[:1]), rel=0.02)


@pytest.mark.parametrize(
    "history",
    [
        [(1.0, 1 / 16, 160)],
        [(0.8, 1 / 60, 3000)],
        [(8.0, 0.1, 100)],
        [(0.5, 0.01, 10)],
        [(1.0, 0.1, 16), (2.0, 0.2, 4)],
        [(3.0, 1.0, 30)],
    ],
)
def test_renyi_accounting_is_above_that_of_opacus_and_within_two_percent(
    history: list[tuple[float, float, int]],
) -> None:
    charges = [Charge(1, *mechanism) for mechanism in history]
    if all(rate == 1 for _, rate, _ in history):
        assert epsilon(charges, "rdp") <= opacus(charges)  # exact
        return
    assert opacus(charges) * (1 - 1e-9) <= epsilon(charges, "rdp") <= 1.02 * opacus(charges)


@pytest.mark.parametrize("rate", [1e-9, 0.1, 0.5, 1 - 1e-9])
@pytest.mark.parametrize("noise", [0.03, 1.0, 1e3, 1e6])
def test_renyi_divergences_are_positive_grow_with_the_order_and_take_no_time(
    noise: float, rate: float
) -> None:
    started = time.monotonic()
    found = renyi_divergences(noise, rate, tuple(range(2, 200)))
    assert time.monotonic() - started < 2.0  # Opacus takes minutes at noise 1e6 and rate 0.5
    assert (found > 0).all()
    assert all(before <= after for before, after in itertools.pairwise(found))
    if noise > 0.04:  # order 2 in closed form
        assert found[0] == pytest.approx(math.log1p(rate**2 * math.expm1(1 / noise**2)), rel=1e-6)


def test_every_example_in_every_step_costs_what_the_gaussian_mechanism_does() -> None:
    for noise, steps, delta in [(1.0, 1, 1e-5), (5.0, 40, 1e-9), (0.3, 3, 1e-2), (300.0, 7, 1e-6)]:
        sensitivity = math.sqrt(steps) / noise
        found = epsilon([Charge(1, noise, 1.0, steps)], delta=delta)
        back = norm.cdf(sensitivity / 2 - found / sensitivity) - math.exp(found) * norm.cdf(
            -sensitivity / 2 - found / sensitivity
        )
        assert delta * (1 - 1e-6) <= back <= delta or (found == 0.0 and back <= delta)
        numerical = composed_epsilon([MechanismSteps(noise, 1.0, steps)], delta)
        assert found <= numerical <= 1.002 * found


def test_known_values_of_the_gaussian_mechanism() -> None:
    assert gaussian_epsilon(1.0, 1e-5) == pytest.approx(4.3772, abs=1e-4)  # Balle, Wang 2018
    assert gaussian_epsilon(1.0, 0.3829249 + 1e-6) == 0.0  # its total variation distance
    assert gaussian_epsilon(1e9, 1e-5) == math.inf


@pytest.mark.parametrize("rate", [0.001, 0.1, 0.9])
def test_one_step_costs_what_its_closed_form_says(rate: float) -> None:
    """Delta of the subsampled Gaussian mechanism, from the data with the example."""
    noise, found = 0.7, epsilon([Charge(1, 0.7, rate, 1)], delta=1e-4)
    start = noise**2 * math.log((math.exp(found) - 1 + rate) / rate) + 0.5
    with_it = rate * norm.sf((start - 1) / noise) + (1 - rate) * norm.sf(start / noise)
    assert 0.98e-4 <= with_it - math.exp(found) * norm.sf(start / noise) <= 1e-4


def test_prv_is_tighter_than_rdp_which_is_tighter_than_no_sampling() -> None:
    none = gaussian_epsilon(math.sqrt(160), DELTA)
    assert epsilon(ROUNDS) < epsilon(ROUNDS, "rdp") < none


@pytest.mark.parametrize("accountant", ACCOUNTANTS)
@pytest.mark.parametrize("settings", ["fixed", "adaptive"])
def test_order_and_portions_do_not_matter(accountant: Accountant, settings: Settings) -> None:
    charges = [Charge(1, 1.0, 0.1, 10), Charge(2, 2.0, 0.5, 4), Charge(3, 1.0, 0.1, 6)]
    found = epsilon(charges, accountant, settings=settings)
    assert epsilon(charges[::-1], accountant, settings=settings) == found
    whole = [Charge(1, 1.0, 0.1, 16), Charge(2, 2.0, 0.5, 4)]
    assert epsilon(whole, accountant, settings=settings) == found


@pytest.mark.parametrize("accountant", ACCOUNTANTS)
def test_each_round_adds_to_what_was_spent(accountant: Accountant) -> None:
    spent = [epsilon(ROUNDS[:count], accountant) for count in range(11)]
    assert spent[0] == 0.0
    assert all(before < after for before, after in itertools.pairwise(spent))


def test_a_round_without_steps_costs_nothing() -> None:
    assert epsilon([Charge(1, 1.0, 0.5, 0)]) == 0.0
    assert epsilon([*ROUNDS[:1], Charge(2, 3.0, 0.5, 0)]) == epsilon(ROUNDS[:1])
    adaptive = epsilon([*ROUNDS[:1], Charge(2, 3.0, 0.5, 0)], settings="adaptive")
    assert adaptive == epsilon(ROUNDS[:1], settings="adaptive")


@pytest.mark.parametrize("accountant", ACCOUNTANTS)
def test_less_noise_more_data_a_step_and_a_smaller_delta_cost_more(accountant: Accountant) -> None:
    base = epsilon([Charge(1, 1.0, 0.1, 10)], accountant)
    assert epsilon([Charge(1, 0.9, 0.1, 10)], accountant) > base
    assert epsilon([Charge(1, 1.0, 0.2, 10)], accountant) > base
    assert epsilon([Charge(1, 1.0, 0.1, 10)], accountant, delta=1e-7) > base


@pytest.mark.parametrize("accountant", ACCOUNTANTS)
def test_epsilon_is_never_negative(accountant: Accountant) -> None:
    three_rows = [Charge(1, 1.0, 1.0, 3)], [Charge(1, 4.0, 1 / 3, 3)]
    for charges in three_rows:
        for delta in (0.2, 0.5, 0.999):
            assert epsilon(charges, accountant, delta=delta) >= 0.0
    assert epsilon(three_rows[1], accountant, delta=0.2) == 0.0


@pytest.mark.parametrize(
    ("noise", "rate", "steps", "delta"),
    [
        (1e-160, 0.5, 1, 1e-5),
        (1e-160, 1.0, 1, 1e-5),
        (5e-324, 1e-9, 1, 1e-5),
        (1e-3, 0.1, 10**6, 1e-5),
        (0.05, 1e-6, 10**7, 1e-5),
        (0.1, 1.0, 10**9, 1e-12),
        (1.0, 5e-324, 10, 1e-5),
        (1.0, 1 - 2**-53, 10, 1e-5),
        (1.0, 0.1, 100, 1e-300),
        (1e6, 0.5, 10**9, 1e-9),
        (1e300, 0.5, 1, 1e-5),
        (1.0, 1e-6, 10**9, 1e-8),
    ],
)
@pytest.mark.parametrize("accountant", ACCOUNTANTS)
@pytest.mark.parametrize("settings", ["fixed", "adaptive"])
def test_there_is_a_bound_whatever_is_asked_for(
    noise: float,
    rate: float,
    steps: int,
    delta: float,
    accountant: Accountant,
    settings: Settings,
    recwarn: pytest.WarningsRecorder,
) -> None:
    started = time.monotonic()
    found = epsilon([Charge(1, noise, rate, steps)], accountant, delta=delta, settings=settings)
    assert found >= 0.0
    assert time.monotonic() - started < 20.0
    least = 0.5 * math.log(1e-3 / delta) if noise < 0.01 else 0.0
    assert found >= least * (rate > 1e-3)
    mixed = [Charge(1, noise, rate, steps), Charge(2, 2.0, 0.1, 3)]
    assert epsilon(mixed, accountant, delta=delta, settings=settings) >= found * (1 - 2e-3)
    assert not recwarn.list


def test_a_budget_is_exhausted_at_once_by_next_to_no_noise() -> None:
    privacy = Privacy(unit="example", max_epsilon=1e6)
    with pytest.raises(BudgetExhausted, match="would raise that to ∞"):
        charge(Ledger(), Charge(1, 1e-160, 0.5, 1), privacy, client="anna")


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan])
def test_a_delta_that_is_no_probability_is_refused(delta: float) -> None:
    with pytest.raises(PrivacyError, match="between 0 and 1"):
        epsilon(ROUNDS, delta=delta)


def test_whatever_the_accountant_meets_is_a_privacy_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (MemoryError("no"), OverflowError("big"), RuntimeError("odd"), ValueError("bad")):

        def fail(*_: object, error: Exception = error) -> float:
            raise error

        monkeypatch.setattr(accounting, "composed_epsilon", fail)
        with pytest.raises(PrivacyError, match=rf"{type(error).__name__}.*accountant to 'rdp'"):
            epsilon([Charge(1, 1.2345, 0.1234, 17)])


def test_settings_that_changed_are_counted_by_a_filter() -> None:
    same = [Charge(1, 1.0, 0.1, 10), Charge(2, 1.0, 0.1, 30)]
    kept = (1 - FILTER_SHARE) * DELTA
    assert epsilon(same, settings="adaptive") == epsilon(same, delta=kept)
    changed = [*same, Charge(3, 1.0, 0.2, 10)]
    share = FILTER_SHARE * DELTA / len(FILTER_ORDERS)
    by_order = [
        40 * renyi_divergences(1.0, 0.1, (order,))[0]
        + 10 * renyi_divergences(1.0, 0.2, (order,))[0]
        + math.log1p(-1 / order)
        - math.log(share * order) / (order - 1)
        for order in FILTER_ORDERS
    ]
    found = epsilon(changed, settings="adaptive")
    assert found == pytest.approx(min(by_order), rel=1e-9)
    assert found > epsilon(changed, "rdp") > epsilon(changed)


def test_noise_may_change_where_every_example_is_in_every_step() -> None:
    charges = [Charge(1, 2.0, 1.0, 10), Charge(2, 4.0, 1.0, 20)]
    exact = gaussian_epsilon(math.sqrt(10 / 4 + 20 / 16), (1 - FILTER_SHARE) * DELTA)
    assert epsilon(charges, settings="adaptive") == exact


def test_a_filter_costs_a_ledger_of_one_mechanism_less_than_one_percent() -> None:
    assert epsilon(ROUNDS, settings="adaptive") <= 1.01 * epsilon(ROUNDS)


@pytest.mark.parametrize("accountant", ACCOUNTANTS)
@pytest.mark.parametrize("max_epsilon", [0.3, 1.0, 8.0])
@pytest.mark.parametrize(
    ("sample_rate", "steps"), [(1.0, 1), (1.0, 40), (0.25, 160), (1 / 64, 1000)]
)
def test_the_noise_keeps_the_budget_and_half_a_percent_less_does_not(
    max_epsilon: float, sample_rate: float, steps: int, accountant: Accountant
) -> None:
    noise = noise_for(
        max_epsilon=max_epsilon,
        target_delta=DELTA,
        sample_rate=sample_rate,
        steps=steps,
        accountant=accountant,
    )
    assert noise == round(noise, 4)
    spent = [
        epsilon([Charge(1, noise * factor, sample_rate, steps)], accountant, settings="adaptive")
        for factor in (1.0, 0.995)
    ]
    assert spent[0] <= max_epsilon < spent[1]


@pytest.mark.parametrize("accountant", ACCOUNTANTS)
def test_a_budget_next_to_nothing_is_kept_by_a_lot_of_noise(accountant: Accountant) -> None:
    noise = noise_for(
        max_epsilon=0.001, target_delta=1e-6, sample_rate=0.01, steps=100, accountant=accountant
    )
    assert 1.0 < noise < 1e6
    assert epsilon([Charge(1, noise, 0.01, 100)], accountant, delta=1e-6) <= 0.001


def test_the_noise_holds_when_the_steps_are_spread_over_rounds() -> None:
    noise = noise_for(
        max_epsilon=2.0, target_delta=DELTA, sample_rate=0.2, steps=60, accountant="prv"
    )
    rounds = [Charge(number, noise, 0.2, 6) for number in range(1, 11)]
    assert 1.99 < epsilon(rounds, settings="adaptive") <= 2.0


def test_noise_for_settings_fixed_beforehand_is_a_little_less() -> None:
    asked = {"max_epsilon": 2.0, "target_delta": DELTA, "sample_rate": 0.25, "steps": 100}
    fixed = noise_for(**asked, accountant="prv", settings="fixed")  # type: ignore[arg-type]
    adaptive = noise_for(**asked, accountant="prv")  # type: ignore[arg-type]
    assert 0.98 * adaptive < fixed < adaptive
    assert epsilon([Charge(1, fixed, 0.25, 100)]) <= 2.0


def test_prv_takes_less_noise_for_the_same_budget() -> None:
    asked = {"max_epsilon": 2.0, "target_delta": DELTA, "sample_rate": 0.25, "steps": 100}
    tight = noise_for(**asked, accountant="prv")  # type: ignore[arg-type]
    assert tight < 0.97 * noise_for(**asked, accountant="rdp")  # type: ignore[arg-type]


def test_a_large_budget_takes_the_least_noise_that_may_be_asked_for() -> None:
    asked = {"max_epsilon": 1e6, "target_delta": DELTA, "sample_rate": 0.25, "steps": 10}
    assert noise_for(**asked, accountant="prv") == MIN_NOISE  # type: ignore[arg-type]


def test_finding_noise_takes_less_than_a_second_of_processor_time() -> None:
    started = time.process_time()
    noise_for(
        max_epsilon=3.01, target_delta=DELTA, sample_rate=64 / 6000, steps=2820, accountant="prv"
    )
    assert time.process_time() - started < 1.0


def test_a_budget_that_no_noise_keeps_is_refused_with_the_way_out() -> None:
    with pytest.raises(PrivacyError, match=r"max_epsilon = 1e-09 .*allow more epsilon"):
        noise_for(
            max_epsilon=1e-9, target_delta=1e-12, sample_rate=1.0, steps=10**6, accountant="rdp"
        )


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
@pytest.mark.parametrize("others", [(), (Charge(1, 2.0, 0.5, 3),)], ids=["alone", "filter"])
def test_steps_that_no_float_holds_are_an_error_of_ours(
    accountant: Accountant, others: tuple[Charge, ...]
) -> None:
    charges = [Charge(1, 1.0, 0.25, 10**400), *others]
    with pytest.raises(PrivacyError, match="Nothing was trained"):
        epsilon_of(charges, target_delta=1e-5, accountant=accountant)


def test_a_run_too_long_for_the_numerical_accountant_has_the_other_bound() -> None:
    long = [Charge(1, 1e3, 1e-6, 10**18)]
    by = {one: epsilon_of(long, target_delta=1e-6, accountant=one) for one in ("prv", "rdp")}
    assert 0 < by["prv"] == by["rdp"] < math.inf


def test_noise_at_the_end_of_its_range_is_found() -> None:
    noise = noise_for(
        max_epsilon=0.01, target_delta=1e-12, sample_rate=1.0, steps=10**6, accountant="prv"
    )
    spent = epsilon_of([Charge(1, noise, 1.0, 10**6)], target_delta=1e-12, accountant="prv")
    assert spent <= 0.01
    assert noise <= MAX_NOISE
