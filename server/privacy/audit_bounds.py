"""From guesses about canaries to a lower bound on epsilon: the statistics of an audit, and no more.

Each bound is wrong with a probability of at most ``1 - confidence``, whatever the audited function
does. Nothing here samples anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedcore.privacy.accounting import Charge, epsilon_of

Array = NDArray[np.float64]

_HALVINGS = 60  # of an interval, until it is as narrow as float64 can tell
_MOST_EPSILON = 700.0  # exp of more is no float64
_NOISE_HALVINGS = 8  # each calls the accountant; leaves the noise within 1.4 %
_LEAST_NOISE = 0.25  # below it the accountant's tables grow without bound
_BOLDNESS = 0.99  # the share of all it owns that a bettor stakes; all of it could be lost at once


# --- one run ------------------------------------------------------------------------------------


def one_run_p_value(
    *, canaries: int, guesses: int, right: int, epsilon: float, delta: float
) -> float:
    """How likely ``right`` guesses or more are in one run of an (epsilon, delta)-private function.

    Each canary was included with probability 1/2, on its own. The number of guesses was fixed
    before; about all other canaries nothing was said.

    Source:
        Steinke, Nasr, Jagielski 2023, arXiv:2305.08846, Theorem 5.2 and Corollary 5.4.
    """
    if not (0 <= right <= guesses <= canaries and epsilon >= 0 and 0 <= delta <= 1):
        raise ValueError(
            f"{right} right of {guesses} guesses about {canaries} canaries, at epsilon {epsilon} "
            f"and delta {delta}: these are no counts of an audit"
        )
    mass = _binomial(guesses, 1 / (1 + math.exp(-epsilon)))
    at_least = float(mass[right:].sum())
    # What delta adds: for each i, how much of the binomial lies within i below the count, a guess.
    below = np.cumsum(mass[:right][::-1])
    worst = float((below / np.arange(1, right + 1)).max(initial=0.0))
    return min(1.0, at_least + 2 * canaries * delta * worst)


def one_run_epsilon(
    *, canaries: int, guesses: int, right: int, delta: float, confidence: float
) -> float:
    """The largest epsilon that one run refutes; 0 where it refutes none.

    Source:
        Steinke, Nasr, Jagielski 2023, arXiv:2305.08846, Algorithm 1 and Corollary 5.4.
    """

    def refuted(epsilon: float) -> bool:
        p_value = one_run_p_value(
            canaries=canaries, guesses=guesses, right=right, epsilon=epsilon, delta=delta
        )
        return p_value < 1 - confidence

    return _largest(refuted, _MOST_EPSILON)


def _binomial(count: int, probability: float) -> Array:
    """Probabilities of 0 to ``count`` successes."""
    successes = np.arange(count + 1)
    factorials = np.array([math.lgamma(k + 1) for k in range(count + 1)])
    # The logarithm of 1 - p, from p's own: p is close to 1 where epsilon is large.
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
    """A lower bound on the expectation of independent values in [0, 1].

    A bettor stakes nearly all that it owns on each value being above a mean m. If no value's
    expectation is above m, it owns 1 in expectation forever, so it comes to own
    ``1 / (1 - confidence)`` with a probability of at most ``1 - confidence`` (Markov). The bound
    is the largest m at which it does. Unlike a bound from the normal distribution, this holds for
    any number of values of any distribution; unlike Hoeffding's, it profits from a small variance.

    Args:
        values: In [0, 1], shape ``(R,)``; each is already a mean over many canaries, so their
            spread is small, and bold bets are the best ones.
        confidence: In (0, 1).

    Source:
        Waudby-Smith and Ramdas 2024, arXiv:2010.09686, section 4, with a constant bet.
    """
    needed = -math.log(1 - confidence)

    def refuted(mean: float) -> bool:
        return _growth(values, mean) >= needed

    return _largest(refuted, 1.0)


def _growth(values: Array, mean: float) -> float:
    """Logarithm of what the bettor owns in the end, from 1."""
    if mean <= 0:
        return math.inf
    return float(np.log1p(_BOLDNESS * (values / mean - 1)).sum())


def _largest(holds: Callable[[float], bool], top: float) -> float:
    """The largest value up to ``top`` at which a falling predicate still holds, at least 0."""
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
    """A lower bound on how far runs with an example are from runs without it.

    For any event, ``P(event with) - exp(epsilon) * P(event without)`` is at most the delta that
    belongs to that epsilon; ``delta`` is one that was seen to be reached.
    """

    epsilon: float
    delta: float


def gaussian_delta(epsilon: float, mu: float) -> float:
    """The delta at ``epsilon`` of telling N(0, 1) from N(mu, 1).

    Source:
        Dong, Roth, Su 2019, arXiv:1905.02383, Corollary 2.13; Balle and Wang 2018,
        arXiv:1805.06530, Theorem 8.
    """
    if mu <= 0:
        return 0.0
    hit, false = _normal(mu / 2 - epsilon / mu), _normal(-mu / 2 - epsilon / mu)
    return max(0.0, hit - (math.exp(epsilon + math.log(false)) if false > 0 else 0.0))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """The epsilon at ``delta`` of telling N(0, 1) from N(mu, 1), at most the true one."""
    return _largest(lambda epsilon: gaussian_delta(epsilon, mu) > delta, _MOST_EPSILON)


def _normal(x: float) -> float:
    """The normal distribution function, precise in its lower tail."""
    return 0.5 * math.erfc(-x / math.sqrt(2))


def epsilon_at_least(seen: Distance, stated: Charge, *, target_delta: float) -> float:
    """The epsilon of the noisiest DP-SGD, at the stated rate and steps, that ``seen`` allows.

    Where every example is in every step, DP-SGD is a Gaussian mechanism, and its mu has a closed
    form (the Gaussian-DP bound). Elsewhere the accountant says which noise would have kept the
    two distributions closer than they were seen to be.

    Guarantee:
        Above the epsilon of ``stated`` only if its noise, rate and steps contradict ``seen``.

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

    low, high = max(_LEAST_NOISE, stated.noise_multiplier / 4), 8 * stated.noise_multiplier
    if not refuted(high):
        return 0.0
    if refuted(low):
        return spent(low, target_delta)
    for _ in range(_NOISE_HALVINGS):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if refuted(middle) else (middle, high)
    return spent(high, target_delta)
