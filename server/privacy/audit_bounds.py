"""Statistics of an audit: lower bounds on epsilon from guesses about canaries.

Each bound is wrong with a probability of at most ``1 - confidence``, whatever the audited function
does. Nothing here is random.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedcore.privacy.accounting import Charge, epsilon_of

Array = NDArray[np.float64]

_HALVINGS = 60  # bisection steps, down to float64 precision
_MAX_EPSILON = 700.0  # exp of more overflows float64
_NOISE_HALVINGS = 8  # bisection steps, each calls the accountant; error at most 1.4 %
_MIN_NOISE = 0.25  # below it the accountant's tables grow without bound
_BOLDNESS = 0.99  # share of the bettor's wealth at stake; 1 could lose all at once


# --- one run ------------------------------------------------------------------------------------


def one_run_p_value(
    *, canaries: int, guesses: int, right: int, epsilon: float, delta: float
) -> float:
    """Returns the p-value of ``right`` correct guesses in one (epsilon, delta)-private run.

    Each canary was included independently with probability 1/2. The number of guesses was fixed in
    advance; the attacker abstained on all other canaries.

    Source:
        Steinke, Nasr, Jagielski 2023, arXiv:2305.08846, Theorem 5.2 and Corollary 5.4.
    """
    if not (0 <= right <= guesses <= canaries and epsilon >= 0 and 0 <= delta <= 1):
        raise ValueError(
            f"{right} right of {guesses} guesses about {canaries} canaries, at epsilon {epsilon} "
            f"and delta {delta}: these are not valid counts of an audit"
        )
    mass = _binomial(guesses, 1 / (1 + math.exp(-epsilon)))
    at_least = float(mass[right:].sum())
    # Contribution of delta: for each i, the binomial's mass within i below the count, divided by i.
    below = np.cumsum(mass[:right][::-1])
    worst = float((below / np.arange(1, right + 1)).max(initial=0.0))
    return min(1.0, at_least + 2 * canaries * delta * worst)


def one_run_epsilon(
    *, canaries: int, guesses: int, right: int, delta: float, confidence: float
) -> float:
    """Returns the largest epsilon that one run refutes; 0 if it refutes none.

    Source:
        Steinke, Nasr, Jagielski 2023, arXiv:2305.08846, Algorithm 1 and Corollary 5.4.
    """

    def refuted(epsilon: float) -> bool:
        p_value = one_run_p_value(
            canaries=canaries, guesses=guesses, right=right, epsilon=epsilon, delta=delta
        )
        return p_value < 1 - confidence

    return _largest(refuted, _MAX_EPSILON)


def _binomial(count: int, probability: float) -> Array:
    """Returns the binomial probabilities of 0 to ``count`` successes."""
    successes = np.arange(count + 1)
    factorials = np.array([math.lgamma(k + 1) for k in range(count + 1)])
    # log1p keeps log(1 - p) accurate: p is close to 1 for large epsilon.
    miss = math.log1p(-probability) if probability < 1 else -math.inf
    with np.errstate(invalid="ignore"):
        logs = (
            factorials[-1]
            - factorials
            - factorials[::-1]
            + successes * math.log(probability)
            + np.where(successes < count, (count - successes) * miss, 0.0)
        )
    mass: Array = np.exp(logs)
    return mass


# --- repeated releases --------------------------------------------------------------------------


def mean_lower_bound(values: Array, *, confidence: float) -> float:
    """Returns a lower bound on the expectation of independent values in [0, 1].

    A bettor with initial wealth 1 stakes nearly all of it on each value being above a mean m. If no
    value's expectation exceeds m, the expected wealth never exceeds 1, so it reaches ``1 / (1 -
    confidence)`` with a probability of at most ``1 - confidence`` (Markov). The bound is the
    largest m at which it does. Unlike a bound from the normal distribution, this is valid for any
    number of values of any distribution; unlike Hoeffding's, it profits from a small variance.

    Args:
        values: Values in [0, 1], shape ``(R,)``. Each is a mean over many canaries, so their spread
            is small, and bold bets work best.
        confidence: Confidence in the bound, in (0, 1).

    Source:
        Waudby-Smith and Ramdas 2024, arXiv:2010.09686, section 4, with a constant bet.
    """
    needed = -math.log(1 - confidence)

    def refuted(mean: float) -> bool:
        return _growth(values, mean) >= needed

    return _largest(refuted, 1.0)


def _growth(values: Array, mean: float) -> float:
    """Returns the logarithm of the bettor's final wealth, starting from 1."""
    if mean <= 0:
        return math.inf
    return float(np.log1p(_BOLDNESS * (values / mean - 1)).sum())


def _largest(holds: Callable[[float], bool], top: float) -> float:
    """Bisects for the value in ``[0, top]`` at which a predicate turns from true to false."""
    low, high = 0.0, top
    if holds(top):
        return top
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


# --- from a distance between two distributions to epsilon -----------------------------------------


@dataclass(frozen=True)
class Distance:
    """A lower bound on the distance between runs with an example and runs without it.

    For any event, ``P(event with) - exp(epsilon) * P(event without)`` is at most the delta that
    belongs to that epsilon; ``delta`` is a value that was observed to be reached.
    """

    epsilon: float
    delta: float


def gaussian_delta(epsilon: float, mu: float) -> float:
    """Returns the delta at ``epsilon`` for distinguishing N(0, 1) from N(mu, 1).

    Source:
        Dong, Roth, Su 2019, arXiv:1905.02383, Corollary 2.13; Balle and Wang 2018,
        arXiv:1805.06530, Theorem 8.
    """
    if mu <= 0:
        return 0.0
    hit, false = _normal(mu / 2 - epsilon / mu), _normal(-mu / 2 - epsilon / mu)
    return max(0.0, hit - (math.exp(epsilon + math.log(false)) if false > 0 else 0.0))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Returns a lower bound on the epsilon at ``delta`` for telling N(0, 1) from N(mu, 1)."""
    return _largest(lambda epsilon: gaussian_delta(epsilon, mu) > delta, _MAX_EPSILON)


def _normal(x: float) -> float:
    """Computes the normal distribution function, accurate in its lower tail."""
    return 0.5 * math.erfc(-x / math.sqrt(2))


def epsilon_at_least(seen: Distance, stated: Charge, *, target_delta: float) -> float:
    """Returns the epsilon of the noisiest DP-SGD compatible with an observed distance.

    Sample rate and steps are those stated. If every example is in every step, DP-SGD is a Gaussian
    mechanism whose mu has a closed form (the Gaussian-DP bound). Otherwise the accountant finds the
    noise levels under which the distributions would be closer than observed.

    Guarantee:
        Exceeds the epsilon of ``stated`` only if its noise, rate and steps contradict ``seen``.

    Source:
        Nasr et al. 2023, arXiv:2302.07956, section 5 (auditing by trade-off functions).
    """
    if seen.delta <= 0:
        return 0.0
    if stated.sample_rate == 1:
        mu = _largest(lambda mu: gaussian_delta(seen.epsilon, mu) < seen.delta, 1e3)
        return gaussian_epsilon(mu, target_delta)
    return _by_accountant(seen, stated, target_delta)


def _by_accountant(seen: Distance, stated: Charge, target_delta: float) -> float:
    def spent(noise: float, delta: float) -> float:
        charge = Charge(stated.round, noise, stated.sample_rate, stated.steps)
        return epsilon_of((charge,), target_delta=delta, accountant="prv")

    def refuted(noise: float) -> bool:
        return spent(noise, seen.delta) < seen.epsilon

    low, high = max(_MIN_NOISE, stated.noise_multiplier / 4), 8 * stated.noise_multiplier
    if not refuted(high):
        return 0.0
    if refuted(low):
        return spent(low, target_delta)
    for _ in range(_NOISE_HALVINGS):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if refuted(middle) else (middle, high)
    return spent(high, target_delta)
