"""How a client trains under example-level privacy: its noise and steps, before it sees its data."""

from __future__ import annotations

from dataclasses import dataclass

from fedcore.config import Client, Privacy
from fedcore.errors import PrivacyError
from fedcore.privacy.accounting import Charge, noise_for
from fedcore.task import Examples, size_of


@dataclass(frozen=True)
class PrivatePlan:
    """How one client trains in one round, fixed before it touches its data."""

    charge: Charge
    clip_norm: float


def plan(
    examples: Examples, client: Client, privacy: Privacy, *, round: int, participations: int
) -> PrivatePlan:
    """The noise and the steps for a client of this size.

    With ``noise_multiplier = "auto"`` the noise is the least that keeps ``participations`` rounds
    within the budget; a client with few examples needs more of it than one with many.

    Raises:
        PrivacyError: the delta protects nobody on a client of this size, or no noise is enough.
    """
    count = size_of(examples)
    if privacy.target_delta * count >= 1:
        raise PrivacyError(
            f"privacy.target_delta = {privacy.target_delta:g} on a client of {count} examples: at "
            f"1/{count} or above, showing one of them to everyone would count as private. Nothing "
            "was trained; set it well below that."
        )
    steps_per_epoch = -(-size_of(examples) // client.batch_size)
    sample_rate = 1 / steps_per_epoch
    steps = steps_per_epoch * client.epochs
    noise = privacy.noise_multiplier
    if noise == "auto":
        noise = noise_for(
            max_epsilon=privacy.max_epsilon,
            target_delta=privacy.target_delta,
            sample_rate=sample_rate,
            steps=steps * participations,
            accountant=privacy.accountant,
        )
    return PrivatePlan(Charge(round, noise, sample_rate, steps), privacy.clip_norm)


def expected_batch_size(examples: int, plan: PrivatePlan) -> int:
    """What a step's noised sum is divided by: a batch's size in the mean, at least 1."""
    return max(1, round(examples * plan.charge.sample_rate))
