"""The sum of clipped per-example gradients over a batch: what DP-SGD adds noise to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset, default_collate

from fedcore.seeds import drawn_outside_torch, global_streams, kept_streams, pin_streams
from fedcore.task.definition import Examples, Loss
from fedcore.training.batches import gather
from fedcore.training.per_example.clipping import shares_of
from fedcore.training.per_example.ways import GradientMethod, Kind, Part, one_by_one, zero_totals

_MOST_ROWS = 256
"""Examples that are read, and taken, at once: what one of them is like decides little memory."""


@dataclass(frozen=True)
class Batch:
    """Examples of one batch that have one shape and dtype, each in its own place.

    A place that holds no usable example holds a copy of another one, which counts nothing.
    """

    inputs: Tensor
    """``(B, ...)``."""
    targets: Tensor
    """``(B, ...)``."""
    counted: Tensor
    """Whether the example at a place counts, bool, ``(B,)``."""
    seed: int
    """What dropout and the like draw from, at the first place: each place has its own stream, which
    does not depend on what the others do."""

    def rows(self, start: int, stop: int) -> Batch:
        """The places from ``start`` to before ``stop``."""
        part = slice(start, stop)
        return Batch(self.inputs[part], self.targets[part], self.counted[part], self.seed + start)


@dataclass(frozen=True)
class ClippedSum:
    """What one batch comes to."""

    sums: list[Tensor]
    """A tensor for each trained parameter, in the order of the model, in float64 where the device
    has it."""
    skipped: int
    """Examples that counted as zero. Private: it must not leave the device."""


def clipped_sum(
    way: GradientMethod,
    preprocess: nn.Module,
    model: nn.Module,
    loss: Loss,
    batches: Iterable[Batch],
    *,
    clip_norm: float,
    physical: int,
) -> ClippedSum:
    """The sum over examples of their gradients, each scaled to an L2 norm of ``clip_norm`` at most.

    Guarantee:
        Replacing one example by one that counts as zero changes the sum by at most
        ``clip_norm * (1 + 1e-4)`` in L2 norm, whatever the examples, the weights, the model and the
        loss are. Each example's gradient is that of a batch of one, up to float32 rounding. An
        example whose gradient is not finite, or whose forward or backward pass fails, counts as
        zero, and never ends the work. The others keep their places in the physical batches then, so
        that their gradients are the same bits, and rounding tells nothing of it either.

    Args:
        way: How gradients are taken, from `find_way`.
        preprocess: Runs before the model, on each example alone.
        model: At whose weights gradients are taken; not changed.
        loss: Mean loss over a batch, called on batches of one.
        batches: From `read_batch`.
        clip_norm: L2 bound on one example's gradient over all trained parameters, > 0.
        physical: How many examples are taken at once; the result does not depend on it but for
            rounding.

    Source:
        Abadi et al. 2016, arXiv:1607.00133, Algorithm 1.
    """
    totals = zero_totals(model)
    step, skipped = min(physical, _MOST_ROWS), 0
    for batch in batches:
        for start in range(0, len(batch.counted), step):
            part = batch.rows(start, start + step)
            skipped += _add_part(way, preprocess, model, loss, part, clip_norm, totals)
    return ClippedSum(totals, skipped)


def _add_part(
    way: GradientMethod,
    preprocess: nn.Module,
    model: nn.Module,
    loss: Loss,
    batch: Batch,
    clip_norm: float,
    totals: Sequence[Tensor],
) -> int:
    """Adds one physical batch to the totals; how many of its examples counted as zero.

    What is done with an example is decided by that example alone.
    """

    def taken(way: GradientMethod, batch: Batch) -> Part | None:
        return _taken(way, preprocess, model, batch)

    part = taken(way, batch)
    if part is not None:
        return _add_clipped(part, batch, clip_norm, totals)
    runs = torch.zeros_like(batch.counted)
    for place in batch.counted.nonzero().flatten().tolist():
        runs[place] = taken(way, batch.rows(place, place + 1)) is not None
    together = _without(batch, batch.counted & runs)
    part = taken(way, together) if bool(runs.any()) else None
    skipped = 0
    if part is not None:
        skipped += _add_clipped(part, together, clip_norm, totals)
        batch = replace(batch, counted=batch.counted & ~runs)
    alone = one_by_one(loss, why="")
    for place in batch.counted.nonzero().flatten().tolist():
        single = batch.rows(place, place + 1)
        part = taken(alone, single)
        skipped += 1 if part is None else _add_clipped(part, single, clip_norm, totals)
    return skipped


def _add_clipped(part: Part, batch: Batch, clip_norm: float, totals: Sequence[Tensor]) -> int:
    used = batch.counted & part.usable
    part.add(torch.where(used, shares_of(part.squares, clip_norm), 0.0), totals)
    return int((batch.counted & ~used).sum())


def _taken(
    way: GradientMethod, preprocess: nn.Module, model: nn.Module, batch: Batch
) -> Part | None:
    """The gradients of one physical batch; None where they fail, for want of memory, too.

    What an example makes of its values, memory to take among it, must not end the work. A number
    that Python or NumPy draws while examples are taken together is one for all of them: they are
    taken one by one then, each with its own.
    """
    try:
        with global_streams(batch.seed):
            before = drawn_outside_torch()
            found = way.take(preprocess, model, batch.inputs, batch.targets)
            return found if way.name == "alone" or drawn_outside_torch() == before else None
    except KeyboardInterrupt:  # the user's, or SIGTERM
        raise
    except BaseException:  # the task's code, on values that nobody looked at
        return None


def _without(batch: Batch, counted: Tensor) -> Batch:
    """The same places, with the first example that counts in all that do not."""
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
    """The examples of some rows, on a device, ready to be summed over.

    A row that cannot be read, or is no pair of tensors, is left out and counts as zero. Where
    shapes or dtypes differ, rows with inputs of the usual kind come in a batch for each kind of
    target, in which the others' places are filled. Any other row comes alone, and so does one with
    a far larger target: a batch that is filled with rows of a shape nobody planned for may take
    more memory than there is. Rows that are no slices of two tensors are read a few at a time.

    Args:
        examples: A client's data.
        rows: Row numbers, int64, ``(B,)``.
        device: Where to train.
        seed: What random numbers of data sets and models begin at, place by place.
        usual: Shape and dtype of the task's example, not of the data's; without it, the rows of
            each kind come together.
    """
    if not len(rows):
        return
    if (found := _gathered(examples, rows)) is not None:
        inputs, targets = found
        counted = torch.ones(len(rows), dtype=torch.bool, device=device)
        yield Batch(inputs.to(device), targets.to(device), counted, seed)
        return
    for start in range(0, len(rows), _MOST_ROWS):
        some = rows[start : start + _MOST_ROWS].tolist()
        with kept_streams():
            read = [_read(examples, row, seed + start + place) for place, row in enumerate(some)]
        yield from _by_kind(read, device, seed + start, usual)


def _gathered(examples: Examples, rows: Tensor) -> _Pair | None:
    """Rows that are slices of two tensors; None where they are not, or some cannot be read."""
    whole = examples
    while isinstance(whole, Subset):
        whole = whole.dataset
    if not isinstance(whole, TensorDataset) or len(whole.tensors) != 2:
        return None
    try:
        return gather(examples, rows)
    except Exception:  # an index that is none: its row counts as zero, read by itself
        return None


_Pair = tuple[Tensor, Tensor]


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
    """A batch of one as a tensor that others can be stacked with."""
    if not isinstance(part, Tensor) or part.layout != torch.strided or part.is_quantized:
        raise TypeError("no plain tensor")
    if part.is_nested or part.is_meta:
        raise TypeError("a tensor without numbers")
    return part[0].detach().as_subclass(Tensor)


def _large(one: Tensor) -> int:
    """More numbers than a target has beside such an input, in whatever task it is."""
    return 16 * one.numel() + 4096


def _by_kind(
    read: Sequence[_Pair | None], device: torch.device, seed: int, usual: Kind | None
) -> Iterator[Batch]:
    kinds: dict[object, list[int]] = {}
    for place, pair in enumerate(read):
        if pair is not None:
            kind = tuple((part.shape, part.dtype) for part in pair)
            if usual is not None and (kind[0] != usual or pair[1].numel() > _large(pair[0])):
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
