"""Plans private fine-tuning: noise and steps, from settings and the number of examples alone."""

from __future__ import annotations

from fedcore.config.run import RunConfig
from fedcore.errors import PrivacyError
from fedcore.observability.words import counted
from fedcore.privacy.accounting import Charge, noise_for
from fedcore.privacy.planning import MAX_DELTA_SHARE, PrivatePlan


def plan_of(run: RunConfig, count: int) -> PrivatePlan:
    """Returns the noise and the steps of fine-tuning on ``count`` examples, a public number.

    Raises:
        PrivacyError: ``finetune.privacy.target_delta`` is too large for so many examples, or no
            noise suffices.
    """
    settings, privacy = run.finetune, run.finetune.privacy
    most = MAX_DELTA_SHARE / count
    if privacy.target_delta > most * (1 + 1e-9):
        raise PrivacyError(
            f"finetune.privacy.target_delta = {privacy.target_delta:g} on "
            f"{counted(count, 'example')} is above a tenth of one over their number: at 1/{count}, "
            f"publishing one of them would count as private. Nothing was trained; set it to "
            f"{most:.3g} or less."
        )
    per_epoch = -(-count // settings.batch_size)
    steps, noise = per_epoch * settings.epochs, privacy.noise_multiplier
    if noise == "auto":
        noise = noise_for(
            max_epsilon=privacy.max_epsilon,
            target_delta=privacy.target_delta,
            sample_rate=1 / per_epoch,
            steps=steps * privacy.trainings,
            accountant=run.privacy.accountant,
        )
    return PrivatePlan(Charge(0, noise, 1 / per_epoch, steps), privacy.clip_norm)


def with_noise(run: RunConfig, plan: PrivatePlan) -> RunConfig:
    """Returns the run with the plan's noise in place of ``auto``, which takes seconds to find."""
    noise = {"noise_multiplier": plan.charge.noise_multiplier}
    privacy = run.finetune.privacy.model_copy(update=noise)
    finetune = run.finetune.model_copy(update={"privacy": privacy})
    return run.model_copy(update={"finetune": finetune})
