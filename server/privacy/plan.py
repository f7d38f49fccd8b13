"""Forecast of example-level privacy for one client: noise, epsilon by round, and alternatives.

`plan_example_privacy` is part of the Python API, and takes a run's settings; `answer` takes a
`Question` with those that matter.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from fedcore.config.in_round import epochs_by_round
from fedcore.config.run import ClientConfig, Privacy, RunConfig
from fedcore.config.schedule import NO_SCHEDULE
from fedcore.config.settings import run_with
from fedcore.errors import ConfigError, PrivacyError
from fedcore.files import check_picture
from fedcore.privacy.accounting import Charge, epsilon_of
from fedcore.privacy.planning import MAX_DELTA_SHARE, plan_for

SHOWN_ROUNDS = 40
"""Maximum number of rounds whose epsilon is computed, evenly spaced."""
MAX_ROUNDS = 10**6
"""Limit of the search for the number of rounds that a budget lasts."""


@dataclass(frozen=True)
class Question:
    """The client's data and settings to plan for."""

    examples: int
    """Number of examples of one client; public."""
    participations: int
    """Number of rounds in which the client takes part."""
    client: ClientConfig
    privacy: Privacy
    max_delta_share: float = MAX_DELTA_SHARE
    """Limit on delta times the number of examples; see `fedcore.privacy.planning.plan_for`."""
    epochs: tuple[int, ...] = ()
    """Epochs of each round, where they have a schedule; the last ones hold in all rounds after."""

    def epochs_of(self, rounds: int) -> int:
        """Returns the epochs of the first rounds together, which have a schedule."""
        known = self.epochs[:rounds]
        return sum(known) + (rounds - len(known)) * self.epochs[-1]

    @property
    def first(self) -> ClientConfig:
        """The client's settings in the first round."""
        if not self.epochs:
            return self.client
        return self.client.model_copy(update={"epochs": self.epochs[0], "schedule": NO_SCHEDULE})


@dataclass(frozen=True)
class Forecast:
    """The privacy cost and noise that a `Question` results in."""

    examples: int
    batch_size: float
    """Expected number of examples per step."""
    participations: int
    noise_multiplier: float
    sample_rate: float
    steps_per_round: int
    """Steps of the first round."""
    steps: int
    """Total number of steps."""
    gradients_per_round: int
    """Expected number of per-example gradients in the first round: the computing cost."""
    epsilon: float
    """Epsilon after the last round, at ``target_delta``."""
    step_noise: float
    """Standard deviation of the noise per coordinate of one step's mean gradient, in clip norms."""
    run_noise: float
    """Standard deviation of the noise per coordinate of the mean gradient over all steps of all
    rounds, in clip norms."""


@dataclass(frozen=True)
class WhatIf:
    """A forecast with one setting changed."""

    change: str
    forecast: Forecast | None
    """None if the changed plan is rejected."""
    refused: str = ""


@dataclass(frozen=True)
class ExamplePrivacyPlan:
    """A plan from `fedcore.plan_example_privacy`: noise, epsilon by round, and alternatives.

    Example::

        plan = fedcore.plan_example_privacy(6000, privacy={"max_epsilon": 3.0})
        plan.forecast.noise_multiplier, plan.lasts
        print(plan)  # as a table
        plan.plot("plan.png")
    """

    question: Question = field(repr=False)
    """The settings that were planned for."""
    forecast: Forecast
    epsilons: tuple[tuple[int, float], ...]
    """Pairs of round and epsilon after it, as a ledger would compute them."""
    lasts: int
    """Number of rounds within the budget, whatever was planned; at most `MAX_ROUNDS`."""
    what_if: tuple[WhatIf, ...]

    def __str__(self) -> str:
        """Returns the plan as a table."""
        from server.privacy.plan_table import table

        return table(self)

    def plot(self, file: str | PathLike[str]) -> None:
        """Draws epsilon by round, and the noise of the alternatives.

        Args:
            file: Image file, ``.png``, ``.pdf`` or ``.svg``.

        Raises:
            ConfigError: the file's suffix is another.
            ResourceError: the file can't be written.
        """
        check_picture(Path(file), option="--plot")
        from server.privacy.plan_plot import plot

        plot(self, Path(file))


def plan_example_privacy(
    examples: int, run: RunConfig | str | PathLike[str] | None = None, **settings: Any
) -> ExamplePrivacyPlan:
    """Plans the privacy of single examples: what each client's noise and epsilon will be.

    It depends only on numbers that are public, and computes as devices do.

    Example::

        plan = fedcore.plan_example_privacy(
            6000, client={"batch_size": 64}, privacy={"max_epsilon": 3.0}, federation={"rounds": 30}
        )
        plan.forecast.noise_multiplier, plan.forecast.epsilon
        [(each.change, each.forecast) for each in plan.what_if]

    Args:
        examples: Number of examples of one client.
        run: The run, or its file; None for default settings.
        settings: Sections or settings of the run to override, such as ``client``, ``privacy`` and
            ``federation``. A client takes part in ``privacy.participations`` rounds, or in all.

    Raises:
        ConfigError: a setting or ``examples`` is not valid, or the run protects clients alone.
        PrivacyError: the plan is impossible, or protects nobody.
    """
    planned = run_to_plan(run, settings)
    if planned.privacy.unit == "client":
        raise ConfigError(
            f"run {planned.name!r}: privacy.unit = 'client' does not protect examples, which "
            "--examples plans. Nothing was planned; use --clients N, the number of clients that "
            "rounds draw from, or in Python fedcore.plan_client_privacy."
        )
    if examples < 1:
        raise ConfigError(
            f"--examples = {examples}: expected at least 1. Nothing was planned; give the number "
            "of examples of one client."
        )
    return answer(
        Question(
            examples=examples,
            participations=planned.privacy.participations or planned.federation.rounds,
            client=planned.client,
            privacy=planned.privacy,
            epochs=epochs_by_round(planned),
        )
    )


def run_to_plan(
    run: RunConfig | str | PathLike[str] | None, settings: Mapping[str, Any]
) -> RunConfig:
    """Returns the run to plan for: an object, a file, or when None one with default settings.

    Raises:
        ConfigError: the file can't be read, or a setting is not valid.
    """
    return run_with(RunConfig(name="plan", task="task.py") if run is None else run, settings)


def answer(question: Question) -> ExamplePrivacyPlan:
    """Computes the plan as a device would, and alternatives to it.

    Raises:
        PrivacyError: the plan is impossible, or protects nobody.
    """
    charge = _charge(question)
    last = question.participations
    gap = max(1, math.ceil(last / SHOWN_ROUNDS))
    rounds = sorted({1, *range(gap, last + 1, gap), last})
    epsilons = tuple((number, _epsilon(question, charge, number)) for number in rounds)
    around = tuple(_try(change, other) for change, other in _around(question))
    lasts = _lasts(question, charge)
    return ExamplePrivacyPlan(question, _forecast(question, charge), epsilons, lasts, around)


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
        question.first,
        question.privacy,
        round=1,
        participations=question.participations,
        epochs_in_all=_most_epochs(question),
        max_delta_share=question.max_delta_share,
    ).charge


def _most_epochs(question: Question) -> int | None:
    """Returns the epochs that noise is planned for; None without a schedule."""
    if not question.epochs:
        return None
    each = sorted(question.epochs, reverse=True)[: question.participations]
    return sum(each) + (question.participations - len(each)) * question.epochs[-1]


def _steps(question: Question, charge: Charge, rounds: int) -> int:
    """Returns the steps of the first rounds together."""
    if not question.epochs:
        return charge.steps * rounds
    return charge.steps // question.epochs[0] * question.epochs_of(rounds)


def _epsilon(question: Question, charge: Charge, rounds: int) -> float:
    steps = _steps(question, charge, rounds)
    whole = Charge(1, charge.noise_multiplier, charge.sample_rate, steps)
    privacy = question.privacy
    return epsilon_of([whole], target_delta=privacy.target_delta, accountant=privacy.accountant)


def _forecast(question: Question, charge: Charge) -> Forecast:
    batch_size = question.examples * charge.sample_rate
    step_noise = charge.noise_multiplier / batch_size
    steps = _steps(question, charge, question.participations)
    return Forecast(
        examples=question.examples,
        batch_size=batch_size,
        participations=question.participations,
        noise_multiplier=charge.noise_multiplier,
        sample_rate=charge.sample_rate,
        steps_per_round=charge.steps,
        steps=steps,
        gradients_per_round=round(question.examples * question.first.passes_of(question.examples)),
        epsilon=_epsilon(question, charge, question.participations),
        step_noise=step_noise,
        run_noise=step_noise / math.sqrt(steps),
    )


def _around(question: Question) -> Iterator[tuple[str, Question]]:
    """Yields questions that change one setting each, by a factor of two up or down."""
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
            question.epochs,
        )

    twice = 2 * question.examples  # may require a smaller delta
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
