"""What protecting whole clients will cost a run, before anything runs."""

from __future__ import annotations

from dataclasses import dataclass

from fedcore.config.run import RunConfig
from fedcore.observability.words import counted, epsilon_text
from server.rounds.client_privacy import allows, epsilon, protect


@dataclass(frozen=True)
class ClientAnswer:
    """The plan of a run that protects its clients."""

    clients: int
    cohort: int
    """Clients a round, in expectation."""
    rounds: int
    """That the run asks for."""
    noise_multiplier: float
    sample_rate: float
    """The probability with which a round draws a client; 1 where it is not counted on."""
    separation: int | None
    """Rounds in which no client is asked twice, under correlated noise; None elsewhere."""
    lasts: int
    """Rounds that the budget allows, of those asked for."""
    epsilons: tuple[tuple[int, float], ...]
    """Of the models of so many rounds together."""


def plan_clients(run: RunConfig, clients: int) -> ClientAnswer:
    """Counts as a run does that has so many clients.

    Args:
        run: With ``privacy.unit`` "client" or "both".
        clients: Those that rounds draw from.

    Raises:
        PrivacyError: the delta protects nobody among so few, or no noise is enough.
        BudgetExhausted: the budget does not allow even one round.
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
    """The plan as lines of text."""
    settings = run.privacy.client
    drawn = f"each drawn with probability {found.sample_rate:.3g}"
    if found.separation is not None:
        drawn = f"none asked twice in {counted(found.separation, 'round')}"
    lasts = "all of them"
    if found.lasts < found.rounds:
        lasts = f"{found.lasts} of them: the run ends before the next one"
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
