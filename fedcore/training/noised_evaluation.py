"""Evaluation with example-level differential privacy: a metric's sums, with noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fedcore.errors import PrivacyError
from fedcore.privacy.contributions import ContributionBounds
from fedcore.privacy.draws import FLOAT_MARGIN, Draws
from fedcore.seeds import kept_streams, pin_streams
from fedcore.task.definition import Examples, size_of
from fedcore.task.measured import Measured
from fedcore.task.metrics import Metric
from fedcore.task.statistics import FloatVector
from fedcore.training.per_example.clipped_sum import Batch, read_batch

Answer = Callable[[Tensor], Tensor]
"""Returns a model's outputs ``(1, ...)`` for the inputs ``(1, ...)`` of one example."""


class ClippedSums(NamedTuple):
    """Sums of clipped contributions without noise, which must not leave the device."""

    shares: FloatVector
    """Each sum over its scale, shape ``(K,)``."""
    skipped: int
    """Number of examples that count as zero."""


def noised_evaluation(
    answer: Answer,
    examples: Examples,
    metric: Metric,
    bounds: ContributionBounds,
    *,
    noise_multiplier: float,
    draws: Draws,
    between: Callable[[], None] | None = None,
) -> Measured:
    """Returns a metric's sums over examples, with Gaussian noise.

    Guarantee:
        One Gaussian mechanism without sampling, with noise of ``noise_multiplier`` times the L2
        norm that one example can move the sums by (see `clipped_sums`). Nothing else of the result
        depends on the examples but their number, and no exception does.

    Args:
        answer: The model.
        examples: The held-out data; their number is public.
        metric: A metric with `fedcore.Statistics`.
        bounds: From `fedcore.privacy.contributions.contribution_bounds`.
        noise_multiplier: Of the charge that was made for it.
        draws: Source of the noise.
        between: Callback before each batch of examples, which may depend on elapsed time only.
    """
    shares, _ = clipped_sums(answer, examples, metric, bounds, seed=draws.seed(), between=between)
    count = size_of(examples)
    noised = torch.from_numpy(shares)
    deviation = noise_multiplier * (1 + FLOAT_MARGIN) * bounds.norm
    draws.add_noise([noised], deviation=deviation, bound=max(count, 1) * bounds.norm)
    return Measured(count, {metric.name: noised.numpy() * bounds.scale})


def clipped_sums(
    answer: Answer,
    examples: Examples,
    metric: Metric,
    bounds: ContributionBounds,
    *,
    seed: int,
    between: Callable[[], None] | None = None,
) -> ClippedSums:
    """Adds up what each example, clipped, contributes to a metric's sums.

    Guarantee:
        Replacing one example by a null record, which counts as zero, changes ``shares`` by at most
        ``bounds.norm`` in L2 norm, whatever model, metric and examples are: the model answers each
        example in a batch of its own. An example that cannot be read, or on which model or metric
        fail, counts as zero.

    Args:
        answer: The model.
        examples: The data.
        metric: A metric with `fedcore.Statistics`.
        bounds: What one example may contribute.
        seed: Of randomness in data set, model and metric.
        between: Callback before each batch of examples.
    """
    assert metric.statistics is not None
    total, done = np.zeros_like(bounds.scale), 0
    rows, cpu = torch.arange(size_of(examples)), torch.device("cpu")
    for batch in read_batch(examples, rows, cpu, seed=seed):
        if between is not None:
            between()
        with kept_streams():
            for place in batch.counted.nonzero().flatten().tolist():
                found = _contribution(answer, batch.rows(place, place + 1), metric)
                if found is not None:
                    total += bounds.clipped(found)
                    done += 1
    return ClippedSums(total, len(rows) - done)


def _contribution(answer: Answer, one: Batch, metric: Metric) -> FloatVector | None:
    """Returns what one example adds to the sums; None where that cannot be computed."""
    assert metric.statistics is not None
    try:
        pin_streams(one.seed)
        found: FloatVector = metric.statistics.sums_of(answer(one.inputs), one.targets).numpy()
    except KeyboardInterrupt:  # the user's, or SIGTERM
        raise
    except BaseException:  # the task's code, on unchecked values
        return None
    return found


def answer_of(model: nn.Module) -> Answer:
    """Returns the function that answers one example with a torch model, in evaluation mode."""
    model.eval()
    device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def answer(inputs: Tensor) -> Tensor:
        with torch.inference_mode():
            found: Tensor = model(inputs.to(device)).cpu().contiguous()
        return found

    return answer


def check_keeps_nothing(model: nn.Module, example_input: Tensor) -> None:
    """Checks on a task's example that a model's state does not change in evaluation mode.

    Otherwise one example would affect how the next one is answered.

    Raises:
        PrivacyError: it changes.
    """
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    answer_of(model)(example_input[None])
    changed = [
        name
        for name, tensor in model.state_dict().items()
        if not torch.equal(tensor, before[name]) and not bool(before[name].isnan().any())
    ]
    if changed:
        raise PrivacyError(
            f"model: {changed[0]!r} changes while the model is evaluated, so one example would "
            "affect what is answered for the next. Nothing was evaluated or charged; keep no "
            "running state in evaluation mode."
        )
