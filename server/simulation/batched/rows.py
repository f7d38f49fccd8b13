"""Batches of a group of clients: which examples each uses in which step, stacked in one tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from fedcore.config.run import ClientConfig
from fedcore.errors import DataError
from fedcore.task.model import FullModel
from fedcore.training.batches import batches_of, gather_all
from server.simulation.batched.work import LocalWork


@dataclass(frozen=True)
class Rows:
    """Batches of ``K`` clients over ``T`` steps, each padded to ``width`` rows.

    Clients are in descending order of their number of steps. Step ``t`` starts at column ``t *
    width`` and has batches of the first ``active[t]`` clients.
    """

    inputs: Tensor
    """``(K, T * width, ...)``, after preprocessing; padding rows are zero."""
    targets: Tensor
    """``(K, T * width, ...)``."""
    counts: Tensor
    """Examples in each batch, ``(K, T)``; an empty batch has 0, and is still a step."""
    active: tuple[int, ...]
    """Number of clients in each step."""
    step_counts: Tensor
    """Number of steps of each client, ``(K,)``."""
    last_counts: Tensor
    """Number of steps in each client's last pass over its data, ``(K,)``."""
    width: int
    widest: tuple[int, ...]
    """Rows of the largest batch of each step, at least 1; the rows after it are padding for
    every client."""
    full: bool
    """Whether there are no padding rows."""

    @cached_property
    def mask(self) -> Tensor:
        """1 for rows with an example, 0 for padding: ``(K, T, width)``."""
        columns = torch.arange(self.width, device=self.counts.device)
        return (columns < self.counts.unsqueeze(2)).to(torch.float32)


@dataclass(frozen=True)
class BatchOrder:
    """The examples of one client's batches."""

    rows: Tensor
    """Rows of the examples of all batches, concatenated."""
    lengths: Sequence[int]
    """Number of examples in each batch."""
    last: int
    """Number of batches in the last pass over the data."""


def shuffled_order(work: LocalWork, settings: ClientConfig, *, least: int = 1) -> BatchOrder:
    """Returns the same batches as `fedcore.training.local.train`.

    Args:
        work: A client's examples and random streams.
        settings: Settings of its training.
        least: Rows that a batch needs, see `fedcore.training.batches.batches_of`.
    """
    rng, count = work.order(), work.size
    each = [len(one) for one in batches_of(torch.arange(count), settings.batch_size, least=least)]
    steps = settings.epochs * len(each) if settings.steps is None else settings.steps
    passes = -(-steps // len(each))
    lengths = (each * passes)[:steps]
    drawn = [torch.randperm(count, generator=rng) for _ in range(passes)]
    rows = drawn[0] if passes == 1 else torch.cat(drawn)
    return BatchOrder(rows[: sum(lengths)], lengths, steps - (passes - 1) * len(each))


def poisson_order(work: LocalWork) -> BatchOrder:
    """Returns the same batches as `fedcore.training.private.train_private`."""
    assert work.private is not None
    count, charge = work.size, work.private.plan.charge
    drawn = torch.rand(charge.steps, count, generator=work.order()) < charge.sample_rate
    return BatchOrder(drawn.nonzero()[:, 1], drawn.sum(dim=1).tolist(), last=charge.steps)


def stack_batches(
    model: FullModel, work: Sequence[LocalWork], orders: Sequence[BatchOrder], device: torch.device
) -> Rows:
    """Stacks the batches of all clients; ``work`` is in descending order of steps."""
    steps = [len(order.lengths) for order in orders]
    width = max(max(order.lengths) for order in orders) or 1
    columns = steps[0] * width
    inputs = targets = torch.empty(0)
    for place, (one, order) in enumerate(zip(work, orders, strict=True)):
        x, y = client_rows(model, one, device)
        if place:
            check_alike((x, y), (inputs[0], targets[0]))
        else:
            inputs = x.new_empty((len(work), columns, *x.shape[1:]))
            targets = y.new_empty((len(work), columns, *y.shape[1:]), device=device)
        index = _padded(order, width, columns).to(device)
        torch.index_select(x, 0, index, out=inputs[place])
        torch.index_select(y, 0, index, out=targets[place])
    lengths = [[*order.lengths, *[0] * (steps[0] - len(order.lengths))] for order in orders]
    rows = Rows(
        inputs,
        targets,
        counts=torch.tensor(lengths, device=device),
        active=tuple(sum(step < taken for taken in steps) for step in range(steps[0])),
        step_counts=torch.tensor(steps, device=device),
        last_counts=torch.tensor([order.last for order in orders], device=device),
        width=width,
        widest=tuple(max(1, *step) for step in zip(*lengths, strict=True)),
        full=all(length == width for row in lengths for length in row),
    )
    if not rows.full:  # padding may be NaN, which a factor of 0 would keep
        inputs[rows.mask.flatten(1) == 0] = 0
    return rows


def client_rows(model: FullModel, one: LocalWork, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns a client's examples on a device, preprocessed; does not copy without need."""
    x, y = gather_all(one.examples)
    x = x.to(device)
    if type(model.preprocess) is not nn.Identity:
        with torch.no_grad():
            x = model.preprocess(x)
    return x, y.to(device)


def check_alike(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> None:
    """Rejects training two clients together whose inputs or targets differ in kind.

    Raises:
        DataError: shape or dtype differ.
    """
    (x, y), (inputs, targets) = one, other
    if _kind(x) != _kind(inputs) or _kind(y) != _kind(targets):
        raise DataError(
            f"data: examples are {_kind(x)} with targets {_kind(y)}, but those of another client "
            f"are {_kind(inputs)} with {_kind(targets)}. They were not trained together."
        )


def _kind(batch: Tensor) -> tuple[torch.dtype, tuple[int, ...]]:
    """Returns the dtype and the shape of one example in a batch."""
    return batch.dtype, tuple(batch.shape[1:])


def _padded(order: BatchOrder, width: int, columns: int) -> Tensor:
    """Returns the rows of all batches in sequence, each batch padded with the first example."""
    rows = order.rows
    if all(length == width for length in order.lengths):
        return (
            torch.cat([rows, rows.new_zeros(columns - len(rows))]) if len(rows) < columns else rows
        )
    numbers, index, begin = rows.tolist(), [], 0  # lists are faster at this size
    for length in order.lengths:
        index += numbers[begin : begin + length]
        index += [0] * (width - length)
        begin += length
    return torch.tensor(index + [0] * (columns - len(index)))
