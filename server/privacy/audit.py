"""Audit of differential privacy: compares a training function's stated epsilon with its leakage.

The function runs unmodified on canaries, and is attacked from outside. The attack yields two lower
bounds on epsilon, neither of which depends on how the function works:

- from repeated releases, by the distance between runs with an example and without it, interpreted
  as that of a Gaussian mechanism (the Gaussian-DP bound);
- from one run, by the number of its canaries guessed right (Steinke, Nasr, Jagielski 2023).

If the larger bound exceeds the stated epsilon, it refutes the statement. Start with `audit`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fedcore.privacy.accounting import Accountant, epsilon_of
from fedcore.privacy.planning import PrivatePlan
from fedcore.seeds import numpy_rng
from server.privacy.audit_bounds import (
    Distance,
    epsilon_at_least,
    mean_lower_bound,
    one_run_epsilon,
)
from server.privacy.canaries import CanaryRelease, Train, release

_BOUNDS = 2  # number of bounds per statement and seed
_SAMPLED_EPSILON = 0.1  # for distances under sampling: accountants err by 0.01 at 0
_MAX_STEPS = 4000  # training steps of one seed's releases: some 20 s on a core
_MIN_RELEASES = 40
_THRESHOLDS = np.linspace(0.01, 0.999, 200)  # quantiles of the pilot's scores
_SHARES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 1.0)  # shares of one run's canaries to guess


@dataclass(frozen=True)
class Statement:
    """The audited claim about one training run."""

    name: str
    plan: PrivatePlan
    target_delta: float
    accountant: Accountant = "prv"

    @property
    def epsilon(self) -> float:
        """The stated epsilon."""
        return epsilon_of(
            (self.plan.charge,), target_delta=self.target_delta, accountant=self.accountant
        )


@dataclass(frozen=True)
class Effort:
    """The work per seed; each canary costs a weight, each release a training run."""

    canaries: int = 128
    """Canaries in each of the repeated releases."""
    pilot: int = 60
    """Releases used only to choose thresholds; no bound is derived from them."""
    releases: int = 400
    one_run_canaries: int = 1500

    @property
    def trainings(self) -> int:
        """Number of calls of the audited function."""
        return self.pilot + self.releases + 1

    def within(self, steps: int) -> Effort:
        """Returns this effort, reduced to fewer releases if each takes many steps."""
        allowed = max(_MIN_RELEASES, _MAX_STEPS // max(1, steps))
        share = min(1.0, allowed / (self.pilot + self.releases))
        return replace(self, pilot=round(self.pilot * share), releases=round(self.releases * share))


USUAL_EFFORT = Effort()


@dataclass(frozen=True)
class SeedBounds:
    """The bounds from one seed's canaries."""

    seed: int
    repeated: float
    """Lower bound on epsilon from repeated releases."""
    one_run: float
    """Lower bound on epsilon from one run."""
    measured_noise: float
    """Noise multiplier observed in the releases. Proves nothing, but helps to locate a fault."""

    @property
    def epsilon(self) -> float:
        """The larger of the two lower bounds."""
        return max(self.repeated, self.one_run)


@dataclass(frozen=True)
class Audited:
    """The result of an audit of one statement."""

    statement: Statement
    stated: float
    """The stated epsilon."""
    seeds: tuple[SeedBounds, ...]
    confidence: float
    """Confidence in all bounds jointly."""

    @property
    def epsilon(self) -> float:
        """The audited epsilon: the largest lower bound of all seeds."""
        return max(bounds.epsilon for bounds in self.seeds)

    @property
    def refuted(self) -> bool:
        """Whether the releases contradict the statement."""
        return self.epsilon > self.stated


def audit(
    train: Train,
    statement: Statement,
    *,
    seeds: Sequence[int],
    confidence: float = 0.95,
    effort: Effort = USUAL_EFFORT,
    done: Callable[[int], None] = lambda trainings: None,
) -> Audited:
    """Attacks ``train`` and compares the lower bounds on epsilon with the statement.

    Guarantee:
        If the statement is true, `Audited.refuted` is true with a probability of at most ``1 -
        confidence``, over all seeds and bounds together (Bonferroni), provided that calls of
        ``train`` are independent. A false `Audited.refuted` proves nothing.

    Args:
        train: The audited training function.
        statement: The claim about it.
        seeds: Seeds of independent audits, from which their canaries are drawn.
        confidence: Joint confidence of all bounds.
        effort: Maximum effort per seed.
        done: Callback after each training with the number done so far, out of ``effort.trainings``
            per seed.
    """
    effort = effort.within(statement.plan.charge.steps)
    alone = 1 - (1 - confidence) / (len(seeds) * _BOUNDS)
    found = []
    for number, seed in enumerate(seeds):

        def tick(count: int, before: int = number * effort.trainings) -> None:
            done(before + count)

        found.append(_one_seed(train, statement, seed, alone, effort, tick))
    return Audited(statement, statement.epsilon, tuple(found), confidence)


def _one_seed(
    train: Train,
    statement: Statement,
    seed: int,
    confidence: float,
    effort: Effort,
    tick: Callable[[int], None],
) -> SeedBounds:
    rng = numpy_rng(seed, "canaries")

    def releases(count: int, before: int) -> list[CanaryRelease]:
        taken = []
        for number in range(count):
            taken.append(release(train, statement.plan, canaries=effort.canaries, rng=rng))
            tick(before + number + 1)
        return taken

    pilot = releases(effort.pilot, 0)
    rest = releases(effort.releases, effort.pilot)
    alone = release(train, statement.plan, canaries=effort.one_run_canaries, rng=rng)
    tick(effort.trainings)
    return SeedBounds(
        seed,
        repeated=_repeated(pilot, rest, statement, confidence),
        one_run=_one_run(pilot, alone, statement, confidence),
        measured_noise=_noise(rest, statement.plan.charge.steps),
    )


def _repeated(
    pilot: list[CanaryRelease],
    releases: list[CanaryRelease],
    statement: Statement,
    confidence: float,
) -> float:
    """Bounds epsilon by how well independent releases distinguish included canaries from others.

    A correct guess "included" scores 1, a correct guess "left out" exp(epsilon). A guess from any
    release scores in expectation at most half of ``exp(epsilon) + delta(epsilon)``, and so does the
    mean over the canaries of one release, however they are correlated. Releases are independent.
    """
    charge = statement.plan.charge
    epsilon = 0.0 if charge.sample_rate == 1 else _SAMPLED_EPSILON
    reward = math.exp(epsilon)
    scores = np.concatenate([one.scores for one in pilot])
    included = np.concatenate([one.included for one in pilot])
    threshold = max(
        np.quantile(scores, _THRESHOLDS),
        key=lambda tried: float(_earned(included, scores > tried, reward).mean()),
    )
    earned = [_earned(one.included, one.scores > threshold, reward).mean() for one in releases]
    mean = reward * mean_lower_bound(np.array(earned) / reward, confidence=confidence)
    seen = Distance(epsilon, 2 * mean - reward)
    return epsilon_at_least(seen, charge, target_delta=statement.target_delta)


def _earned(
    included: NDArray[np.bool_], guessed: NDArray[np.bool_], reward: float
) -> NDArray[np.float64]:
    return (included & guessed) + reward * (~included & ~guessed)


def _one_run(
    pilot: list[CanaryRelease], alone: CanaryRelease, statement: Statement, confidence: float
) -> float:
    """Bounds epsilon by guesses about one run's most conspicuous canaries on either side."""
    scores = np.concatenate([one.scores for one in pilot])
    included = np.concatenate([one.included for one in pilot])
    canaries = len(alone.scores)

    def bound(guesses: int, right: int) -> float:
        return one_run_epsilon(
            canaries=canaries,
            guesses=guesses,
            right=right,
            delta=statement.target_delta,
            confidence=confidence,
        )

    def expected(share: float) -> float:
        tried = _guesses(share, len(scores))
        rate = _right(included, scores, tried) / tried
        guesses = _guesses(share, canaries)
        return bound(guesses, math.floor(rate * guesses))

    guesses = _guesses(max(_SHARES, key=expected), canaries)
    return bound(guesses, _right(alone.included, alone.scores, guesses))


def _guesses(share: float, canaries: int) -> int:
    return 2 * max(1, round(share * canaries / 2)) if canaries > 1 else 0


def _right(included: NDArray[np.bool_], scores: NDArray[np.float64], guesses: int) -> int:
    """Counts correct guesses: half "left out" for low scores, half "included" for high ones."""
    order, half = np.argsort(scores, kind="stable"), guesses // 2
    return int((~included[order[:half]]).sum() + included[order[len(order) - half :]].sum())


def _noise(releases: list[CanaryRelease], steps: int) -> float:
    left_out = np.concatenate([one.scores[~one.included] for one in releases])
    return float(np.sqrt(np.square(left_out).mean() / steps))
