"""What example-level privacy will cost a client: noise, epsilon by round, and what would help."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

from fedcore.config.run import ClientConfig, Privacy
from fedcore.errors import PrivacyError
from fedcore.privacy.accounting import Charge, epsilon_of
from fedcore.privacy.planning import MAX_DELTA_SHARE, plan_for

SHOWN_ROUNDS = 40
"""Rounds whose epsilon is computed, evenly spaced where there are more."""
MAX_ROUNDS = 10**6
"""How far it is looked for how long a budget lasts."""


@dataclass(frozen=True)
class Question:
    """Who trains, and how."""

    examples: int
    """Of one client; public."""
    participations: int
    """Rounds that it takes part in."""
    client: ClientConfig
    privacy: Privacy
    max_delta_share: float = MAX_DELTA_SHARE
    """See `fedcore.privacy.planning.plan_for`."""


@dataclass(frozen=True)
class Forecast:
    """What one answer to a `Question` comes to."""

    examples: int
    batch_size: float
    """Expected number of examples of a step."""
    participations: int
    noise_multiplier: float
    sample_rate: float
    steps_per_round: int
    gradients_per_round: int
    """Expected number of per-example gradients: what a round costs in computing."""
    epsilon: float
    """After the last round; at ``target_delta``."""
    step_noise: float
    """Deviation of the noise in a coordinate of one step's mean gradient, over ``clip_norm``."""
    run_noise: float
    """The same for the mean over all steps of all rounds: what averages out is out."""

    @property
    def steps(self) -> int:
        """Of all rounds."""
        return self.steps_per_round * self.participations


@dataclass(frozen=True)
class WhatIf:
    """One thing changed, all others as they were."""

    change: str
    forecast: Forecast | None
    """None where it is refused."""
    refused: str = ""


@dataclass(frozen=True)
class PlanResult:
    """The plan as asked for, its epsilon by round, and what would help."""

    forecast: Forecast
    epsilons: tuple[tuple[int, float], ...]
    """Round and the epsilon after it, as a ledger counts."""
    lasts: int
    """How many rounds the budget lasts for, `MAX_ROUNDS` at most, whatever is planned: after so
    many, epsilon by the accountant is within it, and one more would pass it."""
    what_if: tuple[WhatIf, ...]


def answer(question: Question) -> PlanResult:
    """Plans as a device would, and looks around.

    Raises:
        PrivacyError: the plan cannot be kept, or protects nobody.
    """
    charge = _charge(question)
    last = question.participations
    gap = max(1, math.ceil(last / SHOWN_ROUNDS))
    rounds = sorted({1, *range(gap, last + 1, gap), last})
    epsilons = tuple((number, _epsilon(question, charge, number)) for number in rounds)
    around = tuple(_try(change, other) for change, other in _around(question))
    return PlanResult(_forecast(question, charge), epsilons, _lasts(question, charge), around)


def _lasts(question: Question, charge: Charge) -> int:
    budget = question.privacy.max_epsilon
    low, high = 0, min(question.participations, MAX_ROUNDS)
    while _epsilon(question, charge, high) <= budget:
        if high == MAX_ROUNDS:
            return high
        low, high = high, min(2 * high, MAX_ROUNDS)
    rounds = range(low + 1, high)
    return low + bisect_right(rounds, budget, key=lambda n: _epsilon(question, charge, n))


def _charge(question: Question) -> Charge:
    return plan_for(
        question.examples,
        question.client,
        question.privacy,
        round=1,
        participations=question.participations,
        max_delta_share=question.max_delta_share,
    ).charge


def _epsilon(question: Question, charge: Charge, rounds: int) -> float:
    whole = Charge(1, charge.noise_multiplier, charge.sample_rate, charge.steps * rounds)
    privacy = question.privacy
    return epsilon_of([whole], target_delta=privacy.target_delta, accountant=privacy.accountant)


def _forecast(question: Question, charge: Charge) -> Forecast:
    batch_size = question.examples * charge.sample_rate
    step_noise = charge.noise_multiplier / batch_size
    steps = charge.steps * question.participations
    return Forecast(
        examples=question.examples,
        batch_size=batch_size,
        participations=question.participations,
        noise_multiplier=charge.noise_multiplier,
        sample_rate=charge.sample_rate,
        steps_per_round=charge.steps,
        gradients_per_round=question.examples * question.client.epochs,
        epsilon=_epsilon(question, charge, question.participations),
        step_noise=step_noise,
        run_noise=step_noise / math.sqrt(steps),
    )


def _around(question: Question) -> Iterator[tuple[str, Question]]:
    """Questions that differ in one thing, by a factor of two either way."""
    client, privacy, last = question.client, question.privacy, question.participations

    def ask(
        examples: int = question.examples,
        participations: int = last,
        batch_size: int = client.batch_size,
        target_delta: float = privacy.target_delta,
    ) -> Question:
        return Question(
            examples,
            participations,
            client.model_copy(update={"batch_size": batch_size}),
            privacy.model_copy(update={"target_delta": target_delta}),
            question.max_delta_share,
        )

    twice = 2 * question.examples  # may ask for a smaller delta
    delta = min(privacy.target_delta, question.max_delta_share / twice)
    lower = f" (delta {delta:.2g})" if delta < privacy.target_delta else ""
    yield f"twice the examples{lower}", ask(examples=twice, target_delta=delta)
    if question.examples > 1:
        yield "half the examples", ask(examples=question.examples // 2)
    yield "twice the rounds", ask(participations=2 * last)
    if last > 1:
        yield "half the rounds", ask(participations=last // 2)
    if client.batch_size < question.examples:
        yield "twice the batch", ask(batch_size=2 * client.batch_size)
    if client.batch_size > 1:
        yield "half the batch", ask(batch_size=min(client.batch_size, question.examples) // 2 or 1)


def _try(change: str, question: Question) -> WhatIf:
    try:
        return WhatIf(change, _forecast(question, _charge(question)))
    except PrivacyError as error:
        return WhatIf(change, None, str(error))
