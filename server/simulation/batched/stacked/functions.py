"""Torch's functions for ``K`` clients at once, where they use weights or random numbers.

`RunForClients` is active while a model runs. Shapes: ``K`` clients, ``B`` examples each.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fedcore.training.function_mode import FunctionMode
from server.simulation.batched.dropout import DropoutStreams
from server.simulation.batched.stacked import attention
from server.simulation.batched.stacked.examples import (
    READINGS,
    come_of_examples,
    mark,
    refuse_choices,
)
from server.simulation.batched.stacked.recurrent import GATES, recurrent
from server.simulation.batched.stacked.weights import NotStackable, StackedWeight, tensors_in


class RunForClients(FunctionMode):
    """Torch function mode in which a model with `StackedWeight` parameters runs for all clients.

    Its inputs are the batches of all clients, one after the other, each of the same number of rows.
    """

    def __init__(self, streams: DropoutStreams) -> None:
        super().__init__()
        self.streams = streams
        self.clients = len(streams.counts)
        self.rows = streams.rows * self.clients
        """``K * B``; no size of a weight may be a multiple of it."""

    def call(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        given = list(tensors_in((*args, *kwargs.values())))
        if not come_of_examples(given):
            return self._run(func, given, args, kwargs)
        refuse_choices(func, args, kwargs)
        found = self._run(func, given, args, kwargs)
        mark(tensors_in((found, args[0]) if args and _overwrites(func) else (found,)))
        return found

    def _run(
        self,
        func: Callable[..., Any],
        given: Sequence[Tensor],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> Any:
        random = _RANDOM.get(func)
        if random is not None:
            found = random(self, *args, **kwargs)
            if found is not NotImplemented:
                return found
        held = [one for one in given if isinstance(one, StackedWeight)]
        if not held or func in _DESCRIPTIONS:
            return func(*args, **kwargs)
        if func in READINGS:
            raise NotStackable("its code depends on the values of its weights")
        rule = _RULES.get(func)
        if rule is not None:
            found = rule(self, *args, **kwargs)
            if found is not NotImplemented:
                return found
        return _for_each(self, func, args, kwargs, mixed=len(held) < len(given))

    def holds_batch(self, x: object) -> bool:
        """Returns whether a value is a tensor whose first dimension begins with the clients'."""
        return (
            isinstance(x, Tensor)
            and not isinstance(x, StackedWeight)
            and x.dim() > 0
            and x.shape[0] % self.rows == 0
            and x.shape[0] > 0
        )

    def apart(self, x: Tensor) -> Tensor:
        """Returns ``(K * B, ...)`` as ``(K, B, ...)``.

        Raises:
            NotStackable: the first dimension is another.
        """
        if not self.holds_batch(x):
            raise NotStackable("a layer's input does not have the batch as its first dimension")
        return x.reshape(self.clients, -1, *x.shape[1:])


Rule = Callable[..., Any]
"""A function of `RunForClients` and the arguments of torch's; may return NotImplemented."""


def _overwrites(func: Callable[..., Any]) -> bool:
    name = getattr(func, "__name__", "")
    return (name.endswith("_") and not name.endswith("__")) or name == "__setitem__"


def _for_each(
    run: RunForClients,
    func: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    mixed: bool,
) -> Any:
    """Calls a function for one client after the other."""
    if _overwrites(func):
        raise NotStackable(f"it overwrites weights or values with {func.__name__}")

    def of(value: Any, client: int) -> Any:
        if isinstance(value, StackedWeight):
            return value.stacked[client]
        if isinstance(value, Tensor):
            return run.apart(value)[client] if run.holds_batch(value) else value
        if isinstance(value, list | tuple):
            return type(value)(of(one, client) for one in value)
        return value

    each = [
        func(
            *(of(value, client) for value in args),
            **{key: of(value, client) for key, value in kwargs.items()},
        )
        for client in range(run.clients)
    ]
    # What comes of weights alone is as a weight; what comes of examples has their dimension.
    batch = mixed and any(run.holds_batch(one) for one in tensors_in((*args, *kwargs.values())))
    return _joined(each, batch=batch)


def _joined(each: Sequence[Any], *, batch: bool) -> Any:
    first = each[0]
    if isinstance(first, Tensor):
        return torch.cat(list(each)) if batch else StackedWeight(torch.stack(list(each)))
    if isinstance(first, list | tuple):
        return tuple(_joined(one, batch=batch) for one in zip(*each, strict=True))
    return first


def _linear(run: RunForClients, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    mine = bias is None or isinstance(bias, StackedWeight)
    if not (isinstance(weight, StackedWeight) and weight.dim() == 2 and mine and x.dim() > 1):
        return NotImplemented
    run.apart(x)
    biases = bias.stacked if isinstance(bias, StackedWeight) else None
    return attention.linear(run.clients, x, weight.stacked, biases)


def _matmul(run: RunForClients, x: Tensor, weight: Tensor) -> Any:
    plain = isinstance(weight, StackedWeight) and weight.dim() == 2
    if not plain or isinstance(x, StackedWeight) or x.dim() < 2:
        return NotImplemented
    run.apart(x)
    return attention.linear(run.clients, x, weight.stacked.transpose(1, 2), None)  # type: ignore[attr-defined]


def _embedding(
    run: RunForClients,
    x: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    if not isinstance(weight, StackedWeight) or max_norm or scale_grad_by_freq or sparse:
        return NotImplemented
    count = weight.shape[0]
    if x.numel() and not 0 <= int(x.min()) <= int(x.max()) < count:
        raise IndexError(f"an embedding of {count} rows has no row {int(x.max())}")
    if not run.holds_batch(x) and not come_of_examples([x]):
        return NotImplemented  # the same rows for all examples, such as those of positions
    ids = run.apart(x)
    starts = torch.arange(run.clients, device=x.device) * count
    places = (ids + starts.view(-1, *[1] * (ids.dim() - 1))).flatten(0, 1)
    found = functional.embedding(places, weight.stacked.flatten(0, 1))
    if padding_idx is None:
        return found
    padding = padding_idx % count
    return torch.where((x == padding).unsqueeze(-1), found.detach(), found)


def _group_norm(
    run: RunForClients,
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    normal = functional.group_norm(x, num_groups, None, None, eps)
    return _scaled(run, normal, weight, bias, behind=x.dim() - 2)


def _layer_norm(
    run: RunForClients,
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    normal = functional.layer_norm(x, normalized_shape, None, None, eps)
    return _scaled(run, normal, weight, bias, behind=0)


def _rms_norm(
    run: RunForClients,
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Any:
    normal = functional.rms_norm(x, normalized_shape, None, eps)
    return _scaled(run, normal, weight, None, behind=0)


def _instance_norm(
    run: RunForClients,
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    if running_mean is not None or not use_input_stats:
        return NotImplemented
    normal = functional.instance_norm(x, eps=eps)
    return _scaled(run, normal, weight, bias, behind=x.dim() - 2)


def _scaled(
    run: RunForClients, x: Tensor, weight: Tensor | None, bias: Tensor | None, *, behind: int
) -> Tensor:
    """Multiplies by a weight and adds a bias; ``behind`` dimensions follow theirs."""
    found = run.apart(x)
    for one, apply in ((weight, torch.mul), (bias, torch.add)):
        if isinstance(one, StackedWeight):
            shape = [*one.shape, *[1] * behind]
            before = [1] * (found.dim() - 1 - len(shape))
            found = apply(found, one.stacked.view(run.clients, *before, *shape))
        elif one is not None:
            found = apply(found, one.view(*one.shape, *[1] * behind))
    return found.flatten(0, 1)


def _elementwise(apply: Callable[..., Tensor]) -> Rule:
    """Returns the rule for a function of two values, of which one is a weight."""

    def rule(run: RunForClients, one: Any, other: Any, **kwargs: Any) -> Any:
        weight, x = (one, other) if isinstance(one, StackedWeight) else (other, one)
        if not isinstance(weight, StackedWeight) or not run.holds_batch(x) or kwargs:
            return NotImplemented
        mine, behind = weight.stacked, x.dim() - 1
        if weight.dim() == x.dim() and weight.shape[0] == 1:
            mine = mine.squeeze(1)
        if mine.dim() - 1 > behind:
            return NotImplemented
        mine = mine.view(run.clients, *[1] * (behind + 2 - mine.dim()), *mine.shape[1:])
        whole = run.apart(x)
        found = apply(mine, whole) if weight is one else apply(whole, mine)
        return found.flatten(0, 1)

    return rule


def _expanded(run: RunForClients, weight: Tensor, *sizes: Any) -> Any:
    """Rule for a weight that is repeated for each example, such as a class token."""
    shape = tuple(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes
    if not shape or shape[0] != run.rows or weight.shape[:1] not in ((), (1,)):
        return NotImplemented
    if not isinstance(weight, StackedWeight) or len(shape) < weight.dim():
        return NotImplemented
    mine = weight.stacked
    mine = mine.view(run.clients, *[1] * (len(shape) - weight.dim()), *mine.shape[1:])
    return mine.expand(run.clients, run.rows // run.clients, *shape[1:]).flatten(0, 1)


def _dropped(behind: int | None) -> Rule:
    """Returns the rule for dropout of single values (None), or of whole channels.

    Args:
        behind: Number of dimensions after the channels.
    """

    def rule(
        run: RunForClients, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Any:
        if not training or not p:
            return NotImplemented
        run.apart(x)
        if x.shape[0] != run.rows or isinstance(x, StackedWeight):
            raise NotStackable("it drops values of other tensors than batches of examples")
        if behind is not None and x.dim() != behind + 2:
            raise NotStackable("it drops channels of examples without a batch")
        like = x if behind is None else x.new_empty((*x.shape[:2], *[1] * behind))
        factors = run.streams.keep(like, p)
        return x.mul_(factors) if inplace else x * factors

    return rule


def _alpha(
    run: RunForClients, x: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False
) -> Any:
    if training and p:
        raise NotStackable("it drops values in an unusual way")
    return NotImplemented


def _attend(run: RunForClients, *args: Any, **kwargs: Any) -> Tensor:
    names = ("query", "key", "value", "mask", "dropout_p", "is_causal")
    given = dict(zip(names, args, strict=False)) | kwargs
    given["mask"] = given.pop("attn_mask", given.get("mask"))
    return attention.attend(run.streams, **given)


def _recurrent(kind: str) -> Rule:
    return lambda run, *args: recurrent(kind, run.streams, *args)


def _several(functions: Iterable[Callable[..., Any]], rule: Rule) -> dict[Callable[..., Any], Rule]:
    return dict.fromkeys(functions, rule)


_RULES: dict[Callable[..., Any], Rule] = {
    functional.linear: _linear,
    **_several((torch.matmul, Tensor.matmul, Tensor.__matmul__, operator.matmul), _matmul),
    functional.embedding: _embedding,
    functional.group_norm: _group_norm,
    functional.layer_norm: _layer_norm,
    functional.rms_norm: _rms_norm,
    functional.instance_norm: _instance_norm,
    functional.multi_head_attention_forward: lambda run, *args, **kwargs: attention.multi_head(
        run.streams, *args, **kwargs
    ),
    **_several((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__), _elementwise(torch.add)),
    **_several((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__), _elementwise(torch.mul)),
    **_several((torch.sub, Tensor.sub, Tensor.__sub__), _elementwise(torch.sub)),
    **_several((torch.div, Tensor.div, Tensor.__truediv__), _elementwise(torch.div)),
    **_several((Tensor.expand,), _expanded),
    **{getattr(torch, kind): _recurrent(kind) for kind in GATES},
}

_RANDOM: dict[Callable[..., Any], Rule] = {
    functional.dropout: _dropped(None),
    functional.dropout1d: _dropped(1),
    functional.dropout2d: _dropped(2),
    functional.dropout3d: _dropped(3),
    **_several((functional.alpha_dropout, functional.feature_alpha_dropout), _alpha),
    functional.scaled_dot_product_attention: _attend,
}
"""Rules for functions that may draw random numbers, whatever their arguments."""

_DESCRIPTIONS = {
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.stride,
    Tensor.is_floating_point,
    Tensor.__len__,
    *(
        getattr(Tensor, name).__get__
        for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cuda")
    ),
}
"""Functions that read no number of a tensor."""
