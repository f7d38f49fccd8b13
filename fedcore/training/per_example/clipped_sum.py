"""The sum of clipped per-example gradients over a batch, to which DP-SGD adds noise."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset, default_collate

from fedcore.seeds import drawn_outside_torch, global_streams, kept_streams, pin_streams
from fedcore.task.definition import Examples, Loss
from fedcore.training.batches import gather
from fedcore.training.examples import TaskExamples
from fedcore.training.per_example.clipping import clip_factors
from fedcore.training.per_example.gradient_methods import (
    GradientMethod,
    GradientPart,
    Kind,
    one_by_one,
    zero_totals,
)

_MAX_ROWS = 256
"""Maximum number of examples read, or processed, at once, so that one example's size has little
effect on memory."""


@dataclass(frozen=True)
class Batch:
    """Examples of equal shape and dtype, each at its own position in a batch.

    A position without a usable example contains a copy of another one, which does not count.
    """

    inputs: Tensor
    """Shape ``(B, ...)``."""
    targets: Tensor
    """Shape ``(B, ...)``."""
    counted: Tensor
    """Whether the example at each position counts, bool, ``(B,)``."""
    seed: int
    """Seed of dropout and other randomness at the first position. Position ``i`` alone uses
    ``seed + i``; positions that are processed together share the stream of the first one, in which
    each has a fixed place. So the batch's positions, not its examples, decide what is drawn."""

    def rows(self, start: int, stop: int) -> Batch:
        """Returns the positions from ``start`` up to, but not including, ``stop``."""
        part = slice(start, stop)
        return Batch(self.inputs[part], self.targets[part], self.counted[part], self.seed + start)


@dataclass(frozen=True)
class ClippedSum:
    """The sum of clipped gradients over a batch, and the number of skipped examples."""

    sums: list[Tensor]
    """One tensor for each trained parameter, in the model's order, in float64 where the device
    supports it."""
    skipped: int
    """Number of examples that counted as zero. Private: it must not leave the device."""


def clipped_sum(
    method: GradientMethod,
    preprocess: nn.Module,
    model: nn.Module,
    loss: Loss,
    batches: Iterable[Batch],
    *,
    clip_norm: float,
    physical: int,
) -> ClippedSum:
    """Returns the sum of per-example gradients, each scaled to an L2 norm of at most ``clip_norm``.

    Guarantee:
        Replacing one example by a null record, which counts as zero, changes the sum by at most
        ``clip_norm * (1 + 1e-4)`` in L2 norm, for any examples, weights, model and loss. Each
        example's gradient is that of a batch of one, up to float32 rounding. An example whose
        gradient is not finite, or whose forward or backward pass fails, counts as zero and never
        aborts the work. The other examples then keep their positions in the physical batches, so
        that their gradients are bit-identical and rounding reveals nothing about the failed one.

    Args:
        method: The gradient method, from `choose_method`.
        preprocess: Runs before the model, on each example separately.
        model: The model at whose weights gradients are computed; not changed.
        loss: Mean loss over a batch, called on batches of one.
        batches: From `read_batch`.
        clip_norm: L2 bound on one example's gradient over all trained parameters, > 0.
        physical: Examples processed at once; it affects the result only by rounding.

    Source:
        Abadi et al. 2016, arXiv:1607.00133, Algorithm 1.
    """
    totals = zero_totals(model)
    step, skipped = min(physical, _MAX_ROWS), 0
    for batch in batches:
        for start in range(0, len(batch.counted), step):
            part = batch.rows(start, start + step)
            skipped += _add_part(method, preprocess, model, loss, part, clip_norm, totals)
    return ClippedSum(totals, skipped)


def _add_part(
    method: GradientMethod,
    preprocess: nn.Module,
    model: nn.Module,
    loss: Loss,
    batch: Batch,
    clip_norm: float,
    totals: Sequence[Tensor],
) -> int:
    """Adds one physical batch to the totals; returns how many of its examples counted as zero.

    How an example is processed depends only on that example.
    """

    def grads_of(method: GradientMethod, batch: Batch) -> GradientPart | None:
        return _grads_of_batch(method, preprocess, model, batch)

    part = grads_of(method, batch)
    if part is not None:
        return _add_clipped(part, batch, clip_norm, totals)
    runs = torch.zeros_like(batch.counted)
    for place in batch.counted.nonzero().flatten().tolist():
        runs[place] = grads_of(method, batch.rows(place, place + 1)) is not None
    together = _replace_uncounted(batch, batch.counted & runs)
    part = grads_of(method, together) if bool(runs.any()) else None
    skipped = 0
    if part is not None:
        skipped += _add_clipped(part, together, clip_norm, totals)
        batch = replace(batch, counted=batch.counted & ~runs)
    alone = one_by_one(loss, why="")
    for place in batch.counted.nonzero().flatten().tolist():
        single = batch.rows(place, place + 1)
        part = grads_of(alone, single)
        skipped += 1 if part is None else _add_clipped(part, single, clip_norm, totals)
    return skipped


def _add_clipped(
    part: GradientPart, batch: Batch, clip_norm: float, totals: Sequence[Tensor]
) -> int:
    used = batch.counted & part.usable
    part.add(torch.where(used, clip_factors(part.squares, clip_norm), 0.0), totals)
    return int((batch.counted & ~used).sum())


def _grads_of_batch(
    method: GradientMethod, preprocess: nn.Module, model: nn.Module, batch: Batch
) -> GradientPart | None:
    """Returns the gradients of one physical batch; None where computing them fails.

    Nothing that an example's values cause, running out of memory included, may abort the work. A
    number drawn from Python's or NumPy's random stream would be shared by all examples in a
    vectorised pass: None then, too, so that the caller processes examples one by one, each with its
    own stream.
    """
    try:
        with global_streams(batch.seed):
            before = drawn_outside_torch()
            found = method.compute(preprocess, model, batch.inputs, batch.targets)
            return found if method.name == "alone" or drawn_outside_torch() == before else None
    except KeyboardInterrupt:  # the user's, or SIGTERM
        raise
    except BaseException:  # the task's code, on unchecked values
        return None


def _replace_uncounted(batch: Batch, counted: Tensor) -> Batch:
    """Replaces each position that does not count by a copy of the first one that does."""
    if not bool(counted.any()):
        return replace(batch, counted=counted)
    first = counted.nonzero()[0, 0]
    index = torch.where(counted, torch.arange(len(counted), device=counted.device), first)
    return Batch(batch.inputs[index], batch.targets[index], counted, batch.seed)


def read_batch(
    examples: Examples,
    rows: Tensor,
    device: torch.device,
    *,
    seed: int,
    usual: Kind | None = None,
) -> Iterator[Batch]:
    """Reads the examples at ``rows`` and yields them on ``device`` as batches for `clipped_sum`.

    A row that cannot be read, or is no pair of tensors, is omitted and counts as zero. Where shapes
    or dtypes differ, rows with inputs of the usual kind form one batch per kind of target, with the
    other positions filled. Every other row forms a batch of its own, as does a row with a far
    larger target: a batch filled with copies of an unexpected shape could exceed memory. A data set
    that is not a `TensorDataset` of two tensors, or a subset of one, is read in chunks.

    Args:
        examples: A client's data.
        rows: Row numbers, int64, ``(B,)``.
        device: The device to train on.
        seed: Seed of the data set's and model's randomness at the first row; each further row adds
            1.
        usual: Shape and dtype of the task's example input, which do not depend on the data. With
            None, rows of each kind form one batch.
    """
    if not len(rows):
        return
    if (found := _gathered(examples, rows)) is not None:
        yield from _cut(*(part.to(device) for part in found), seed=seed, usual=usual)
        return
    for start in range(0, len(rows), _MAX_ROWS):
        some = rows[start : start + _MAX_ROWS].tolist()
        with kept_streams():
            read = [_read(examples, row, seed + start + place) for place, row in enumerate(some)]
        yield from _by_kind(read, device, seed + start, usual)


def _gathered(examples: Examples, rows: Tensor) -> _Pair | None:
    """Returns the rows as slices of two tensors; None for other data, or if reading fails."""
    whole = examples
    while isinstance(whole, Subset | TaskExamples):
        whole = whole.dataset
    if not isinstance(whole, TensorDataset) or len(whole.tensors) != 2:
        return None
    try:
        return gather(examples, rows)
    except Exception:  # a bad index: reading rows singly makes only that row count as zero
        return None


_Pair = tuple[Tensor, Tensor]


def _cut(inputs: Tensor, targets: Tensor, *, seed: int, usual: Kind | None) -> Iterator[Batch]:
    """Yields batches of the same positions and seeds as rows that are read one by one.

    Otherwise a row that cannot be used would change where batches begin, and so the dropout of all
    other rows.
    """
    counted = torch.ones(len(inputs), dtype=torch.bool, device=inputs.device)
    whole = Batch(inputs, targets, counted, seed)
    step = 1 if _is_apart(inputs[0], targets[0], usual) else _MAX_ROWS
    for start in range(0, len(inputs), step):
        yield whole.rows(start, start + step)


def _is_apart(inputs: Tensor, target: Tensor, usual: Kind | None) -> bool:
    """Returns whether an example forms a batch of its own."""
    if usual is None:
        return False
    return (inputs.shape, inputs.dtype) != usual or target.numel() > _large(inputs)


def _read(examples: Examples, row: int, seed: int) -> _Pair | None:
    try:
        pin_streams(seed)
        inputs, targets = default_collate([examples[row]])
        return _plain(inputs), _plain(targets)
    except KeyboardInterrupt:  # the user's, or SIGTERM
        raise
    except BaseException:  # the task's code, or a broken file
        return None


def _plain(part: object) -> Tensor:
    """Returns the example in a batch of one as a dense tensor that can be stacked with others."""
    if not isinstance(part, Tensor) or part.layout != torch.strided or part.is_quantized:
        raise TypeError("not a plain tensor")
    if part.is_nested or part.is_meta:
        raise TypeError("a tensor without numbers")
    return part[0].detach().as_subclass(Tensor)


def _large(one: Tensor) -> int:
    """Returns a size that no task's target exceeds, in elements, for an input of this size."""
    return 16 * one.numel() + 4096


def _by_kind(
    read: Sequence[_Pair | None], device: torch.device, seed: int, usual: Kind | None
) -> Iterator[Batch]:
    kinds: dict[object, list[int]] = {}
    for place, pair in enumerate(read):
        if pair is not None:
            kind = tuple((part.shape, part.dtype) for part in pair)
            if _is_apart(*pair, usual):
                inputs, targets = (part.unsqueeze(0).to(device) for part in pair)
                counted = torch.ones(1, dtype=torch.bool, device=device)
                yield Batch(inputs, targets, counted, seed + place)
            else:
                kinds.setdefault(kind, []).append(place)
    for places in kinds.values():
        there = set(places)
        index = [place if place in there else places[0] for place in range(len(read))]
        pairs = [pair for place in index if (pair := read[place]) is not None]
        counted = torch.tensor([place in there for place in range(len(read))], device=device)
        inputs, targets = (torch.stack(part).to(device) for part in zip(*pairs, strict=True))
        yield Batch(inputs, targets, counted, seed)
