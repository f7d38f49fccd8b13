"""DP-SGD over one or several processes: fine-tuning that protects each example of the cloud's data.

Each process clips the gradients of its own part of a batch; the first one adds noise to the sum of
all. Start with `train_privately`. Opacus's `DifferentiallyPrivateDistributedDataParallel` divides
the work in the same way; here gradients, sampling and noise are those of devices
(`fedcore.training.private`), whose guarantees also cover rounding and examples that fail.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from fedcore.config.finetune import Finetune
from fedcore.config.run import RunConfig
from fedcore.errors import TrainingError
from fedcore.observability.words import counted
from fedcore.privacy.draws import Draws, SystemDraws
from fedcore.privacy.planning import PrivatePlan, expected_batch_size
from fedcore.seeds import derive
from fedcore.task.definition import Examples, Task, size_of
from fedcore.task.model import FullModel
from fedcore.training.local import make_optimizer
from fedcore.training.memory import used_bytes
from fedcore.training.per_example.clipped_sum import clipped_sum, read_batch
from fedcore.training.per_example.gradient_methods import GradientMethod, trainable_parameters
from fedcore.training.per_example.trial import choose_method
from fedcore.training.private import MEMORY_BYTES, kept_bounded, noise_deviation
from server.finetune.checkpoints import CheckpointFolder
from server.finetune.control import Group, StepLog
from server.finetune.curve import Curve
from server.finetune.order import Position
from server.finetune.private_plan import plan_of
from server.finetune.progress import Extent, OnPart
from server.finetune.rates import rate_of
from server.finetune.state import TrainingState

log = logging.getLogger("fedcore")


def train_privately(
    model: FullModel,
    task: Task,
    examples: Examples,
    run: RunConfig,
    device: torch.device,
    *,
    group: Group,
    place: Path | None = None,
    stop: Callable[[], bool] = lambda: False,
    curve: Curve,
    on_part: OnPart,
    draws: Draws | None = None,
) -> None:
    """Trains a model in place by DP-SGD, together with the other processes of the group.

    Guarantee:
        Each step is one Gaussian mechanism with Poisson sampling on the sum over all processes,
        whose sensitivity is ``finetune.privacy.clip_norm``. The processes have disjoint examples,
        each of which is drawn with the rate of `plan_of`, so their samples together are one Poisson
        sample of all examples. One process adds the whole noise, once. Steps and their number do
        not depend on the examples. Losses are not computed.

    Args:
        model: The model, on ``device``; every process has equal weights.
        task: Loss, kind and example input are used.
        examples: All examples; each process reads its share.
        run: ``[finetune]`` and the seed are used.
        device: The device to compute on.
        group: The processes that train together.
        place: Folder for this training's checkpoints; none are written when None.
        stop: Returns whether training should stop, with a checkpoint.
        curve: Receives the course of training.
        on_part: Callback for each part of the course.
        draws: Source of batches and noise; by default the operating system.

    Raises:
        UnsupportedLayer: an example's output depends on others, as with batch normalisation.
        PrivacyError: see `plan_of`; or the loss is no mean over examples.
        TrainingError: training took longer than ``finetune.timeout_s``.
        KeyboardInterrupt: ``stop`` returned True in a process.

    Source:
        Abadi et al. 2016, arXiv:1607.00133, Algorithm 1.
    """
    settings, count = run.finetune, size_of(examples)
    torch.manual_seed(derive(run.seed, "fine-tuning", group.rank))
    plan = plan_of(run, count)
    state = TrainingState(model, make_optimizer(model.model, settings, fused=settings.fused))
    checkpoints, position = None, Position()
    if place is not None:
        every, keep = settings.checkpoint_steps, settings.checkpoint_keep
        checkpoints = CheckpointFolder(place, place.name, every, keep, group)
        if found := checkpoints.newest():
            position = checkpoints.load(found, state)
        else:
            checkpoints.save(state, position)
    curve.rewind(position.step)
    own = draws or SystemDraws()
    tuner = _PrivateTuner(
        task=task,
        model=model,
        examples=examples,
        share=torch.arange(group.rank, count, group.world),
        settings=settings,
        plan=plan,
        method=choose_method(task, model),
        device=device,
        group=group,
        state=state,
        draws=own,
        seed=own.seed(),
        end_s=time.monotonic() + settings.timeout_s,
        log=StepLog(group, stop, partial(used_bytes, device)),
        curve=curve,
        on_part=on_part,
        checkpoints=checkpoints,
    )
    model.model.train()
    skipped = 0
    with kept_bounded(model.model):
        while position.step < plan.charge.steps:
            position, uncounted = _take_step(tuner, position)
            skipped += uncounted
            _exchange(tuner, position)
    if skipped:
        log.warning(
            "process %d: %s in its batches had no finite gradient or could not be read, and "
            "counted as zero",
            group.rank,
            counted(skipped, "example"),
        )


@dataclass(frozen=True)
class _PrivateTuner:
    """One private training, as one of its processes sees it."""

    task: Task
    model: FullModel
    examples: Examples
    share: Tensor
    """Rows of the examples of this process."""
    settings: Finetune
    plan: PrivatePlan
    method: GradientMethod
    device: torch.device
    group: Group
    state: TrainingState
    draws: Draws
    seed: int
    """Seed of dropout and the data set's own randomness, which protect nobody."""
    end_s: float
    """When training must have ended, on the monotonic clock."""
    log: StepLog
    curve: Curve
    on_part: OnPart
    checkpoints: CheckpointFolder | None


def _take_step(tuner: _PrivateTuner, position: Position) -> tuple[Position, int]:
    """Takes a step; returns the position after it, and how many of its examples counted as zero."""
    plan, model, count = tuner.plan, tuner.model, size_of(tuner.examples)
    if time.monotonic() > tuner.end_s:
        raise _too_late(position.step, plan, tuner.settings.timeout_s)
    per_epoch = plan.charge.steps // tuner.settings.epochs
    for options in tuner.state.optimizer.param_groups:
        options["lr"] = rate_of(tuner.settings, position, per_epoch)
    rows = tuner.share[tuner.draws.poisson(len(tuner.share), plan.charge.sample_rate)]
    seed = tuner.seed + position.step * count
    clipped = clipped_sum(
        tuner.method,
        model.preprocess,
        model.model,
        tuner.task.loss_of,
        read_batch(tuner.examples, rows, tuner.device, seed=seed, usual=tuner.method.usual),
        clip_norm=plan.clip_norm,
        physical=tuner.method.rows(MEMORY_BYTES),
    )
    noised = noised_total(clipped.sums, plan, count, tuner.group, tuner.draws)
    trained = trainable_parameters(model.model).values()
    for parameter, noisy in zip(trained, noised, strict=True):
        parameter.grad = (noisy / expected_batch_size(count, plan)).to(parameter.dtype)
    tuner.state.optimizer.step()
    tuner.log.add(torch.tensor(math.nan), len(rows))
    step = position.step + 1
    return replace(position, step=step, epoch=step // per_epoch), clipped.skipped


def _exchange(tuner: _PrivateTuner, position: Position) -> None:
    """Shares the course of training, and saves a checkpoint, where either is due.

    Raises:
        KeyboardInterrupt: a process was asked to stop.
    """
    checkpoints, last = tuner.checkpoints, position.step == tuner.plan.charge.steps
    saves = checkpoints is not None and (last or position.step % checkpoints.every == 0)
    if not (tuner.log.due or saves or last):
        return
    rate = float(tuner.state.optimizer.param_groups[0]["lr"])
    part = tuner.log.exchange(position.step, rate)
    assert part is not None  # a step was added before
    tuner.curve.append(part)
    tuner.on_part(part, Extent(tuner.plan.charge.steps, None))
    if checkpoints is not None and (saves or part.stop):
        checkpoints.save(tuner.state, position)
        tuner.log.forget()
    if part.stop:
        raise KeyboardInterrupt


def noised_total(
    sums: Sequence[Tensor], plan: PrivatePlan, count: int, group: Group, draws: Draws
) -> list[Tensor]:
    """Returns the sum over processes with the noise of one mechanism, equal in every process.

    Args:
        sums: This process's sum of clipped gradients, by parameter.
        plan: The noise.
        count: Number of examples of all processes.
        group: The processes.
        draws: Source of noise; that of the first process is used.
    """
    whole = torch.cat([each.flatten() for each in sums])
    if group.world > 1:
        dist.reduce(whole, dst=0)
    if group.rank == 0:
        draws.add_noise([whole], deviation=noise_deviation(plan), bound=count * plan.clip_norm)
    if group.world > 1:
        dist.broadcast(whole, src=0)
    parts = torch.split(whole, [each.numel() for each in sums])
    return [part.view_as(each) for part, each in zip(parts, sums, strict=True)]


def _too_late(step: int, plan: PrivatePlan, timeout_s: float) -> TrainingError:
    return TrainingError(
        f"fine-tuning: {step} of {counted(plan.charge.steps, 'step')} were completed within "
        f"finetune.timeout_s = {timeout_s:g}. The federated model is kept; allow more time, or set "
        "fewer epochs."
    )
