"""How much noise an evaluation by a client has, and what it costs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedcore.privacy.accounting import HELD_OUT, Charge, noise_for, part_of_split

if TYPE_CHECKING:
    from fedcore.config.run import RunConfig

_GATE = 2  # evaluations by the gate: the model before and after fine-tuning


def planned_evaluations(run: RunConfig) -> int:
    """Returns how many evaluations by one client the budget is planned for."""
    return run.privacy.evaluations or _GATE + len(run.compression.candidates)


def evaluation_noise(run: RunConfig) -> float:
    """Returns the noise multiplier of an evaluation: deviation over the norm of a contribution.

    Raises:
        PrivacyError: no noise keeps the planned evaluations within the budget.
    """
    privacy = run.privacy
    if privacy.evaluation_noise_multiplier != "auto":
        return privacy.evaluation_noise_multiplier
    return noise_for(
        max_epsilon=privacy.max_epsilon,
        target_delta=privacy.target_delta,
        sample_rate=1.0,
        steps=planned_evaluations(run),
        accountant=privacy.accountant,
    )


def evaluation_charge(run: RunConfig, *, round: int, split: str) -> Charge:
    """Returns the charge for one evaluation on the held-out part of a split."""
    return Charge(round, evaluation_noise(run), 1.0, 1, part_of_split(split, HELD_OUT))
