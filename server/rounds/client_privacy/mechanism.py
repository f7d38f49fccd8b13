"""Client-level differential privacy on the server: sampling, noise and the accounting of its cost.

`fedcore.privacy.client_level` bounds each update. Here, a round's differences to the weights that
were sent are summed with equal weights. Noise is added to the sum, which is divided by the expected
number of clients: neither depends on which clients took part. A missing or rejected update counts
as a zero difference. Start with `protect` and `release`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch

from fedcore.artifacts.manifest import ClientStatement
from fedcore.config.client_privacy import ClientPrivacy
from fedcore.config.run import RunConfig
from fedcore.errors import BudgetExhausted, PrivacyError, RoundFailed
from fedcore.observability.words import counted, epsilon_text, is_or_are
from fedcore.privacy.accounting import Charge, epsilon_of, noise_for
from fedcore.privacy.client_level import SLACK, Bound
from fedcore.privacy.draws import Draws, SimulatedDraws, SystemDraws
from fedcore.privacy.matrix import Factor, factor_for, participations_of
from fedcore.seeds import Randomness
from fedcore.updates.pack import Vector
from server.rounds.aggregation.exact_mean import STEP, ExactMean
from server.rounds.client_privacy.protection import ClientPlan, Protection
from server.rounds.cohort import select

_LEAST_DELTA_SHARE = 0.1
_FIRST_CLIP_NORM, _QUANTILE, _CLIP_RATE = 0.1, 0.5, 0.2  # Andrew et al. 2021, section 3
_BIT_DEVIATION = 1 / 20  # noise on the count of unclipped updates, per expected client
_FAR_DEVIATIONS = 100.0  # in deviations: a bound that no earlier round's noise reaches
_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Released:
    """Result of one round of training: the new weights and the state of client-level privacy."""

    weights: Vector
    protection: Protection | None
    """State after the round; None without client-level privacy."""


def draws_of(randomness: Randomness, *words: str | int) -> Draws:
    """Returns the source of the server's random numbers for the purpose that ``words`` name."""
    if randomness.origin == "system":
        return SystemDraws()
    cpu = torch.device("cpu")
    return SimulatedDraws(
        sampling=randomness.generator(cpu, *words, "sampling"),
        noise=randomness.generator(cpu, *words, "noise"),
    )


def protect(run: RunConfig, *, clients: int, cohort: int) -> Protection:
    """Returns the initial privacy state of a run, with its noise multiplier and sampling scheme.

    Args:
        run: Configuration of the run.
        clients: Number of clients that rounds draw from.
        cohort: Number of clients per round.

    Raises:
        PrivacyError: the delta is too large for so few clients, no noise meets the budget, or the
            separation needs more clients.
        BudgetExhausted: the budget does not allow even one round.
    """
    settings = run.privacy.client
    if settings.target_delta * clients > _LEAST_DELTA_SHARE:
        raise PrivacyError(
            f"privacy.client.target_delta = {settings.target_delta:g} with "
            f"{counted(clients, 'client')}: expected at most {_LEAST_DELTA_SHARE / clients:.2g}, "
            "a tenth of one over their number, because publishing one client's data with "
            "probability delta would count as private. Nothing was trained; lower it."
        )
    separation = _separation(settings, clients, cohort)
    plan = ClientPlan(clients, min(cohort, clients), 1.0, separation)
    noise = settings.noise_multiplier
    if noise == "auto":
        noise = _least_noise(run, plan)
    plan = replace(plan, noise_multiplier=noise)
    first = _FIRST_CLIP_NORM if settings.clip_norm == "adaptive" else settings.clip_norm
    protection = Protection(plan, first)
    if not allows(run, protection, rounds=1):
        needed = epsilon(run, protection, rounds=1)
        raise BudgetExhausted(
            f"round 1: it would spend epsilon {epsilon_text(needed)} of "
            f"privacy.client.max_epsilon = {settings.max_epsilon:g} at noise_multiplier = "
            f"{noise:g}. Nothing was trained; raise either, or set noise_multiplier to 'auto'."
        )
    return protection


def charge(run: RunConfig, protection: Protection, *, rounds: int) -> Charge:
    """Returns the privacy cost of the models of the first ``rounds`` rounds together.

    Under correlated noise they are one Gaussian mechanism. Its sensitivity is that of the most
    rounds in which a single client can have taken part so far.
    """
    plan = protection.plan
    if plan.separation is None:
        return Charge(rounds, plan.noise_multiplier, plan.sample_rate, rounds)
    moved = factor(run, plan.separation).sensitivity(participations_of(rounds, plan.separation))
    return Charge(rounds, plan.noise_multiplier / moved, 1.0, 1)


def epsilon(run: RunConfig, protection: Protection, *, rounds: int) -> float:
    """Returns the client-level epsilon of the models of the first ``rounds`` rounds together."""
    settings = run.privacy.client
    return epsilon_of(
        [charge(run, protection, rounds=rounds)] if rounds else [],
        target_delta=settings.target_delta,
        accountant=settings.accountant,
    )


def allows(run: RunConfig, protection: Protection, *, rounds: int) -> bool:
    """Whether ``rounds`` rounds stay within the run's budget."""
    return epsilon(run, protection, rounds=rounds) <= run.privacy.client.max_epsilon


def draw(
    run: RunConfig, protection: Protection, connected: Sequence[int], draws: Draws, *, number: int
) -> list[int]:
    """Draws the nodes that a round asks.

    Where accounting relies on subsampling, each node is drawn independently. Otherwise the expected
    number of clients is drawn from nodes not asked in the last ``separation - 1`` rounds.

    Raises:
        RoundFailed: too few clients are connected.
    """
    plan = protection.plan
    lately = {node for nodes in protection.recent_cohorts for node in nodes}
    free = connected if not lately else [node for node in connected if node not in lately]
    if len(free) < plan.expected:
        rested = (
            ""
            if plan.separation in (None, 1)
            else (f" not selected in the {counted(plan.separation - 1, 'round')} before")
        )
        raise RoundFailed(
            f"round {number}: {counted(len(free), 'client')} {is_or_are(len(free))} "
            f"available{rested}, but the round needs {plan.expected}. It was not started, and no "
            "epsilon was spent on it; wait for more clients, or start over with a lower "
            "federation.cohort or privacy.client.separation."
        )
    if plan.separation is None:
        return [free[int(place)] for place in draws.poisson(len(free), plan.sample_rate)]
    return select(free, plan.expected, seed=run.seed, words=("round", number))


def bound_of(run: RunConfig, protection: Protection, start: Vector) -> Bound:
    """Returns the bound on each update of the next round."""
    return Bound(start, protection.clip_norm, adaptive=run.privacy.client.clip_norm == "adaptive")


def release(
    run: RunConfig,
    protection: Protection,
    start: Vector,
    updates: ExactMean,
    *,
    nodes: Sequence[int],
    unclipped: int,
    draws: Draws,
) -> Released:
    """Returns the start weights plus the noised mean of a round's differences to them.

    Guarantee:
        The deviation of the noise on the sum is ``noise_multiplier`` times the most that one client
        can move the sum: its bound, the slack that `Bound.check` allows, and fixed-point rounding.
        Where the bound is adaptive, it is larger, so that the released bits cost nothing in
        addition.

    Args:
        run: Configuration of the run.
        protection: State before the round.
        start: Weights that clients were sent.
        updates: Sum of the updates, each with weight 1.
        nodes: Nodes that the round asked, whether or not they replied.
        unclipped: Number of updates that were within the bound before clipping; used only where the
            bound is adaptive.
        draws: Random numbers used only for this round and purpose.
    """
    plan, settings = protection.plan, run.privacy.client
    adaptive = settings.clip_norm == "adaptive"
    moved = protection.clip_norm * (1 + SLACK) + math.sqrt(len(start)) * STEP
    noise = plan.noise_multiplier
    if adaptive:
        noise = noise_beside_bits(noise, _bit_deviation(plan))
    noised = updates.differences(start)
    deviation, most = noise * moved, plan.clients * moved
    if plan.separation is None:
        draws.add_noise([torch.from_numpy(noised)], deviation=deviation, bound=most)
        after = protection
    else:
        matrix = factor(run, plan.separation)
        bands, total = len(matrix.column), noised.copy()
        noised -= matrix.carried(len(noised), protection.noise)
        most += _FAR_DEVIATIONS * bands * deviation
        draws.add_noise([torch.from_numpy(noised)], deviation=deviation, bound=most)
        after = replace(
            protection,
            recent_cohorts=_last((*protection.recent_cohorts, tuple(nodes)), plan.separation - 1),
            noise=_last((*protection.noise, noised - total), bands - 1),
        )
    if adaptive:
        after = replace(after, clip_norm=_adapted(protection, updates.count, unclipped, draws))
    weights = (start + noised / plan.expected).astype(np.float32)
    return Released(weights, after)


def statement(run: RunConfig, protection: Protection, *, rounds: int) -> ClientStatement:
    """Returns the privacy guarantee of the models of ``rounds`` rounds, for the manifest."""
    settings, plan = run.privacy.client, protection.plan
    return ClientStatement(
        epsilon=epsilon(run, protection, rounds=rounds),
        target_delta=settings.target_delta,
        mechanism=settings.mechanism,
        noise_multiplier=plan.noise_multiplier,
        clip_norm=settings.clip_norm,
        sample_rate=plan.sample_rate,
        separation=plan.separation,
        clients=plan.clients,
        rounds=rounds,
        accountant=settings.accountant,
    )


def factor(run: RunConfig, separation: int) -> Factor:
    """Returns the factor that defines how the noise is correlated over rounds."""
    return factor_for(run.federation.rounds, separation)


def noise_beside_bits(noise_multiplier: float, bit_deviation: float) -> float:
    """Returns the noise multiplier on updates when bits are released in addition to them.

    With it, updates and bits together cost as much privacy as updates by themselves with
    ``noise_multiplier``.

    Source:
        Andrew et al. 2021, arXiv:1905.03871, theorem 1.
    """
    return 1 / math.sqrt(noise_multiplier**-2 - (2 * bit_deviation) ** -2)


def _last(values: tuple[_Value, ...], count: int) -> tuple[_Value, ...]:
    return values[-count:] if count else ()


def _bit_deviation(plan: ClientPlan) -> float:
    """Returns the deviation of the noise on the sum of bits, each 1/2 if unclipped, else -1/2.

    It is large enough for the bits to take at most a quarter of a round's privacy cost.
    """
    return max(_BIT_DEVIATION * plan.expected, plan.noise_multiplier)


def _adapted(protection: Protection, updates: int, unclipped: int, draws: Draws) -> float:
    """Returns the next bound: larger where more than the target share of updates was clipped."""
    plan = protection.plan
    bits = torch.tensor([unclipped - updates / 2])
    draws.add_noise([bits], deviation=_bit_deviation(plan), bound=plan.clients / 2)
    share = min(max(float(bits[0]) / plan.expected + 0.5, 0.0), 1.0)
    return protection.clip_norm * math.exp(-_CLIP_RATE * (share - _QUANTILE))


def _separation(settings: ClientPrivacy, clients: int, cohort: int) -> int | None:
    """Returns the number of consecutive rounds in which no client is asked twice.

    None under the Gaussian mechanism, where each round draws independently.

    Raises:
        PrivacyError: there are too few clients for the separation that is set.
    """
    if settings.mechanism == "gaussian":
        return None
    most = max(1, clients // cohort)
    if (settings.separation or 1) > most:
        raise PrivacyError(
            f"privacy.client.separation = {settings.separation}: with "
            f"{counted(clients, 'client')} and {cohort} of them a round, each is selected again "
            f"after {counted(most, 'round')} at the latest. Nothing was trained; lower it, or "
            "federation.cohort."
        )
    return settings.separation or most


def _least_noise(run: RunConfig, plan: ClientPlan) -> float:
    settings, rounds = run.privacy.client, run.federation.rounds
    whole = charge(run, Protection(plan, 1.0), rounds=rounds)
    found = noise_for(
        max_epsilon=settings.max_epsilon,
        target_delta=settings.target_delta,
        sample_rate=whole.sample_rate,
        steps=whole.steps,
        accountant=settings.accountant,
    )
    # `plan` has a noise multiplier of 1, so this is its equivalent over all rounds.
    return found / whole.noise_multiplier
