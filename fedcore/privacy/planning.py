"""Plans a client's example-level private training: noise and steps, without looking at its data."""

from __future__ import annotations

from dataclasses import dataclass

from fedcore.config.run import ClientConfig, Privacy
from fedcore.errors import PrivacyError
from fedcore.observability.words import counted
from fedcore.privacy.accounting import Charge, noise_for
from fedcore.task.definition import Examples, size_of

MAX_DELTA_SHARE = 0.1
"""Maximum of ``target_delta`` times a client's number of examples."""

MAX_EXAMPLES = 10**15
"""Maximum number of a client's examples: unrealistically high, but low enough that all derived
numbers stay within float range."""


@dataclass(frozen=True)
class PrivatePlan:
    """One client's training in one round, fixed before it touches its data."""

    charge: Charge
    clip_norm: float


def plan(
    examples: Examples,
    client: ClientConfig,
    privacy: Privacy,
    *,
    round: int,
    participations: int,
    epochs_in_all: int | None = None,
    max_delta_share: float = MAX_DELTA_SHARE,
    part: str = "",
) -> PrivatePlan:
    """Returns the noise and the steps for a client, which depend only on its number of examples.

    See `plan_for` for arguments and errors.
    """
    return plan_for(
        size_of(examples),
        client,
        privacy,
        round=round,
        participations=participations,
        epochs_in_all=epochs_in_all,
        max_delta_share=max_delta_share,
        part=part,
    )


def plan_for(
    count: int,
    client: ClientConfig,
    privacy: Privacy,
    *,
    round: int,
    participations: int,
    epochs_in_all: int | None = None,
    max_delta_share: float = MAX_DELTA_SHARE,
    part: str = "",
) -> PrivatePlan:
    """Returns the noise and the steps for a client of ``count`` examples.

    With ``noise_multiplier = "auto"`` the noise is the smallest that keeps ``participations``
    rounds within the budget; fewer examples need more noise. The plan depends only on the settings
    and the number of examples, which is public.

    Args:
        count: Number of the client's examples.
        client: The training settings of this round.
        privacy: The privacy settings, with the budget.
        round: Round of the charge.
        participations: Number of rounds that the noise is planned for.
        epochs_in_all: Epochs of all these rounds, where they differ from round to round; None where
            each round has those of ``client``.
        max_delta_share: Maximum of ``target_delta * count``. A mechanism that publishes one
            example, chosen at random, has a delta of ``1 / count``.
        part: Label of the examples, for the charge; empty if the client holds none back.

    Raises:
        PrivacyError: The client has no examples or more than `MAX_EXAMPLES`, the delta is too large
            to protect a client of this size, or no noise suffices.
    """
    if count < 1:
        raise PrivacyError(
            f"round {round}: this client has {counted(count, 'example')}. Nothing was trained; "
            "give the client data, or leave it out."
        )
    if count > MAX_EXAMPLES:
        raise PrivacyError(
            f"round {round}: a client has more than {MAX_EXAMPLES:g} examples, for which epsilon "
            "cannot be computed. Nothing was trained; give the real number of examples of one "
            "client."
        )
    if privacy.target_delta * count > max_delta_share * (1 + 1e-9):
        raise PrivacyError(
            f"privacy.target_delta = {privacy.target_delta:g} on a client of "
            f"{counted(count, 'example')} is above {max_delta_share:g}/{count} = "
            f"{max_delta_share / count:.3g}: at 1/{count}, publishing one of the examples would "
            f"count as private. Nothing was trained; set it to {max_delta_share / count:.3g} or "
            "less, or raise max_delta_share in the owner's file."
        )
    steps_per_epoch = -(-count // client.batch_size)
    sample_rate = 1 / steps_per_epoch
    steps = client.steps_of(count)
    noise = privacy.noise_multiplier
    if noise == "auto":
        noise = noise_for(
            max_epsilon=privacy.max_epsilon,
            target_delta=privacy.target_delta,
            sample_rate=sample_rate,
            steps=steps * participations
            if epochs_in_all is None
            else steps_per_epoch * epochs_in_all,
            accountant=privacy.accountant,
        )
    return PrivatePlan(Charge(round, noise, sample_rate, steps, part), privacy.clip_norm)


def expected_batch_size(examples: int, plan: PrivatePlan) -> int:
    """Returns the divisor of a step's noised sum: the expected batch size, at least 1."""
    return max(1, round(examples * plan.charge.sample_rate))
