"""The accountants against dp-accounting's privacy loss distributions, which are other people's."""

from __future__ import annotations

import functools
import warnings

import pytest
from dp_accounting.pld.privacy_loss_distribution import (
    PrivacyLossDistribution,
    from_gaussian_mechanism,
)
from opacus.accountants import PRVAccountant

from fedcore.privacy.accounting import Accountant, Charge, epsilon_of

GRID = [  # noise, rate, steps, delta
    (0.5, 0.001, 1, 1e-5),
    (0.5, 0.001, 5000, 1e-5),
    (0.5, 0.01, 100, 1e-3),
    (0.5, 0.1, 10, 1e-6),
    (0.5, 0.5, 50, 1e-5),
    (0.7, 0.01, 1000, 1e-8),
    (0.8, 1 / 60, 3000, 1e-5),
    (1.0, 0.001, 5000, 1e-6),
    (1.0, 0.01, 5000, 1e-6),
    (1.0, 1 / 16, 160, 1e-5),
    (1.0, 0.25, 40, 1e-4),
    (1.0, 0.5, 1, 1e-5),
    (1.0, 1.0, 10, 1e-5),
    (1.06, 64 / 6000, 2820, 1e-5),
    (1.5, 0.1, 1, 1e-4),
    (2.0, 0.1, 1000, 1e-8),
    (2.0, 0.9, 300, 1e-3),
    (3.0, 0.05, 2000, 1e-7),
    (4.0, 0.99, 10, 1e-6),
    (4.0, 0.01, 5000, 1e-5),
    (4.0, 1.0, 1, 1e-8),
    (8.0, 0.001, 5000, 1e-8),
    (8.0, 0.1, 100, 1e-4),
    (8.0, 0.1, 5000, 1e-3),
    (8.0, 0.5, 5000, 1e-5),
    (8.0, 1.0, 1000, 1e-5),
]
MIXTURES = [
    ([(1.0, 0.1, 100), (2.0, 0.5, 20), (0.8, 0.01, 500)], 1e-5),
    ([(1.0, 0.25, 4), (1.1, 0.2, 5), (1.2, 1 / 6, 6), (1.3, 1 / 7, 7)], 1e-6),
    ([(4.0, 1.0, 10), (1.0, 0.001, 1000)], 1e-4),
]


@functools.lru_cache(maxsize=64)
def _step(noise: float, rate: float, pessimistic: bool, interval: float) -> PrivacyLossDistribution:
    return from_gaussian_mechanism(
        noise,
        sampling_prob=rate,
        value_discretization_interval=interval,
        pessimistic_estimate=pessimistic,
        use_connect_dots=pessimistic,
    )


def theirs(history: list[tuple[float, float, int]], delta: float, *, pessimistic: bool) -> float:
    small = all((n >= 4 and q <= 0.1) or (n >= 1 and q <= 0.001) for n, q, _ in history)
    interval = 1e-4 if small else 1e-3  # finer than the losses of one step
    composed = [_step(n, q, pessimistic, interval).self_compose(steps) for n, q, steps in history]
    return float(functools.reduce(lambda a, b: a.compose(b), composed).get_epsilon_for_delta(delta))


def ours(
    history: list[tuple[float, float, int]], delta: float, accountant: Accountant = "prv"
) -> float:
    charges = [Charge(1, *mechanism) for mechanism in history]
    return epsilon_of(charges, target_delta=delta, accountant=accountant, settings="fixed")


@pytest.mark.parametrize(
    ("history", "delta"), [*(([(n, q, steps)], d) for n, q, steps, d in GRID), *MIXTURES]
)
def test_prv_bounds_the_true_epsilon_and_is_as_tight_as_pld(
    history: list[tuple[float, float, int]], delta: float
) -> None:
    counted = ours(history, delta)
    assert counted >= theirs(history, delta, pessimistic=False)  # theirs is below the true one
    bound = theirs(history, delta, pessimistic=True)
    assert counted == pytest.approx(bound, rel=0.005, abs=0.003)
    assert ours(history, delta, "rdp") >= theirs(history, delta, pessimistic=False)


@pytest.mark.parametrize(("noise", "rate", "steps", "delta"), GRID[9:14])
def test_prv_is_no_looser_than_opacus_and_within_its_stated_error(
    noise: float, rate: float, steps: int, delta: float
) -> None:
    engine = PRVAccountant()
    engine.history = [(noise, rate, steps)]
    with warnings.catch_warnings():  # it takes the logarithm of 0 where every example is drawn
        warnings.simplefilter("ignore")
        upper = float(engine.get_epsilon(delta))
    assert upper - 0.03 <= ours([(noise, rate, steps)], delta) <= upper
