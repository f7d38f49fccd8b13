"""From steps of the subsampled Gaussian mechanism to epsilon, and back to the noise it takes.

Neighbouring relation:
    Zero-out adjacency of one example. The number of a client's examples is public; two data sets
    are neighbours where one example of the one is a null record in the other, whose gradient
    counts as zero. Sampling rate, number of steps and divisor follow from the public number and
    are equal for both, and a step's clipped sum differs by at most ``clip_norm``. So one step is
    dominated, in either direction, by the pair that dominates adding and removing one example:
    ``(1 - q) N(0, s^2) + q N(1, s^2)`` and ``N(0, s^2)``. Epsilon is the larger of both
    directions. Replacing an example by another one costs up to twice as much, which is not what
    is stated.

    Source: Kairouz et al. 2021, arXiv:2103.00039, Definition 1.1 (zero-out); Ponomareva et al.
    2023, arXiv:2303.00654, section 2.1.1 (how it compares); Zhu, Dong, Wang 2022,
    arXiv:2106.08567 (the dominating pairs).

Settings that change within one ledger:
    A server chooses each round's settings after it has seen what earlier rounds released. A sum
    over mechanisms whose settings depend on earlier outputs is not bounded by the composition
    theorems for settings fixed beforehand, neither Renyi's with its best order nor that of
    privacy losses. A budget therefore is a privacy filter (`epsilon_of` with
    ``settings="adaptive"``, which is what a ledger counts by):

    - Steps of one mechanism alone, however many there come to be: stopping early, pausing and
      the number of steps a round are post-processing of the longest run within the budget, which
      was fixed by its first step. Noise may change as well where every example is in every step.
    - Anything else: the Renyi filter at a few fixed orders, each with its own share of delta.

    What a client releases until its budget is spent is (budget, delta)-differentially private,
    whoever chose the settings and however. The epsilon recorded on the way is that of a ledger
    whose end was fixed beforehand; where a server stopped because of what it saw, the budget is
    the guarantee.

    Source: Rogers et al. 2016, arXiv:1605.08294 (filters, and why fixed settings matter);
    Feldman, Zrnic 2021, arXiv:2008.11193 (Renyi filter); Smith, Thakurta 2022, arXiv:2210.17520
    (Gaussian filter); Whitehouse et al. 2023, arXiv:2203.05481 (fully adaptive composition).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from scipy.optimize import brentq

from fedcore.errors import PrivacyError
from fedcore.observability.words import counted
from fedcore.privacy.losses import MechanismSteps, composed_epsilon, gaussian_epsilon
from fedcore.privacy.renyi import ORDERS, FloatArray, renyi_divergences, renyi_epsilons

Accountant = Literal["rdp", "prv"]
Settings = Literal["fixed", "adaptive"]

FILTER_ORDERS = (2, 3, 4, 5, 7, 10, 16, 32, 64, 128)
"""Renyi orders of the filter; fixed, as an order chosen by what was released voids it."""
FILTER_SHARE = 0.1
"""Of delta: what is kept for ledgers whose settings change."""
MOST_KEPT = 1 << 15
"""Mechanisms whose cost at the filter's orders is kept: half a kilobyte each. A ledger of more is
counted all the same, and slowly."""
MIN_NOISE, MAX_NOISE = 0.1, 1e6
"""Noise multipliers that may be asked for: one step without sampling costs an epsilon of 91 at the
lower end (delta 1e-5), and nothing measurable at the upper."""

_ENOUGH_NOISE = 1e9  # more counts as this much: squares of all numbers stay floats

History = tuple[MechanismSteps, ...]


@dataclass(frozen=True)
class Charge:
    """What one local training run spends: some steps of DP-SGD with Poisson sampling.

    It protects one example under zero-out adjacency: its place could hold a null record.
    """

    round: int
    noise_multiplier: float
    """Standard deviation of the noise on a step's sum, over ``clip_norm``."""
    sample_rate: float
    """The probability with which each example is in a step's batch."""
    steps: int

    def __post_init__(self) -> None:
        if not (
            0 < self.noise_multiplier < math.inf and 0 < self.sample_rate <= 1 and self.steps >= 0
        ):
            raise ValueError(f"{self}: this is no step of DP-SGD")


def epsilon_of(
    charges: Sequence[Charge],
    *,
    target_delta: float,
    accountant: Accountant,
    settings: Settings = "adaptive",
) -> float:
    """The epsilon of all charges together, at ``target_delta``.

    Guarantee:
        With ``settings="fixed"``, an upper bound on the true epsilon of a run whose charges were
        fixed before its first step. With ``settings="adaptive"``, a privacy filter: if a client
        trains only while the result stays within a budget, all that it releases is (budget,
        ``target_delta``)-differentially private, even where each round's settings were chosen by
        what earlier rounds released. Order does not matter. The module's docstring states the
        neighbouring relation and the argument.

    Args:
        charges: What was spent.
        target_delta: The delta at which epsilon holds.
        accountant: ``prv`` composes privacy losses numerically; ``rdp`` is Renyi accounting,
            which is looser. Both bound from above.
        settings: Whether settings were fixed beforehand, or may depend on what was released.

    Returns:
        Epsilon, at least 0; infinite where it is no float, as with next to no noise.

    Raises:
        PrivacyError: ``target_delta`` is no probability, or the machine lacks the memory.
    """
    if not 0 < target_delta < 1:
        raise PrivacyError(
            f"target_delta = {target_delta}: epsilon is counted at a probability between 0 and 1. "
            "Nothing was counted; set it well below one over the number of examples."
        )
    history = _history(charges)
    if not history:
        return 0.0
    if settings == "adaptive":
        if len(history) > 1 and any(steps.sample_rate < 1 for steps in history):
            return _filtered(history, FILTER_SHARE * target_delta)
        target_delta *= 1 - FILTER_SHARE
    if len(history) == 1:
        return _alone(history[0], target_delta, accountant)
    return _fixed(history, target_delta, accountant)


def _history(charges: Sequence[Charge]) -> History:
    counts: dict[tuple[float, float], int] = {}
    for charge in charges:
        mechanism = (min(charge.noise_multiplier, _ENOUGH_NOISE), charge.sample_rate)
        counts[mechanism] = counts.get(mechanism, 0) + charge.steps
    return tuple(
        MechanismSteps(*mechanism, count) for mechanism, count in sorted(counts.items()) if count
    )


# Whatever is kept has a size that nobody chooses: answers for one mechanism, never for a history. A
# server that changes its settings each round makes a history as long as the ledger, and another one
# each round. Of several mechanisms, epsilon is a sum of what is kept for each.


@lru_cache(maxsize=4096)
def _alone(steps: MechanismSteps, target_delta: float, accountant: Accountant) -> float:
    return _fixed((steps,), target_delta, accountant)


def _fixed(history: History, target_delta: float, accountant: Accountant) -> float:
    """The least of the upper bounds that hold for settings fixed beforehand.

    The exact one of the Gaussian mechanism without sampling always holds, as sampling can only
    help, and is a closed form: there is a bound even where the accountants give none.
    """
    with _countable(history, target_delta):
        unsampled = math.sqrt(
            sum(_ratio(steps.noise_multiplier) * steps.number for steps in history)
        )
        bound = gaussian_epsilon(unsampled, target_delta)
        if all(steps.sample_rate == 1 for steps in history):
            return bound
        if bound == 0 or sum(steps.sample_rate * steps.number for steps in history) <= target_delta:
            return 0.0  # the latter: the example is hardly ever drawn
        if accountant == "prv":
            composed = composed_epsilon(history, target_delta)
            if math.isfinite(composed):
                return min(bound, composed)
        spent = sum(steps.number * _renyi_costs(*steps[:2]) for steps in history)
        return min(bound, float(renyi_epsilons(np.asarray(spent), ORDERS, target_delta).min()))


@contextmanager
def _countable(history: History, target_delta: float) -> Iterator[None]:
    """Makes one kind of error of whatever numbers or this machine do not hold.

    Raises:
        PrivacyError: epsilon cannot be counted.
    """
    try:
        yield
    except (ArithmeticError, ValueError, RuntimeError, MemoryError) as error:
        first, steps = history[0], sum(each.number for each in history)
        many = f"{steps}" if steps < 10**15 else "more than 10^15"
        raise PrivacyError(
            f"epsilon of {many} steps of {len(history)} mechanisms, the first of them of noise "
            f"multiplier {first.noise_multiplier:g} at sample rate {first.sample_rate:g}, cannot "
            f"be counted at delta {target_delta:g} on this machine ({type(error).__name__}: "
            f"{error}). Nothing was trained; set privacy.accountant to 'rdp', which needs no "
            "memory, plan fewer rounds or epochs, or use settings that change less often."
        ) from error


def _filtered(history: History, target_delta: float) -> float:
    """The Renyi filter: the best of a few fixed orders, each with an equal share of delta.

    Whichever order keeps the budget when a client stops has kept it all along, so on those
    outcomes the client did what a filter at that order alone would have done; the deltas of the
    outcomes add up.
    """
    with _countable(history, target_delta):
        spent = sum(steps.number * _filter_costs(*steps[:2]) for steps in history)
        share = target_delta / len(FILTER_ORDERS)
        return float(renyi_epsilons(np.asarray(spent), FILTER_ORDERS, share).min())


@lru_cache(maxsize=4096)
def _renyi_costs(noise_multiplier: float, sample_rate: float) -> FloatArray:
    return renyi_divergences(noise_multiplier, sample_rate, ORDERS)


@lru_cache(maxsize=MOST_KEPT)
def _filter_costs(noise_multiplier: float, sample_rate: float) -> FloatArray:
    return renyi_divergences(noise_multiplier, sample_rate, FILTER_ORDERS)


def _ratio(noise_multiplier: float) -> float:
    """Squared sensitivity over noise of one step; infinite where it is no float."""
    return (1 / noise_multiplier) ** 2 if noise_multiplier > 1e-150 else math.inf


@lru_cache(maxsize=4096)
def noise_for(
    *,
    max_epsilon: float,
    target_delta: float,
    sample_rate: float,
    steps: int,
    accountant: Accountant,
    settings: Settings = "adaptive",
) -> float:
    """The least noise multiplier that keeps ``steps`` steps within ``max_epsilon``.

    Guarantee:
        A ledger that is charged these steps, in whatever portions, counts at most
        ``max_epsilon``. Rounded up at the fourth decimal, so that the figure can be printed and
        typed back without spending more; a noise 0.2 % smaller (and at least 0.0001) would not do.

    Returns:
        At least `MIN_NOISE`.

    Raises:
        PrivacyError: no noise up to `MAX_NOISE` is enough.
    """

    def spent(noise: float) -> float:
        charge = Charge(0, noise, sample_rate, steps)
        return epsilon_of(
            [charge], target_delta=target_delta, accountant=accountant, settings=settings
        )

    low, high = MIN_NOISE, MIN_NOISE
    while spent(high) > max_epsilon:
        if high == MAX_NOISE:
            raise PrivacyError(
                f"privacy.max_epsilon = {max_epsilon} at target_delta = {target_delta} cannot be "
                f"kept over {counted(steps, 'step')} at sample rate {sample_rate:.3g} by any noise "
                f"multiplier up to {MAX_NOISE:g}. Nothing was trained; allow more epsilon, or plan "
                "fewer rounds or epochs."
            )
        low, high = high, min(4 * high, MAX_NOISE)
    if low == high:
        return MIN_NOISE

    def excess(logarithm: float) -> float:
        return math.log(max(spent(math.exp(logarithm)), 1e-3 * max_epsilon) / max_epsilon)

    ends = math.log(low), math.log(high)  # whose exponentials may be a little beside the two
    if excess(ends[0]) <= 0:
        noise = low
    elif excess(ends[1]) >= 0:
        noise = high
    else:
        noise = math.exp(brentq(excess, *ends, xtol=2e-4))
    while noise < high and spent(noise := math.ceil(noise * 1e4) / 1e4) > max_epsilon:
        noise *= 1.0003
    return min(noise, high)
