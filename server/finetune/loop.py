"""The fine-tuning loop, identical for one process and for several."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from fedcore.config.finetune import Finetune
from fedcore.config.run import RunConfig
from fedcore.errors import TrainingDiverged, TrainingError
from fedcore.observability.words import counted
from fedcore.seeds import derive
from fedcore.task.definition import Examples, Task, size_of
from fedcore.task.model import FullModel
from fedcore.training.batches import batches_of, gather
from fedcore.training.distillation import beside_teacher
from fedcore.training.local import check_loss, clip_gradients, diverged, make_optimizer
from fedcore.training.lone_rows import least_rows, use_running_statistics
from fedcore.training.memory import memory_errors, used_bytes
from server.finetune.control import ALONE, Exchanged, Group, StepLog
from server.finetune.curve import Curve
from server.finetune.loading import Batch, loaded
from server.finetune.order import Position, rows_of_epoch
from server.finetune.parallel import compiled, distributed, leaves_unused, synchronised
from server.finetune.precision import autocast, make_scaler, recomputed
from server.finetune.progress import Extent, OnPart
from server.finetune.rates import rate_of
from server.finetune.state import TrainingState

if TYPE_CHECKING:
    from server.finetune.checkpoints import CheckpointFolder


class NotFinite(Exception):  # control flow of this room: never leaves it
    """A loss or a weight is not finite, in every process alike."""


@dataclass(frozen=True)
class FineTuner:
    """One training: what is trained, on what, and by which settings."""

    state: TrainingState
    parallel: Any
    """The module that is called; it shares gradients with other processes."""
    loss_of: Callable[[Any, Tensor], Tensor]
    examples: Examples
    settings: Finetune
    seed: int
    device: torch.device
    group: Group
    batch: int
    """Examples a step of this process."""
    least: int
    """Rows that a step needs."""
    steps_per_epoch: int
    end_s: float
    """When training must have ended, on the monotonic clock."""
    log: StepLog
    curve: Curve
    checkpoints: CheckpointFolder | None
    on_part: OnPart
    extent: Extent


def train_start(
    model: nn.Module,
    task: Task,
    examples: Examples,
    run: RunConfig,
    device: torch.device,
    *,
    remember: float,
    group: Group = ALONE,
    unused: bool = False,
    place: Path | None = None,
    stop: Callable[[], bool] | None = None,
    curve: Curve | None = None,
    on_part: OnPart = lambda part, extent: None,
    note: Callable[[str], None] | None = None,
) -> None:
    """Trains a model in place on the cloud's data.

    Seeds and advances torch's default generators; the caller saves their state if needed.

    Guarantee:
        Every process ends with equal weights, and the run's seed determines all of their bits, also
        when training was interrupted and continued from a checkpoint with as many processes. Not
        so with PowerSGD, whose error feedback is not part of a checkpoint.

    Args:
        model: The model, on ``device``; left in training mode, and divided among the processes
            where it was sharded.
        task: The task whose loss is minimised.
        examples: All training examples; each process trains on its share.
        run: ``[finetune]`` and the seed are used.
        device: The device to compute on.
        remember: Weight of the answers that the model gives before training, see
            `fedcore.training.distillation`; 0 to train on the labels alone.
        group: The processes that train together, from `make_group`; by default this one alone.
        unused: Whether some step may leave a parameter without a gradient; tried if not known.
        place: Folder for this training's checkpoints, whose name identifies it; none are written
            when None.
        stop: Returns whether training should stop; asked after each step or every few.
        curve: Receives losses and speed.
        on_part: Callback for each part of the course, for progress.
        note: Receives what the memory estimate says, where it decides about sharding.

    Raises:
        TrainingDiverged: the loss is not finite; with checkpoints, also at lower learning rates.
        TrainingError: training took longer than ``finetune.timeout_s``.
        DataError: there is one example for each process, and a layer needs two; or a checkpoint is
            corrupt.
        DiskFull: a checkpoint could not be written.
        KeyboardInterrupt: ``stop`` returned True in a process. A checkpoint was written first.
    """
    if run.finetune.private:
        from server.finetune.private_loop import train_privately  # compiles on import

        train_privately(
            cast(FullModel, model),
            task,
            examples,
            run,
            device,
            group=group,
            place=place,
            stop=stop or (lambda: False),
            curve=curve or Curve(),
            on_part=on_part,
        )
        return
    settings, end_s = run.finetune, time.monotonic() + run.finetune.timeout_s
    group = replace(group, together=settings.shard == "tensor")
    torch.manual_seed(derive(run.seed, "fine-tuning", group.share))  # for dropout
    trained, loss_of = model, cast(Callable[[Any, Tensor], Tensor], task.loss_of)
    if remember:
        trained, loss_of = beside_teacher(model, model, task.loss_of, task.problem, weight=remember)
    batch = max(1, settings.batch_size // group.shares)
    share = -(-size_of(examples) // group.shares)
    least = least_rows(trained, loss_of, examples, count=share, batch_size=batch)
    with ExitStack() as until_trained:
        until_trained.enter_context(recomputed(trained, active=settings.activation_checkpointing))
        parallel = trained
        if group.world > 1:
            unused = unused or group.together or leaves_unused(trained, loss_of, examples, batch)
            parallel = distributed(
                trained, settings, group, device, unused=unused, note=note or (lambda text: None)
            )
        if settings.compile:
            until_trained.enter_context(compiled(trained))
        trained.train()
        if share < least:
            use_running_statistics(trained)
        steps = len(batches_of(torch.arange(share), batch, least=least))
        optimizer = make_optimizer(model, settings, fused=settings.fused)
        trainer = FineTuner(
            state=TrainingState(model, optimizer, make_scaler(settings, device)),
            parallel=parallel,
            loss_of=loss_of,
            examples=examples,
            settings=settings,
            seed=run.seed,
            device=device,
            group=group,
            batch=batch,
            least=least,
            steps_per_epoch=steps,
            end_s=end_s,
            log=StepLog(group, stop or (lambda: False), partial(used_bytes, device)),
            curve=curve or Curve(),
            checkpoints=None if place is None else _checkpoints(place, settings, group),
            on_part=on_part,
            extent=Extent(settings.epochs * steps, _tokens_per_example(task, examples)),
        )
        _train(trainer)


def _tokens_per_example(task: Task, examples: Examples) -> int | None:
    if task.problem.name != "next_token":
        return None
    _, targets = gather(examples, [0])
    return targets.numel()


def _checkpoints(place: Path, settings: Finetune, group: Group) -> CheckpointFolder:
    from server.finetune.checkpoints import CheckpointFolder  # a second of imports

    every, keep = settings.checkpoint_steps, settings.checkpoint_keep
    return CheckpointFolder(place, place.name, every, keep, group)


_LESS_MEMORY = (
    "raise finetune.accumulate_steps, set finetune.activation_checkpointing, or finetune.shard = "
    "'always' with several processes, or reduce finetune.batch_size"
)


@memory_errors("fine-tuning", remedy=_LESS_MEMORY)
def _train(trainer: FineTuner) -> None:
    """Trains from the newest checkpoint to the end, with returns to a checkpoint on the way."""
    position = Position()
    if trainer.checkpoints:
        if found := trainer.checkpoints.newest():
            position = trainer.checkpoints.load(found, trainer.state)
        else:
            trainer.checkpoints.save(trainer.state, position)
    trainer.curve.rewind(position.step)
    while position.epoch < trainer.settings.epochs:
        try:
            position = _train_epoch(trainer, position)
        except NotFinite:
            position = _rolled_back(trainer, position)
    if trainer.checkpoints and position.step % trainer.checkpoints.every:
        trainer.checkpoints.save(trainer.state, position)


def _train_epoch(trainer: FineTuner, position: Position) -> Position:
    """Trains to the end of an epoch, and returns the beginning of the next one."""
    group, settings = trainer.group, trainer.settings
    rows = rows_of_epoch(
        size_of(trainer.examples),
        position,
        seed=trainer.seed,
        rank=group.share,
        world=group.shares,
    )
    steps = batches_of(rows, trainer.batch, least=trainer.least) if len(rows) else []
    split = [_parts(trainer, step) for step in steps]
    total, count = torch.zeros((), device=trainer.device), 0
    batches = loaded(trainer.examples, chain(*split), trainer.device, ahead=settings.prefetch)
    with closing(batches):
        for step, parts in zip(steps, split, strict=True):
            if time.monotonic() > trainer.end_s:
                raise _too_late(settings, position.epoch)
            _set_rate(trainer, position)
            loss_sum = _take_step(trainer, islice(batches, len(parts)), len(parts), len(step))
            total, count = total + loss_sum, count + len(step)
            consumed = position.consumed + len(step) * group.shares
            position = replace(position, consumed=consumed, step=position.step + 1)
            due = trainer.log.add(loss_sum, len(step))
            saves = trainer.checkpoints and position.step % trainer.checkpoints.every == 0
            if due or saves:
                _exchange(trainer, position)
            if saves:
                _save(trainer, position)
    if not trainer.checkpoints and count:
        rate = settings.learning_rate
        check_loss((total / count).item(), epoch=position.epoch, learning_rate=rate)
    _exchange(trainer, position)
    return replace(position, epoch=position.epoch + 1, consumed=0)


def _parts(trainer: FineTuner, rows: Tensor) -> list[Tensor]:
    """Returns the rows of a step in the parts that are computed one after the other."""
    size = -(-len(rows) // trainer.settings.accumulate_steps)
    return batches_of(rows, size, least=trainer.least)


def _take_step(trainer: FineTuner, batches: Iterable[Batch], parts: int, count: int) -> Tensor:
    """Takes one step on the examples of this process; returns the sum of their losses.

    Args:
        trainer: The training.
        batches: The parts of this process's share of a batch.
        parts: Number of parts.
        count: Number of examples in all of them.
    """
    settings, state = trainer.settings, trainer.state
    state.optimizer.zero_grad(set_to_none=True)
    total = torch.zeros((), device=trainer.device)
    for number, (inputs, targets) in enumerate(batches, 1):
        # Processes share the gradients of the whole step, with the last part.
        with synchronised(trainer.parallel, number == parts):
            with autocast(settings, trainer.device):
                loss = trainer.loss_of(trainer.parallel(inputs), targets)
            objective = loss if parts == 1 else loss * (len(targets) / count)
            torch.autograd.backward(state.scaler.scale(objective) if state.scaler else objective)
        total = total + loss.detach() * len(targets)
    if state.scaler is None:
        clip_gradients(state.model, settings)
        state.optimizer.step()
    else:
        state.scaler.unscale_(state.optimizer)
        clip_gradients(state.model, settings)
        state.scaler.step(state.optimizer)
        state.scaler.update()
    return total


def _set_rate(trainer: FineTuner, position: Position) -> None:
    rate = rate_of(trainer.settings, position, trainer.steps_per_epoch)
    for options in trainer.state.optimizer.param_groups:
        options["lr"] = rate


def _exchange(trainer: FineTuner, position: Position) -> None:
    """Shares losses with the other processes, and does what they lead to.

    Raises:
        NotFinite: a loss isn't finite, and there are checkpoints to return to.
        KeyboardInterrupt: a process was asked to stop.
    """
    rate = trainer.state.optimizer.param_groups[0]["lr"]
    part: Exchanged | None = trainer.log.exchange(position.step, float(rate))
    if part is None:
        return
    if trainer.checkpoints and not part.finite:
        raise NotFinite
    trainer.curve.append(part)
    trainer.on_part(part, trainer.extent)
    if part.stop:
        if trainer.checkpoints:
            _save(trainer, position)
        raise KeyboardInterrupt


def _save(trainer: FineTuner, position: Position) -> None:
    """Saves a checkpoint, unless weights aren't finite: then training returns to the last one."""
    assert trainer.checkpoints is not None
    parameters = trainer.state.model.parameters()
    broken = sum(not bool(torch.isfinite(_local(each)).all()) for each in parameters)
    if trainer.group.total(torch.tensor([float(broken)], dtype=torch.float64)).item():
        raise NotFinite
    trainer.checkpoints.save(trainer.state, position)
    trainer.log.forget()  # the time of saving is not a step's


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor.detach()


def _rolled_back(trainer: FineTuner, position: Position) -> Position:
    """Returns to the newest checkpoint with half the learning rate.

    Raises:
        TrainingDiverged: training has returned ``finetune.max_rollbacks`` times before.
    """
    assert trainer.checkpoints is not None
    rate, most = (
        trainer.settings.learning_rate * position.rate_scale,
        trainer.settings.max_rollbacks,
    )
    if position.rollbacks >= most:
        error = diverged(float("nan"), epoch=position.epoch, learning_rate=rate)
        raise TrainingDiverged(f"fine-tuning: after {counted(most, 'rollback')}: {error}")
    found = trainer.checkpoints.newest()
    assert found is not None  # training begins with a checkpoint
    restored = trainer.checkpoints.load(found, trainer.state)
    trainer.log.forget()
    trainer.curve.rewind(restored.step)
    return replace(restored, rate_scale=position.rate_scale / 2, rollbacks=position.rollbacks + 1)


def _too_late(settings: Finetune, epochs: int) -> TrainingError:
    return TrainingError(
        f"fine-tuning: {epochs} of {counted(settings.epochs, 'epoch')} were completed within "
        f"finetune.timeout_s = {settings.timeout_s:g}. The federated model is kept; allow more "
        "time, or set fewer epochs."
    )
