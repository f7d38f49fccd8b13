"""Forecast of client-level privacy for a run."""

from __future__ import annotations

from dataclasses import dataclass

from fedcore.config.run import RunConfig
from fedcore.observability.words import counted, epsilon_text
from server.rounds.client_privacy.mechanism import allows, epsilon, protect


@dataclass(frozen=True)
class ClientAnswer:
    """The forecast of a run with client-level privacy."""

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


def plan_clients(run: RunConfig, clients: int) -> ClientAnswer:
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
    return ClientAnswer(
        clients=clients,
        cohort=plan.expected,
        rounds=rounds,
        noise_multiplier=plan.noise_multiplier,
        sample_rate=plan.sample_rate,
        separation=plan.separation,
        lasts=low,
        epsilons=tuple((one, epsilon(run, protection, rounds=one)) for one in points),
    )


def client_table(found: ClientAnswer, run: RunConfig) -> str:
    """Formats the forecast as text."""
    settings = run.privacy.client
    drawn = f"each drawn with probability {found.sample_rate:.3g}"
    if found.separation is not None:
        drawn = f"none selected twice in {counted(found.separation, 'round')}"
    lasts = "all of them"
    if found.lasts < found.rounds:
        lasts = f"{found.lasts} of them; the run ends before the next one"
    return "\n".join(
        [
            f"Client-level privacy of {counted(found.clients, 'client')}, {found.cohort} a round "
            f"({drawn}), {counted(found.rounds, 'round')}, mechanism {settings.mechanism}.",
            f"noise_multiplier {found.noise_multiplier:.4g}; the budget of epsilon "
            f"{settings.max_epsilon:g} at delta {settings.target_delta:g} lasts for {lasts}.",
            *(
                f"  after {counted(number, 'round')}: epsilon {epsilon_text(value)}"
                for number, value in found.epsilons
            ),
        ]
    )
