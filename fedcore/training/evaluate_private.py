"""One client's evaluation under example-level privacy: charge first, then sums with noise."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fedcore.config.run import RunConfig
from fedcore.errors import InvalidUpdate
from fedcore.files import sha256_hex
from fedcore.privacy.contributions import contribution_bounds, statistics_limits
from fedcore.privacy.evaluation_noise import evaluation_charge
from fedcore.privacy.ledger import Ledger, charge
from fedcore.task.definition import Examples
from fedcore.task.measured import Measured
from fedcore.task.model import FullModel
from fedcore.training.client import Client, split_of
from fedcore.training.evaluate import output_shape
from fedcore.training.noised_evaluation import (
    Answer,
    answer_of,
    check_keeps_nothing,
    noised_evaluation,
)
from fedcore.training.server_numbers import check_instruction
from fedcore.updates.messages import Instruction


def check_evaluates(run: RunConfig) -> None:
    """Checks that a private run plans evaluations by clients, before any data are read.

    Raises:
        InvalidUpdate: It does not.
    """
    if not run.evaluates_privately or run.client_private:
        raise InvalidUpdate(
            "evaluation: this client trains with example-level privacy and releases no metrics; "
            "its run sets neither federation.evaluate_cohort nor federation.holdout."
        )


def evaluate_privately(
    client: Client,
    name: str,
    model: FullModel,
    instruction: Instruction,
    held_out: Examples,
    ledger: Ledger,
    *,
    initial: bool,
    on_spend: Callable[[Ledger], None],
    between: Callable[[], None],
) -> Measured:
    """Charges one evaluation, and returns the primary metric's sums with noise.

    Args:
        client: The task, the settings and the limits.
        name: Name of the client.
        model: The model to evaluate, on its device.
        instruction: The server's request.
        held_out: The client's held-out examples, not empty.
        ledger: The client's privacy ledger.
        initial: Whether the model's local layers are the server's initial ones.
        on_spend: Callback with the charged ledger, before an example is read for the evaluation.
        between: Callback between batches, which may depend on elapsed time only.

    Raises:
        FedcoreError: Evaluation was refused, for reasons that do not depend on examples.
    """
    check_instruction(instruction, model, initial=initial)
    example = client.task.example_input
    check_keeps_nothing(model, example)
    digest = sha256_hex(instruction.weights.tobytes() + instruction.preprocess)
    return measure_privately(
        client,
        name,
        answer_of(model),
        output_shape(model, example),
        held_out,
        ledger,
        round=instruction.round,
        digest=digest,
        on_spend=on_spend,
        between=between,
    )


def measure_privately(
    client: Client,
    name: str,
    answer: Answer,
    outputs: tuple[int, ...],
    held_out: Examples,
    ledger: Ledger,
    *,
    round: int,
    digest: str,
    on_spend: Callable[[Ledger], None],
    between: Callable[[], None] | None = None,
) -> Measured:
    """Charges one evaluation of any model, and returns the primary metric's sums with noise.

    Args:
        client: The task, the settings and the limits.
        name: Name of the client.
        answer: The model.
        outputs: Shape of its outputs for one example.
        held_out: The client's held-out examples, not empty.
        ledger: The client's privacy ledger.
        round: Round of the charge.
        digest: Digest of the model: simulated noise differs from model to model.
        on_spend: Callback with the charged ledger, before an example is read for the evaluation.
        between: Callback between batches, which may depend on elapsed time only.

    Raises:
        ConfigError: The primary metric cannot be evaluated with noise.
        BudgetExhausted: The charge would exceed the budget.
    """
    run, metric = client.run, client.task.primary
    limits = statistics_limits(metric, outputs)
    bounds = contribution_bounds(metric, limits, run.privacy.evaluation_limits)
    new = evaluation_charge(run, round=round, split=split_of(client, held_out))
    after = charge(ledger, new, run.privacy, client=name, owner=client.owner, others=client.others)
    on_spend(after)  # spend before release
    return noised_evaluation(
        answer,
        held_out,
        metric,
        bounds,
        noise_multiplier=new.noise_multiplier,
        draws=client.randomness.draws(torch.device("cpu"), "evaluation", round, name, digest),
        between=between,
    )
