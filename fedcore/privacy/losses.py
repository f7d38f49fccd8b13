"""The ``prv`` accountant: numerical composition of privacy losses, with upper bounds throughout.

One step of DP-SGD has a privacy loss, a random variable; the loss of many steps is their sum, whose
distribution a fast Fourier transform computes. Each loss is discretised so that the result is an
upper bound on epsilon, without a separate error term.

Start with `composed_epsilon`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.fft import irfft, next_fast_len, rfft
from scipy.special import log_ndtr, ndtr, ndtri

FloatArray = NDArray[np.float64]

MAX_POINTS = 2**18
"""Maximum number of grid points: 2 MB an array. Where the intended accuracy needs more (some
million steps), the grid is coarser and the bound looser, but still valid."""
MIN_NOISE = 0.05
"""Smallest noise multiplier whose losses fit the grid: one step's losses reach 500."""
_INFLATION = 1e-3  # maximum relative increase of the loss's variance by the grid
_CUT = 1e-6  # share of delta allowed for the tails
_MAX_LOSS = 600.0  # maximum loss of one step: its exponential is within float range
_MAX_STEPS = 2**30  # beyond, powers of a transform have no significant digits in the tail
_LEAST = 1e-307  # replaces sums that underflow
_ROUNDING = 1e-14  # relative error of the normal distribution functions


class MechanismSteps(NamedTuple):
    """Steps of one Poisson-subsampled Gaussian mechanism of sensitivity 1."""

    noise_multiplier: float
    sample_rate: float
    number: int


@dataclass(frozen=True)
class _Masses:
    """Distribution of one step's loss, from the data with the example to the data without it.

    Entry ``i`` is the probability that the loss is between ``first + i`` and ``first + i + 1``
    widths.
    """

    first: int
    mixture: FloatArray
    """Probabilities where the example is in the data."""
    base: FloatArray
    """Probabilities where a null record replaces the example."""
    mixture_beyond: float
    """Probability beyond the grid, on either side."""
    base_beyond: float


@dataclass(frozen=True)
class _Losses:
    """Losses at grid points that dominate those of one step in one direction."""

    first: int
    masses: FloatArray
    infinite: float
    """Probability of an infinite loss."""
    count: int
    """Number of such steps."""


class _TooManyPoints(Exception):
    def __init__(self, points: float) -> None:
        self.points = points


def composed_epsilon(history: Sequence[MechanismSteps], target_delta: float) -> float:
    """Returns an upper bound on the epsilon of steps whose settings were fixed beforehand.

    It covers both directions, from the data with the example to the data without it and back; the
    result is the larger one, as neither is known to dominate the other under composition.

    Guarantee:
        The true epsilon at ``target_delta`` is at most the result. Each interval of losses
        distributes its probability to its two ends so that the mass is kept under both neighbours,
        which dominates the original. Losses beyond the grid count as infinite; losses that wrap
        around in the transform count as larger. The transform's possible rounding error, estimated
        from its negative entries, is subtracted from delta.

    Returns:
        Epsilon, at least 0; infinite where the noise is below `MIN_NOISE`, delta is too small for
        the transform's floats, or there are too many steps or losses: callers must use another
        bound there.

    Source:
        Zhu, Dong, Wang 2022, arXiv:2106.08567 (dominating pairs under Poisson sampling); Gopi, Lee,
        Wutschitz 2021, arXiv:2106.02848 (composition of privacy loss random variables); Doroshenko
        et al. 2022, arXiv:2207.04380 (connecting the dots); Lebeda et al. 2024, arXiv:2405.20769
        (why both directions).
    """
    if min(steps.noise_multiplier for steps in history) < MIN_NOISE:
        return math.inf
    if sum(steps.number for steps in history) > _MAX_STEPS:
        return math.inf
    width = _width(history)
    while width <= _MAX_LOSS:
        try:
            steps = [_masses(each, width, _tail(history, target_delta)) for each in history]
            with_to_without = [
                _removed(m, width, s.number) for m, s in zip(steps, history, strict=True)
            ]
            without_to_with = [
                _added(m, width, s.number) for m, s in zip(steps, history, strict=True)
            ]
            return max(
                _epsilon(with_to_without, width, target_delta),
                _epsilon(without_to_with, width, target_delta),
            )
        except _TooManyPoints as error:
            width *= 1.1 * error.points / MAX_POINTS
    return math.inf


def gaussian_epsilon(sensitivity: float, target_delta: float) -> float:
    """Returns the epsilon of a Gaussian mechanism of unit noise without sampling, exact to 1e-9.

    Args:
        sensitivity: Sensitivity divided by the noise's standard deviation;
            ``sqrt(sum(1 / noise**2))`` for several mechanisms.

    Returns:
        Epsilon, at least 0; infinite beyond float range.

    Source:
        Balle, Wang 2018, arXiv:1805.06530, Theorem 8.
    """

    def delta(epsilon: float) -> float:
        below, above = sensitivity / 2, epsilon / sensitivity
        return float(ndtr(below - above) - math.exp(epsilon + log_ndtr(-below - above)))

    if sensitivity / math.sqrt(2 * math.pi) <= target_delta:  # total variation is below delta
        return 0.0
    if not sensitivity < 1e6:  # epsilon would exceed 5e11, beyond float precision
        return math.inf
    if delta(0.0) <= target_delta:
        return 0.0
    from scipy.optimize import brentq  # here: its import takes a fifth of a second

    # Upper end: the first term by itself equals delta.
    above = sensitivity * (sensitivity / 2 - float(ndtri(target_delta)))
    found = brentq(lambda epsilon: delta(epsilon) - target_delta, 0.0, above, rtol=1e-12)
    return float(found) * (1 + 1e-9)  # at or above the root


def _tail(history: Sequence[MechanismSteps], target_delta: float) -> float:
    """Returns the probability of one step's losses that the grid may cut off in a tail."""
    return _CUT * target_delta / sum(steps.number for steps in history)


def _loss(outputs: FloatArray, steps: MechanismSteps) -> FloatArray:
    """Returns the log-likelihood ratio of a step's noised sum, with the example over without it."""
    sigma, rate, _ = steps
    with np.errstate(divide="ignore"):
        return np.asarray(np.logaddexp(np.log1p(-rate), np.log(rate) + (outputs - 0.5) / sigma**2))


def _outputs(losses: FloatArray, steps: MechanismSteps) -> FloatArray:
    """Returns the noised sums with these losses: the inverse of `_loss`."""
    sigma, rate, _ = steps
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        above = losses + np.log(rate * np.exp(-losses) - np.expm1(-losses))
        near = np.log(np.maximum(np.expm1(losses) + rate, 0.0))
        below = np.log(np.maximum(np.exp(losses) - (1 - rate), 0.0))
        inner = np.where(losses > 0, above, np.where(losses > -0.5, near, below))
    return np.asarray(sigma**2 * (inner - math.log(rate)) + 0.5)


def _width(history: Sequence[MechanismSteps]) -> float:
    """Returns a grid width that adds only a small share to the total variance.

    An interval that passes its mass to both ends adds at most a quarter of its square and, where
    losses are far smaller than the interval, at most its width times their size.
    """
    variance = size = 0.0
    for steps in history:
        sigma = steps.noise_multiplier
        outputs = np.linspace(-9 * sigma, 1 + 9 * sigma, 4001)
        density = _mixture(np.exp(-0.5 * (outputs / sigma) ** 2), outputs, steps)
        losses = _loss(outputs, steps)
        mean = float(density @ losses / density.sum())
        second = float(density @ losses**2 / density.sum())
        variance += steps.number * max(second - mean**2, 1e-6 * second)
        size += steps.number * math.sqrt(second)
    total = sum(steps.number for steps in history)
    return max(math.sqrt(4 * _INFLATION * variance / total), _INFLATION * variance / size)


def _mixture(base: FloatArray, outputs: FloatArray, steps: MechanismSteps) -> FloatArray:
    sigma, rate, _ = steps
    return np.asarray((1 - rate) * base + rate * np.exp(-0.5 * ((outputs - 1) / sigma) ** 2))


def _masses(steps: MechanismSteps, width: float, tail: float) -> _Masses:
    sigma, rate, _ = steps
    reach = -float(ndtri(tail)) * sigma
    low, high = np.clip(_loss(np.array([-reach, 1 + reach]), steps), -_MAX_LOSS, _MAX_LOSS) / width
    if high - low > MAX_POINTS:
        raise _TooManyPoints(high - low)
    first, last = math.floor(low), math.ceil(high)
    outputs = _outputs(width * np.arange(first, last + 1), steps)
    without, beyond_without = _intervals(outputs / sigma)
    with_it, beyond_with = _intervals((outputs - 1) / sigma)
    return _Masses(
        first,
        (1 - rate) * without + rate * with_it,
        without,
        (1 - rate) * beyond_without + rate * beyond_with,
        beyond_without,
    )


def _intervals(edges: FloatArray) -> tuple[FloatArray, float]:
    """Returns normal probabilities between edges, and the one beyond the outer edges.

    Each is computed from the side where its tail is small, for accuracy.
    """
    below, above = ndtr(edges), ndtr(-edges)
    between = np.where(edges[1:] > 0, above[:-1] - above[1:], below[1:] - below[:-1])
    return np.maximum(between, 0.0), float(below[0] + above[-1])


def _removed(step: _Masses, width: float, count: int) -> _Losses:
    masses = _connect(step.first, step.mixture, step.base, width)
    return _Losses(step.first, masses, step.mixture_beyond, count)


def _added(step: _Masses, width: float, count: int) -> _Losses:
    first = -(step.first + len(step.base))  # the opposite direction has the opposite sign
    masses = _connect(first, step.base[::-1], step.mixture[::-1], width)
    return _Losses(first, masses, step.base_beyond, count)


def _connect(first: int, ours: FloatArray, theirs: FloatArray, width: float) -> FloatArray:
    """Moves each interval's probability to its ends, so that ``theirs`` is preserved as well."""
    lower_ends = width * np.arange(first, first + len(ours))
    up = (ours - theirs * np.exp(lower_ends)) / -math.expm1(-width)
    up = np.clip(up + _ROUNDING / width * ours, 0.0, ours)
    masses = np.zeros(len(ours) + 1)
    masses[:-1] = ours - up
    masses[1:] += up
    return masses


def _epsilon(steps: Sequence[_Losses], width: float, target_delta: float) -> float:
    """Returns the epsilon of the sum of all losses, in one direction."""
    cut = _CUT * target_delta
    first = math.floor(-_reach(steps, width, cut, -1) / width)
    points = math.ceil(_reach(steps, width, cut, +1) / width) - first + 1
    if points > MAX_POINTS:
        raise _TooManyPoints(points)
    points = next_fast_len(points, real=True)
    spectrum = np.ones(points // 2 + 1, dtype=np.complex128)
    for each in steps:
        places = np.arange(each.first, each.first + len(each.masses)) % points
        folded = np.bincount(places, weights=each.masses, minlength=points)
        with np.errstate(divide="ignore", invalid="ignore"):
            spectrum *= np.exp(each.count * np.log(rfft(folded)))
    masses = np.roll(irfft(spectrum, points), -first)
    noise = points * max(0.0, -float(masses.min()))
    infinite = sum(each.count * each.infinite for each in steps)
    left = target_delta - infinite - cut - noise
    if not left > 0:
        return math.inf
    return _quantile(np.maximum(masses, 0.0), first, width, left)


def _reach(steps: Sequence[_Losses], width: float, cut: float, sign: int) -> float:
    """Returns a bound on ``sign`` times the sum of losses.

    The sum exceeds it with probability at most ``cut``.

    Source:
        Chernoff's bound, at the best of a few tilts.
    """
    losses = [sign * width * np.arange(s.first, s.first + len(s.masses)) for s in steps]
    variance = sum(
        s.count * float(s.masses @ (y - s.masses @ y) ** 2)
        for s, y in zip(steps, losses, strict=True)
    )
    best = math.inf
    for factor in 3.0 ** np.arange(-5, 6):
        tilt = factor * math.sqrt(-2 * math.log(cut) / variance)
        exponent = -math.log(cut)
        for each, y in zip(steps, losses, strict=True):
            top = float(tilt * y.max())
            exponent += each.count * (
                top + math.log(max(float(each.masses @ np.exp(tilt * y - top)), _LEAST))
            )
        best = min(best, exponent / tilt)
    return best


def _quantile(masses: FloatArray, first: int, width: float, delta: float) -> float:
    """Returns the smallest epsilon, at least 0, with at most ``delta`` in the losses above it."""
    weights = -np.expm1(-width * np.arange(len(masses)))

    def above(place: int) -> float:
        return float(masses[place:] @ weights[: len(masses) - place])

    low, high = max(0, -first), len(masses) - 1
    while low < high:  # the first point of the grid that is not below epsilon
        middle = (low + high) // 2
        low, high = (low, middle) if above(middle) <= delta else (middle + 1, high)
    enough, rest = (first + low) * width, masses[low:]
    share = (float(rest.sum()) - delta) / max(float(rest @ (1 - weights[: len(rest)])), _LEAST)
    if share > 0:  # between this point and the one below, delta is linear in exp(epsilon)
        return max(0.0, enough + min(0.0, math.log(share)))
    return 0.0 if low == max(0, -first) else enough
