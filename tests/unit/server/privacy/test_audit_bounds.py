from __future__ import annotations

import math

import numpy as np
import pytest

from fedcore.privacy.accounting import Charge, epsilon_of
from server.privacy.audit_bounds import (
    Distance,
    epsilon_at_least,
    gaussian_delta,
    gaussian_epsilon,
    mean_lower_bound,
    one_run_epsilon,
    one_run_p_value,
)


@pytest.mark.parametrize(
    ("canaries", "guesses", "right", "delta", "printed"),
    [(1000, 100, 75, 1e-4, 0.673), (100_000, 1510, 1439, 1e-5, 2.675)],
)
def test_one_run_gives_the_bounds_that_the_paper_prints(
    canaries: int, guesses: int, right: int, delta: float, printed: float
) -> None:
    # arXiv:2305.08846v1, Appendix D and section 7.
    found = one_run_epsilon(
        canaries=canaries, guesses=guesses, right=right, delta=delta, confidence=0.95
    )
    assert found == pytest.approx(printed, abs=1e-3)


def test_without_delta_one_run_is_a_binomial_test() -> None:
    epsilon = math.log(3)  # each guess is right with probability 3/4
    tail = sum(math.comb(20, k) * 0.75**k * 0.25 ** (20 - k) for k in range(18, 21))
    found = one_run_p_value(canaries=50, guesses=20, right=18, epsilon=epsilon, delta=0.0)
    assert found == pytest.approx(tail, rel=1e-9)


def test_delta_and_abstentions_weaken_one_run() -> None:
    def bound(canaries: int, delta: float) -> float:
        return one_run_epsilon(
            canaries=canaries, guesses=100, right=95, delta=delta, confidence=0.95
        )

    assert bound(100, 0.0) == bound(10_000, 0.0) > bound(100, 1e-5) > bound(10_000, 1e-5) > 0
    assert bound(10_000, 0.1) == 0.0


@pytest.mark.parametrize("right", [0, 50, 55])
def test_guesses_no_better_than_a_coin_show_nothing(right: int) -> None:
    assert (
        one_run_epsilon(canaries=100, guesses=100, right=right, delta=0.0, confidence=0.95) == 0.0
    )


def test_more_right_guesses_than_guesses_are_no_audit() -> None:
    with pytest.raises(ValueError, match="11 right of 10 guesses"):
        one_run_p_value(canaries=20, guesses=10, right=11, epsilon=1.0, delta=0.0)


@pytest.mark.parametrize("spread", ["coin", "narrow", "rare"])
def test_the_bound_on_a_mean_is_wrong_no_more_often_than_stated(spread: str) -> None:
    rng, trials, wrong = np.random.default_rng(1), 500, 0
    draw = {
        "coin": (lambda: (rng.random(60) < 0.3).astype(float), 0.3),
        "narrow": (lambda: 0.6 + 0.05 * rng.uniform(-1, 1, 60), 0.6),
        "rare": (lambda: (rng.random(60) < 0.02).astype(float), 0.02),
    }
    values, mean = draw[spread]
    for _ in range(trials):
        wrong += mean_lower_bound(values(), confidence=0.9) > mean
    # 50 are allowed in expectation; a bound that holds passes 75 once in 5,000 such tests.
    assert wrong <= 75


def test_the_bound_on_a_mean_is_close_where_values_vary_little() -> None:
    values = 0.7 + 0.03 * np.random.default_rng(2).standard_normal(400)
    assert 0.69 < mean_lower_bound(values, confidence=0.95) < 0.7


def test_delta_of_a_gaussian_shift_and_its_epsilon_are_inverse() -> None:
    for mu in (0.1, 1.0, 4.0):
        for delta in (1e-2, 1e-5):
            assert gaussian_delta(gaussian_epsilon(mu, delta), mu) == pytest.approx(delta, rel=1e-6)
    # Balle and Wang 2018: noise 3.73 gives epsilon 1 at delta 1e-5.
    assert gaussian_epsilon(1 / 3.7306, 1e-5) == pytest.approx(1.0, abs=1e-3)
    assert gaussian_delta(0.5, 0.0) == 0.0


def test_full_batches_give_the_epsilon_of_the_gaussian_mechanism() -> None:
    stated = Charge(1, 1.0, 1.0, 4)  # mu is 2
    seen = Distance(0.0, gaussian_delta(0.0, 2.0))
    found = epsilon_at_least(seen, stated, target_delta=1e-5)
    assert found == pytest.approx(gaussian_epsilon(2.0, 1e-5), rel=1e-6)
    assert found <= epsilon_of((stated,), target_delta=1e-5, accountant="prv")


def test_sampled_steps_give_the_epsilon_that_the_accountant_knows() -> None:
    stated = Charge(1, 1.0, 0.1, 1)

    def spent(delta: float) -> float:
        return epsilon_of((stated,), target_delta=delta, accountant="prv")

    found = epsilon_at_least(Distance(spent(0.01), 0.01), stated, target_delta=1e-5)
    assert 0.95 * spent(1e-5) < found <= spent(1e-5) * 1.001


def test_where_nothing_was_seen_nothing_is_said() -> None:
    for rate in (1.0, 0.1):
        charge = Charge(1, 1.0, rate, 1)
        assert epsilon_at_least(Distance(0.1, -0.01), charge, target_delta=1e-5) == 0.0
        assert epsilon_at_least(Distance(0.1, 1e-9), charge, target_delta=1e-5) < 0.2
