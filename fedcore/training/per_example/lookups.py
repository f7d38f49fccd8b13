"""Per-example gradients of models with embeddings, without a table-sized gradient per example.

An example reads few rows of an embedding table, and its gradient is zero in all others. So
gradients are computed per lookup, and repeated lookups of a row by one example are added up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad

from fedcore.task.definition import Loss
from fedcore.training.per_example.clipping import norms
from fedcore.training.per_example.gradient_methods import (
    GradientMethod,
    GradientPart,
    fresh,
    of_gradients,
    own_states,
    trainable_parameters,
    where,
)
from fedcore.training.per_example.mapping import vmap

_LARGE = 4
"""Minimum ratio of a table's size to the numbers that one example looks up, for handling the table
by its lookups. Sorting these took a quarter longer than copying a table 1.5 times as large."""
Taps = Mapping[str, Sequence[Tensor]]
"""Maps a layer's name to one tensor per call of that layer in a forward pass."""


def find_tables(model: nn.Module) -> tuple[str, ...]:
    """Returns the names of the embedding layers whose gradients can be computed by lookup.

    Excludes tied and frozen tables, and settings that modify rows on reading (``max_norm``), scale
    gradients by frequency, or make them sparse.
    """
    used: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        used[id(parameter)] = used.get(id(parameter), 0) + 1
    return tuple(
        name
        for name, layer in model.named_modules()
        if type(layer) is nn.Embedding
        and name
        and layer.weight.requires_grad
        and used[id(layer.weight)] == 1
        and layer.max_norm is None
        and not (layer.scale_grad_by_freq or layer.sparse)
    )


def lookup_method(
    model: nn.Module, preprocessed: Tensor, loss: Loss, *, why: str
) -> GradientMethod | None:
    """Returns the method for vectorisable models with large embeddings; None for other models.

    Guarantee:
        An example's norm is that of the gradient that ``add`` adds for it, up to float32 rounding.
        Uses of a table outside its layer get no gradient here: the caller must detect them by
        comparing methods.

    Args:
        model: On the device to train on.
        preprocessed: Preprocessed inputs, ``(B, ...)``, to count lookups.
        loss: Mean loss over a batch, called on batches of one.
        why: Why the model is not a chain.
    """
    looked_up = _no_taps(fresh(model)[0], find_tables(model), preprocessed[:1])
    looked_up = {name: taps for name, taps in looked_up.items() if _is_large(model, name, taps)}
    names = tuple(looked_up)
    if not names:
        return None
    kept = {f"{name}.weight" for name in names}
    others = sum(
        one.numel() for name, one in trainable_parameters(model).items() if name not in kept
    )
    numbers = sum(tap.numel() for taps in looked_up.values() for tap in taps)

    def compute(
        preprocess: nn.Module, model: nn.Module, inputs: Tensor, targets: Tensor
    ) -> GradientPart:
        values = {name: p.detach() for name, p in trainable_parameters(model).items()}
        tables = {name: values.pop(name) for name in kept}
        before, network, judge = fresh(preprocess, model, loss)
        with torch.no_grad():
            (first, once) = fresh(before, network)
            taps = _no_taps(once, names, first(inputs[:1]))

        def alone(values: Any, taps: Taps, one: Tensor, target: Tensor) -> Any:
            with torch.no_grad():
                given = before(one.unsqueeze(0))
            with _tapped(network, taps) as rows:
                output = functional_call(network, {**values, **tables}, (given,))
            return judge(output, target.unsqueeze(0)), rows

        mapped = vmap(
            grad(alone, argnums=(0, 1), has_aux=True),
            in_dims=(None, None, 0, 0),
            randomness="different",
        )
        with own_states(network):
            (found, grads), rows = mapped(values, taps, inputs, targets)
        parts = {
            f"{name}.weight": _of_table(
                model.get_submodule(name), rows[name], grads[name], tables[f"{name}.weight"]
            )
            for name in names
            if grads[name]
        }
        parts |= {name: of_gradients([one]) for name, one in found.items()}
        return _concatenated_parts(model, parts)

    return GradientMethod("vmap", compute, 12 * others + 20 * numbers, why)


def _is_large(model: nn.Module, name: str, taps: Sequence[Tensor]) -> bool:
    """Returns whether a table is worth the sorting; copies of a small one are faster."""
    table = model.get_submodule(name).weight
    return table.numel() > _LARGE * sum(tap.numel() for tap in taps)  # type: ignore[operator]


def _no_taps(model: nn.Module, names: Sequence[str], preprocessed: Tensor) -> Taps:
    """Returns zeros of the shape of each layer's output for one example, ``(1, ..., row size)``."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}

    def see(name: str) -> Any:
        return lambda layer, args, output: found[name].append(torch.zeros_like(output))

    hooks = [model.get_submodule(name).register_forward_hook(see(name)) for name in names]
    try:
        with torch.no_grad():
            model(preprocessed)
    finally:
        for hook in hooks:
            hook.remove()
    return found


@contextmanager
def _tapped(model: nn.Module, taps: Taps) -> Iterator[dict[str, list[Tensor]]]:
    """Adds each tap to its layer's output, and records the row numbers that the layer received."""
    rows: dict[str, list[Tensor]] = {name: [] for name in taps}

    def tap(name: str) -> Any:
        def add(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            rows[name].append(args[0])
            return output + taps[name][len(rows[name]) - 1]

        return add

    hooks = [model.get_submodule(name).register_forward_hook(tap(name)) for name in taps]
    try:
        yield rows
    finally:
        for hook in hooks:
            hook.remove()


def _of_table(
    layer: nn.Module, rows: Sequence[Tensor], grads: Sequence[Tensor], table: Tensor
) -> GradientPart:
    """Returns one table's gradients from row numbers and the gradients of the looked-up values."""
    index = torch.cat([one.flatten(1).long() for one in rows], dim=1)
    each = torch.cat([one.reshape(len(one), -1, table.shape[1]) for one in grads], dim=1)
    if isinstance(layer.padding_idx, int):
        each = each.masked_fill((index == layer.padding_idx).unsqueeze(2), 0.0)
    index, each = sum_duplicate_rows(index, each)
    squares = norms(each.flatten(1)).square()
    usable = torch.isfinite(squares)
    each = where(usable, each)

    def add(share: Tensor, totals: Sequence[Tensor]) -> None:
        (total,) = totals  # wide enough to sum all examples
        shared = each * share[:, None, None]
        total.index_add_(0, index.flatten(), shared.flatten(0, 1).to(total.dtype))

    return GradientPart(squares, usable, add)


def sum_duplicate_rows(index: Tensor, each: Tensor) -> tuple[Tensor, Tensor]:
    """Adds up an example's entries with equal row numbers in one position.

    Args:
        index: Row numbers, int64, ``(B, L)``.
        each: Shape ``(B, L, row size)``.

    Returns:
        Row numbers and sums in the same shapes. Each row number appears once per example; leftover
        positions contain zeros, and may repeat row 0.
    """
    index, order = index.sort(dim=1, stable=True)
    new = torch.zeros_like(index)
    new[:, 1:] = index[:, 1:] != index[:, :-1]
    place = new.cumsum(dim=1)
    wide = order.unsqueeze(2).expand_as(each)
    total = torch.zeros_like(each)
    total.scatter_add_(1, place.unsqueeze(2).expand_as(each), each.gather(1, wide))
    return torch.zeros_like(index).scatter_(1, place, index), total


def _concatenated_parts(model: nn.Module, parts: Mapping[str, GradientPart]) -> GradientPart:
    """Combines the parts of all parameters, in the model's order; skips parameters without one."""
    squares = torch.stack([part.squares for part in parts.values()]).sum(dim=0)
    usable = torch.stack([part.usable for part in parts.values()]).all(dim=0)

    def add(share: Tensor, totals: Sequence[Tensor]) -> None:
        for name, total in zip(trainable_parameters(model), totals, strict=True):
            if name in parts:
                parts[name].add(share, [total])

    return GradientPart(squares, usable & torch.isfinite(squares), add)
