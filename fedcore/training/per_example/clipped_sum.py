"""The sum of clipped per-example gradients over a batch: what DP-SGD adds noise to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset, default_collate

from fedcore.task import Examples, Loss
from fedcore.training.batches import gather
from fedcore.training.per_example.clipping import shares_of
from fedcore.training.per_example.ways import Part, Way, one_by_one, trained

_MOST_ROWS = 256
"""Examples that are summed up in float32; their sums are added in float64. So rounding stays below
the margin that noise is drawn larger by, however large the batch."""


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
    way: Way,
    preprocess: nn.Module,
    model: nn.Module,
    loss: Loss,
    batches: Sequence[Batch],
    *,
    clip_norm: float,
    physical: int,
) -> ClippedSum:
    """The sum over examples of their gradients, each scaled to an L2 norm of ``clip_norm`` at most.

    Guarantee:
        Replacing one example by one that counts as zero changes the sum by at most
        ``clip_norm * (1 + 1e-4)`` in L2 norm, whatever the examples, the weights, the model and the
        loss are. Each example's gradient is that of a batch of one. An example whose gradient is
        not finite, or whose forward or backward pass fails, counts as zero, and never ends the
        work. The others keep their places in the physical batches then, so that their gradients
        are the same bits, and rounding tells nothing of it either.

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
    wide = [_wide_zeros(parameter) for parameter in trained(model).values()]
    step, skipped = min(physical, _MOST_ROWS), 0
    for batch in batches:
        for start in range(0, len(batch.counted), step):
            part = batch.rows(start, start + step)
            found = _of_part(way, preprocess, model, loss, part, clip_norm)
            skipped += found.skipped
            for total, one in zip(wide, found.sums, strict=True):
                total += one
    return ClippedSum(wide, skipped)


def _wide_zeros(parameter: Tensor) -> Tensor:
    wide = torch.float32 if parameter.device.type == "mps" else torch.float64
    return torch.zeros_like(parameter, dtype=wide, requires_grad=False)


def _of_part(
    way: Way, preprocess: nn.Module, model: nn.Module, loss: Loss, batch: Batch, clip_norm: float
) -> ClippedSum:
    """That of one physical batch; examples that cannot be used are replaced until all can."""
    skipped = 0
    while bool(batch.counted.any()):
        part = _taken(way, preprocess, model, batch)
        if part is None:  # some example fails; which ones shows when each is alone
            usable = _runs(preprocess, model, loss, batch)
            if bool((usable | ~batch.counted).all()):
                rest = _alone(preprocess, model, loss, batch, clip_norm)
                return ClippedSum(rest.sums, skipped + rest.skipped)
        else:
            usable = part.usable
            if bool((usable | ~batch.counted).all()):
                shares = shares_of(part.squares, clip_norm) * batch.counted
                return ClippedSum(part.weighted(shares), skipped)
        skipped += int((batch.counted & ~usable).sum())
        batch = _without(batch, batch.counted & usable)
    return ClippedSum([torch.zeros_like(p) for p in trained(model).values()], skipped)


def _taken(way: Way, preprocess: nn.Module, model: nn.Module, batch: Batch) -> Part | None:
    """The gradients of one physical batch; None where some example's values made them fail.

    Raises:
        MemoryError, torch.OutOfMemoryError, RuntimeError: there is no memory for so many at once;
            that depends on sizes, and not on values.
    """
    try:
        with drawing_from(batch.seed):
            return way.take(preprocess, model, batch.inputs, batch.targets)
    except (Exception, SystemExit) as error:  # the task's code, on values that nobody looked at
        if len(batch.counted) > 1 and _is_out_of_memory(error):
            raise
        return None


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)


def _runs(preprocess: nn.Module, model: nn.Module, loss: Loss, batch: Batch) -> Tensor:
    """Which examples have a gradient, finite or not, when each is alone.

    Whether it is finite is decided in the batch: it may differ by rounding.
    """
    way, runs = one_by_one(loss, why=""), torch.zeros_like(batch.counted)
    for place in batch.counted.nonzero().flatten().tolist():
        runs[place] = _taken(way, preprocess, model, batch.rows(place, place + 1)) is not None
    return runs


def _alone(
    preprocess: nn.Module, model: nn.Module, loss: Loss, batch: Batch, clip_norm: float
) -> ClippedSum:
    """One example after the other, where torch cannot take these together."""
    way = one_by_one(loss, why="")
    parts = [
        _of_part(way, preprocess, model, loss, batch.rows(place, place + 1), clip_norm)
        for place in range(len(batch.counted))
    ]
    each = zip(*(part.sums for part in parts), strict=True)
    return ClippedSum(
        [torch.stack(one).sum(dim=0) for one in each], sum(part.skipped for part in parts)
    )


@contextmanager
def drawing_from(seed: int) -> Iterator[None]:
    """Has torch's default generators begin at ``seed``, and go on afterwards where they were.

    Not torch.manual_seed, which looks for GPUs of four kinds on each call.
    """
    gpus = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=gpus):
        torch.default_generator.manual_seed(seed)
        for gpu in gpus:
            torch.cuda.default_generators[gpu].manual_seed(seed)
        yield


def _without(batch: Batch, counted: Tensor) -> Batch:
    """The same places, with the first example that counts in all that do not."""
    if not bool(counted.any()):
        return replace(batch, counted=counted)
    first = counted.nonzero()[0, 0]
    index = torch.where(counted, torch.arange(len(counted), device=counted.device), first)
    return Batch(batch.inputs[index], batch.targets[index], counted, batch.seed)


def read_batch(examples: Examples, rows: Tensor, device: torch.device, *, seed: int) -> list[Batch]:
    """The examples of some rows, on a device, ready to be summed over.

    A row that cannot be read, or is no pair of tensors, is left out and counts as zero. Rows of
    different shapes or dtypes come in batches of their own, in which the others' places are filled.

    Args:
        examples: A client's data.
        rows: Row numbers, int64, ``(B,)``.
        device: Where to train.
        seed: What random numbers of data sets and models begin at, place by place.
    """
    if not len(rows):
        return []
    if _is_uniform(examples):
        inputs, targets = gather(examples, rows)
        counted = torch.ones(len(rows), dtype=torch.bool, device=device)
        return [Batch(inputs.to(device), targets.to(device), counted, seed)]
    read = [_read(examples, row, seed + place) for place, row in enumerate(rows.tolist())]
    return list(_by_kind(read, device, seed))


def _is_uniform(examples: Examples) -> bool:
    """Whether all rows are slices of two tensors, so that none can fail to be read."""
    if isinstance(examples, TensorDataset):
        return len(examples.tensors) == 2
    return isinstance(examples, Subset) and _is_uniform(examples.dataset)


_Pair = tuple[Tensor, Tensor]


def _read(examples: Examples, row: int, seed: int) -> _Pair | None:
    try:
        with drawing_from(seed):
            inputs, targets = default_collate([examples[row]])
    except (Exception, SystemExit):  # the user's code, or a broken file
        return None
    if not (isinstance(inputs, Tensor) and isinstance(targets, Tensor)):
        return None
    return inputs[0], targets[0]


def _by_kind(read: Sequence[_Pair | None], device: torch.device, seed: int) -> Iterator[Batch]:
    kinds: dict[object, list[int]] = {}
    for place, pair in enumerate(read):
        if pair is not None:
            kind = tuple((part.shape, part.dtype) for part in pair)
            kinds.setdefault(kind, []).append(place)
    for places in kinds.values():
        there = set(places)
        index = [place if place in there else places[0] for place in range(len(read))]
        pairs = [pair for place in index if (pair := read[place]) is not None]
        counted = torch.tensor([place in there for place in range(len(read))], device=device)
        inputs, targets = (torch.stack(part).to(device) for part in zip(*pairs, strict=True))
        yield Batch(inputs, targets, counted, seed)
