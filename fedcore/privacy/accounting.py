"""Computes epsilon from steps of the subsampled Gaussian mechanism, and noise from a budget.

Neighbouring relation:
    Zero-out adjacency of one example. The number of a client's examples is public; two data sets
    are neighbours if one example of one is replaced by a null record, whose gradient counts as
    zero, in the other. Sampling rate, number of steps and divisor follow from the public number and
    are equal for both, and a step's clipped sum differs by at most ``clip_norm``. So one step is
    dominated, in either direction, by the pair that dominates adding and removing one example:
    ``(1 - q) N(0, s^2) + q N(1, s^2)`` and ``N(0, s^2)``. Epsilon is the larger of both directions.
    Replacing an example by another costs up to twice as much; the stated epsilon does not cover
    that.

    Source: Kairouz et al. 2021, arXiv:2103.00039, Definition 1.1 (zero-out); Ponomareva et al.
    2023, arXiv:2303.00654, section 2.1.1 (comparison); Zhu, Dong, Wang 2022, arXiv:2106.08567
    (dominating pairs).

Settings that change within one ledger:
    A server chooses each round's settings after it has seen what earlier rounds released.
    Composition theorems for settings fixed beforehand, whether Renyi's with its best order or that
    of privacy losses, do not bound mechanisms whose settings depend on earlier outputs. Therefore a
    budget is a privacy filter (`epsilon_of` with ``settings="adaptive"``, which ledgers use):

    - Steps of a single mechanism, however many: stopping early, pausing and the number of steps per
      round are post-processing of the longest run within the budget, which the first step fixed.
      Where every example is in every step, the noise may change as well.
    - Anything else: the Renyi filter at a few fixed orders, each with its own share of delta.

    All that a client releases until its budget is spent is (budget, delta)-differentially private,
    regardless of who chose the settings, and how. The epsilon recorded on the way is that of a
    ledger whose end was fixed beforehand; if a server stopped because of what it saw, the budget is
    the guarantee.

Training data and held-out data:
    A run that evaluates on held-out data splits a client's examples in two parts, by number alone.
    An example is in one of them, so its epsilon is that of the charges to its part. A ledger whose
    charges name the two parts of a single split has the larger of both epsilons, as each part has a
    filter of its own (parallel composition). Charges to different splits, which an example may have
    been in both parts of, all add up.

    Source: McSherry 2009, 10.1145/1559845.1559850 (parallel composition);
    Rogers et al. 2016, arXiv:1605.08294 (filters, and why fixed settings matter); Feldman,
    Zrnic 2021, arXiv:2008.11193 (Renyi filter); Smith, Thakurta 2022, arXiv:2210.17520 (Gaussian
    filter); Whitehouse et al. 2023, arXiv:2203.05481 (fully adaptive composition).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np

from fedcore.errors import PrivacyError
from fedcore.observability.words import counted
from fedcore.privacy.losses import MechanismSteps, composed_epsilon, gaussian_epsilon
from fedcore.privacy.renyi import ORDERS, FloatArray, renyi_divergences, renyi_epsilons, renyi_table

Accountant = Literal["rdp", "prv"]
Settings = Literal["fixed", "adaptive"]

FILTER_ORDERS = (2, 3, 4, 5, 7, 10, 16, 32, 64, 128)
"""Renyi orders of the filter; fixed, because choosing an order by released outputs voids it."""
FILTER_SHARE = 0.1
"""Share of delta reserved for ledgers whose settings change."""
MAX_KEPT = 1 << 15
"""Cache size: mechanisms whose cost at the filter's orders is cached, at half a kilobyte each. A
longer ledger is still counted, but slowly."""
MIN_NOISE, MAX_NOISE = 0.1, 1e6
"""Range of valid noise multipliers: one step without sampling costs an epsilon of 91 at the lower
end (delta 1e-5), and nothing measurable at the upper."""

_ENOUGH_NOISE = 1e9  # higher noise counts as this much, so that squares stay within float range

History = tuple[MechanismSteps, ...]


TRAIN, HELD_OUT = "train", "heldout"
"""Names of the parts of a split: the examples to train on, and those held back to evaluate on."""


def part_of_split(split: str, part: str) -> str:
    """Returns the label of one part of a split, for `Charge.part`."""
    return f"{split}/{part}"


@dataclass(frozen=True)
class Charge:
    """The privacy cost of one release: steps of the Gaussian mechanism with Poisson sampling.

    They are a round's steps of DP-SGD, or one evaluation: a single step on all held-out examples.
    It protects one example under zero-out adjacency: a null record could be in its place.
    """

    round: int
    noise_multiplier: float
    """Standard deviation of the noise on a step's sum, divided by ``clip_norm``."""
    sample_rate: float
    """Probability of each example to be in a step's batch."""
    steps: int
    part: str = ""
    """Label of the only examples that it is about, from `part_of_split`; empty for all examples."""

    @property
    def evaluates(self) -> bool:
        """Whether it is an evaluation on held-out examples."""
        return self.part.endswith(f"/{HELD_OUT}")

    def __post_init__(self) -> None:
        if not (
            0 < self.noise_multiplier < math.inf and 0 < self.sample_rate <= 1 and self.steps >= 0
        ):
            raise ValueError(f"{self}: these are not the parameters of a DP-SGD step")


def epsilon_of(
    charges: Sequence[Charge],
    *,
    target_delta: float,
    accountant: Accountant,
    settings: Settings = "adaptive",
) -> float:
    """Returns the epsilon of all charges together, at ``target_delta``.

    Guarantee:
        With ``settings="fixed"``, an upper bound on the true epsilon of a run whose charges were
        fixed before its first step. With ``settings="adaptive"``, a privacy filter: if a client
        trains only while the result stays within a budget, all that it releases is (budget,
        ``target_delta``)-differentially private, even if earlier releases determined each round's
        settings. Order does not matter. The module's docstring states the neighbouring relation and
        the argument.

    Args:
        charges: All charges to compose.
        target_delta: The delta for epsilon.
        accountant: ``prv`` composes privacy losses numerically; ``rdp`` is Renyi accounting, which
            is looser. Both are upper bounds.
        settings: Whether settings were fixed beforehand, or may depend on earlier releases.

    Returns:
        Epsilon, at least 0; infinite where it exceeds float range, as with almost no noise.

    Raises:
        PrivacyError: ``target_delta`` is not between 0 and 1, or epsilon cannot be computed on this
            machine.
    """
    if not 0 < target_delta < 1:
        raise PrivacyError(
            f"target_delta = {target_delta}: expected a probability between 0 and 1. No epsilon "
            "was computed; set it well below one over the number of examples."
        )
    return max(_epsilon_of(some, target_delta, accountant, settings) for some in _by_part(charges))


def _by_part(charges: Sequence[Charge]) -> list[Sequence[Charge]]:
    """Returns the charges that an example of each part may have; all of them for several splits."""
    parts = sorted({charge.part for charge in charges if charge.part})
    if len(parts) < 2 or len({part.partition("/")[0] for part in parts}) > 1:
        return [charges]
    return [[charge for charge in charges if charge.part in ("", part)] for part in parts]


def _epsilon_of(
    charges: Sequence[Charge], target_delta: float, accountant: Accountant, settings: Settings
) -> float:
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


# Caches store results per mechanism, never per history, so that no server controls their size: one
# that changes its settings each round makes a new history each round, as long as the ledger. With
# several mechanisms, epsilon is computed from a sum of the cached costs of each.


@lru_cache(maxsize=4096)
def _alone(steps: MechanismSteps, target_delta: float, accountant: Accountant) -> float:
    return _fixed((steps,), target_delta, accountant)


def _fixed(history: History, target_delta: float, accountant: Accountant) -> float:
    """Returns the smallest of the upper bounds that are valid for settings fixed beforehand.

    The exact epsilon of the Gaussian mechanism without sampling is always valid, as sampling can
    only reduce it, and has a closed form: so a bound exists even where the accountants give none.
    """
    with _countable(history, target_delta):
        unsampled = math.sqrt(
            sum(_ratio(steps.noise_multiplier) * steps.number for steps in history)
        )
        bound = gaussian_epsilon(unsampled, target_delta)
        if all(steps.sample_rate == 1 for steps in history):
            return bound
        if bound == 0 or sum(steps.sample_rate * steps.number for steps in history) <= target_delta:
            return 0.0  # at most target_delta: the example is almost never drawn
        if accountant == "prv":
            composed = composed_epsilon(history, target_delta)
            if math.isfinite(composed):
                return min(bound, composed)
        spent = sum(steps.number * _renyi_costs(*steps[:2]) for steps in history)
        return min(bound, float(renyi_epsilons(np.asarray(spent), ORDERS, target_delta).min()))


@contextmanager
def _countable(history: History, target_delta: float) -> Iterator[None]:
    """Converts numerical errors and lack of memory within the context to `PrivacyError`.

    Raises:
        PrivacyError: Epsilon cannot be computed.
    """
    try:
        yield
    except (ArithmeticError, ValueError, RuntimeError, MemoryError) as error:
        first, steps = history[0], sum(each.number for each in history)
        many = f"{steps}" if steps < 10**15 else "more than 10^15"
        raise PrivacyError(
            f"epsilon of {many} steps of {len(history)} mechanisms, the first with noise "
            f"multiplier {first.noise_multiplier:g} at sample rate {first.sample_rate:g}, cannot "
            f"be computed at delta {target_delta:g} on this machine ({type(error).__name__}: "
            f"{error}). Nothing was trained; set privacy.accountant to 'rdp', which needs little "
            "memory, plan fewer rounds or epochs, or use settings that change less often."
        ) from error


def _filtered(history: History, target_delta: float) -> float:
    """Returns the Renyi filter's epsilon: the best of fixed orders, each with an equal delta share.

    The order that is within budget when a client stops was within budget all along. So on those
    outcomes the client did what a filter at only that order would have done; the outcomes' deltas
    add up.
    """
    with _countable(history, target_delta):
        costs = _FILTER_COSTS.of([steps[:2] for steps in history])
        spent = np.array([steps.number for steps in history], np.float64) @ costs
        share = target_delta / len(FILTER_ORDERS)
        return float(renyi_epsilons(np.asarray(spent), FILTER_ORDERS, share).min())


@lru_cache(maxsize=4096)
def _renyi_costs(noise_multiplier: float, sample_rate: float) -> FloatArray:
    return renyi_divergences(noise_multiplier, sample_rate, ORDERS)


class _CacheInfo(NamedTuple):
    currsize: int
    maxsize: int


class _KeptCosts:
    """Costs of mechanisms at the filter's orders; those of many new ones are computed together."""

    def __init__(self) -> None:
        self._kept: dict[tuple[float, float], FloatArray] = {}

    def of(self, mechanisms: Sequence[tuple[float, float]]) -> FloatArray:
        """Returns the costs ``(M, len(FILTER_ORDERS))`` of noise multipliers and sample rates."""
        new = [one for one in dict.fromkeys(mechanisms) if one not in self._kept]
        for start in range(0, len(new), _TOGETHER):
            some = new[start : start + _TOGETHER]
            noises, rates = np.array(some, np.float64).T
            table = renyi_table(noises, rates, FILTER_ORDERS)
            self._kept.update((one, row.copy()) for one, row in zip(some, table, strict=True))
        found = np.stack([self._kept[one] for one in mechanisms])
        for oldest in list(self._kept)[: max(0, len(self._kept) - MAX_KEPT)]:
            del self._kept[oldest]
        return found

    def cache_info(self) -> _CacheInfo:
        """Returns the number of mechanisms that are kept, and the most that may be."""
        return _CacheInfo(len(self._kept), MAX_KEPT)

    def cache_clear(self) -> None:
        """Forgets everything."""
        self._kept.clear()


_TOGETHER = 1024  # mechanisms whose costs are computed together: 1 MB per array
_FILTER_COSTS = _KeptCosts()


def _ratio(noise_multiplier: float) -> float:
    """Returns one step's squared ratio of sensitivity to noise; infinite beyond float range."""
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
    """Returns the smallest noise multiplier that keeps ``steps`` steps within ``max_epsilon``.

    Guarantee:
        A ledger that is charged these steps, in any portions, counts at most ``max_epsilon``. The
        result is rounded up at the fourth decimal, so that the printed figure can be typed back
        without spending more; noise that is 0.2 % (and at least 0.0001) smaller would not suffice.

    Returns:
        At least `MIN_NOISE`.

    Raises:
        PrivacyError: No noise up to `MAX_NOISE` suffices.
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
                f"met over {counted(steps, 'step')} at sample rate {sample_rate:.3g} with any "
                f"noise multiplier up to {MAX_NOISE:g}. Nothing was trained; allow more epsilon, "
                "or plan fewer rounds or epochs."
            )
        low, high = high, min(4 * high, MAX_NOISE)
    if low == high:
        return MIN_NOISE

    def excess(logarithm: float) -> float:
        return math.log(max(spent(math.exp(logarithm)), 1e-3 * max_epsilon) / max_epsilon)

    ends = math.log(low), math.log(high)  # exp() may round them back to slightly different numbers
    if excess(ends[0]) <= 0:
        noise = low
    elif excess(ends[1]) >= 0:
        noise = high
    else:
        from scipy.optimize import brentq  # here: its import takes a fifth of a second

        noise = math.exp(brentq(excess, *ends, xtol=2e-4))
    while noise < high and spent(noise := math.ceil(noise * 1e4) / 1e4) > max_epsilon:
        noise *= 1.0003
    return min(noise, high)


def noise_searches() -> int:
    """Returns how often this process has searched for a noise multiplier, which takes seconds."""
    return noise_for.cache_info().misses
