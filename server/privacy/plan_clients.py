"""Forecast of client-level privacy for a run.

`plan_client_privacy` is part of the Python API; `plan_clients` is its computation.
"""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from typing import Any

from fedcore.config.run import MAX_CLIENTS, RunConfig
from fedcore.errors import ConfigError
from fedcore.observability.words import counted, epsilon_text
from server.privacy.plan import run_to_plan
from server.rounds.client_privacy.mechanism import allows, epsilon, protect


@dataclass(frozen=True)
class ClientPrivacyPlan:
    """A plan from `fedcore.plan_client_privacy`: the noise of a run, and its epsilon by round.

    Example::

        plan = fedcore.plan_client_privacy(500, federation={"cohort": 50, "rounds": 20})
        plan.noise_multiplier, plan.lasts
        print(plan)
    """

    mechanism: str
    """How noise is added, ``gaussian`` or ``matrix`` (correlated between rounds)."""
    max_epsilon: float
    """The budget."""
    target_delta: float
    clients: int
    cohort: int
    """Expected number of clients per round."""
    rounds: int
    """Number of rounds configured."""
    noise_multiplier: float
    sample_rate: float
    """Probability that a round samples a client; 1 if sampling isn't used for amplification."""
    separation: int | None
    """Number of consecutive rounds in which no client takes part twice, under correlated noise;
    None otherwise."""
    lasts: int
    """Number of configured rounds that the budget allows."""
    epsilons: tuple[tuple[int, float], ...]
    """Pairs of a number of rounds and the epsilon of their models together."""

    def __str__(self) -> str:
        """Returns the plan as text."""
        drawn = f"each drawn with probability {self.sample_rate:.3g}"
        if self.separation is not None:
            drawn = f"none selected twice in {counted(self.separation, 'round')}"
        lasts = "all of them"
        if self.lasts < self.rounds:
            lasts = f"{self.lasts} of them; the run ends before the next one"
        return "\n".join(
            [
                f"Client-level privacy of {counted(self.clients, 'client')}, {self.cohort} a round "
                f"({drawn}), {counted(self.rounds, 'round')}, mechanism {self.mechanism}.",
                f"noise_multiplier {self.noise_multiplier:.4g}; the budget of epsilon "
                f"{self.max_epsilon:g} at delta {self.target_delta:g} lasts for {lasts}.",
                *(
                    f"  after {counted(number, 'round')}: epsilon {epsilon_text(value)}"
                    for number, value in self.epsilons
                ),
            ]
        )


def plan_client_privacy(
    clients: int, run: RunConfig | str | PathLike[str] | None = None, **settings: Any
) -> ClientPrivacyPlan:
    """Plans the privacy of whole clients: the server's noise, and epsilon by round.

    Example::

        plan = fedcore.plan_client_privacy(
            500,
            federation={"cohort": 50, "rounds": 20},
            privacy={"client": {"max_epsilon": 3.0}},
        )
        plan.noise_multiplier, plan.lasts, plan.epsilons[-1]

    Args:
        clients: Number of clients that rounds sample from.
        run: The run, or its file, with ``privacy.unit`` "client" or "both"; None for default
            settings.
        settings: Sections or settings of the run to override, such as ``federation`` and
            ``privacy``.

    Raises:
        ConfigError: a setting or ``clients`` is not valid, or the run protects no clients.
        PrivacyError: the delta protects nobody among so few clients, or no noise is enough.
        BudgetExhausted: the budget doesn't allow even one round.
    """
    planned = run_to_plan(run, settings)
    if run is None and planned.privacy.unit == "none":
        privacy = planned.privacy.model_copy(update={"unit": "client"})
        planned = planned.model_copy(update={"privacy": privacy})
    if not planned.client_private:
        raise ConfigError(
            f"run {planned.name!r}: privacy.unit = {planned.privacy.unit!r} protects no clients. "
            "Nothing was planned; plan privacy of examples with --examples (in Python "
            "fedcore.plan_example_privacy), or set the unit to 'client'."
        )
    if not 1 <= clients <= MAX_CLIENTS:
        raise ConfigError(
            f"--clients = {clients}: expected 1 to {MAX_CLIENTS}. Nothing was planned; give the "
            "number of clients that rounds draw from."
        )
    return plan_clients(planned, clients)


def plan_clients(run: RunConfig, clients: int) -> ClientPrivacyPlan:
    """Forecasts client-level privacy of a run, with the accounting that the run uses.

    Args:
        run: A run with ``privacy.unit`` "client" or "both".
        clients: Number of clients that rounds sample from.

    Raises:
        PrivacyError: the delta protects nobody among so few clients, or no noise is enough.
        BudgetExhausted: the budget doesn't allow even one round.
    """
    rounds = run.federation.rounds
    protection = protect(run, clients=clients, cohort=run.federation.cohort or clients)
    low, high = 1, rounds + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if allows(run, protection, rounds=middle) else (low, middle)
    points = sorted({1, max(rounds // 4, 1), max(rounds // 2, 1), rounds})
    plan = protection.plan
    settings = run.privacy.client
    return ClientPrivacyPlan(
        mechanism=settings.mechanism,
        max_epsilon=settings.max_epsilon,
        target_delta=settings.target_delta,
        clients=clients,
        cohort=plan.expected,
        rounds=rounds,
        noise_multiplier=plan.noise_multiplier,
        sample_rate=plan.sample_rate,
        separation=plan.separation,
        lasts=low,
        epsilons=tuple((one, epsilon(run, protection, rounds=one)) for one in points),
    )
