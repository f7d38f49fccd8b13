"""Finds the chain of products in a model, by tracing it with torch.fx."""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from fedcore.kernels.window import Pair
from fedcore.training.dropout import WithoutDropout
from fedcore.training.per_example.chain import (
    Chain,
    Conv,
    Recurrent,
    Step,
    StepResult,
    flattened,
    run_chain,
    stacked,
)
from fedcore.training.per_example.modules import Dropped, EachImage, of_module, pair
from fedcore.training.per_example.sequences import Selected, SequenceValue, part_of

_FUNCTIONS = (
    *(torch.relu, torch.tanh, torch.sigmoid, torch.sin, torch.abs, torch.square),
    *(functional.relu, functional.tanh, functional.sigmoid, functional.gelu, functional.silu),
    *(functional.leaky_relu, functional.elu, functional.softplus),
    *(operator.add, operator.sub, operator.mul, operator.neg, torch.add, torch.mul),
)
_METHODS = ("relu", "tanh", "sigmoid", "abs", "square")
_RELU = (functional.relu, torch.relu, Tensor.relu)


def find_chain(model: nn.Module, example: Tensor) -> Chain | None:
    """Returns the model as a chain, or None where the model is not one.

    A chain consists of dense layers, convolutions, normalisations of single examples, and GRU and
    LSTM layers, each used once, with only pooling, dropout, elementwise functions and selections
    between them. The chain must give the model's output on ``example``, without dropout.

    Args:
        model: On any device.
        example: A preprocessed batch, ``(B, ...)``, on the model's device.
    """
    was_training = model.training
    try:
        return _find(model.train(), example)
    finally:
        model.train(was_training)


def _find(model: nn.Module, example: Tensor) -> Chain | None:
    chain = _traced(model)
    if chain is None:
        return None
    chain = _with_pooling(chain)
    named = dict(model.named_parameters())
    used = [name for one in chain.layers for name in (one.weight, one.bias) if name is not None]
    if sorted(used) != sorted(named) or list(model.buffers()):
        return None  # shared or unused weights, or some outside the chain
    try:
        with torch.no_grad():
            weights = stacked(chain, {name: p.detach() for name, p in named.items()}, 1)
            with WithoutDropout():
                expected = model(example)
                passed = run_chain(chain, weights, example.unsqueeze(0))
            found = passed.output.squeeze(0)
    except (RuntimeError, TypeError, ValueError, IndexError):
        return None  # training the model itself will report the cause
    same = found.shape == expected.shape and torch.allclose(found, expected, atol=1e-5, rtol=1e-4)
    if not same:
        return None
    numbers = max((t[0, 0].numel() for t in (*passed.inputs, *passed.products)), default=0)
    drops = any(isinstance(step.apply, Dropped) for step in chain.steps)
    return replace(chain, numbers=numbers, drops=drops)


def _traced(model: nn.Module) -> Chain | None:
    prefix = None
    if isinstance(model, nn.Linear | nn.Conv2d):  # the tracer would trace into a single layer
        model = nn.Sequential(model)
        prefix = ""
    try:
        graph = fx.Tracer().trace(model)
    except Exception:  # the user's code, run on proxies: it may raise anything
        return None
    graph.owning_module = fx.GraphModule(model, graph)
    modules = dict(model.named_modules())
    places: dict[fx.Node, int] = {}
    sequences: dict[fx.Node, SequenceValue] = {}
    steps: list[Step] = []
    for node in graph.nodes:
        if node.op == "placeholder":
            if places:
                return None
            places[node] = 0
        elif node.op == "output":
            (result,) = node.args
            return Chain(tuple(steps), places[result]) if result in places else None
        elif (part := part_of(node, sequences)) is not None:
            if isinstance(part, SequenceValue):
                sequences[node] = part
                continue
            if part < 0:  # the last state: a selection from all of them
                source = sequences[node.args[0]].place
                steps.append(Step(Selected((-1,)), (StepResult(source),), {}))
            places[node] = len(steps) if part < 0 else part
        elif not _asks_for_shape(node):
            added = _steps(node, modules, places, prefix)
            if not added:
                return None
            steps += [
                replace(step, args=(StepResult(len(steps) + count),)) if count else step
                for count, step in enumerate(added)
            ]
            if isinstance(added[-1].apply, Recurrent):
                sequences[node] = SequenceValue("results", len(steps), len(added))
            else:
                places[node] = len(steps)
    return None


def _steps(
    node: fx.Node, modules: dict[str, nn.Module], places: dict[fx.Node, int], prefix: str | None
) -> tuple[Step, ...]:
    """Returns a node's steps, each on the result of the one before; none if unsupported."""
    if _flattens(node):
        (source, *_) = node.args
        return (Step(flattened, (StepResult(places[source]),), {}),) if source in places else ()  # type: ignore[index]
    if any(isinstance(a, fx.Node) and a not in places for a in node.all_input_nodes):
        return ()
    args = tuple(StepResult(places[a]) if isinstance(a, fx.Node) else a for a in node.args)
    kwargs = dict(node.kwargs)
    if any(isinstance(value, fx.Node) for value in kwargs.values()):
        return ()
    if node.op == "call_module":
        layer = modules[str(node.target)]
        if getattr(layer, "inplace", False) and _is_read_elsewhere(node, modules):
            return ()
        if len(args) != 1 or kwargs:
            return ()
        found = of_module(layer, str(node.target) if prefix is None else "")
        return tuple(Step(apply, args, {}) for apply in found)
    apply = _of_function(node, args, kwargs)
    return () if apply is None else (apply,)


def _of_function(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Step | None:
    if node.op == "call_function" and not kwargs.get("inplace"):
        if node.target is functional.max_pool2d and not kwargs.get("return_indices"):
            pooling = nn.MaxPool2d(*args[1:], **kwargs)
            return Step(EachImage(pooling), args[:1], {})
        if node.target is functional.avg_pool2d:
            mean = nn.AvgPool2d(*args[1:], **kwargs)
            return Step(EachImage(mean), args[:1], {})
        if node.target is functional.dropout:
            return _dropout(args, kwargs)
        if node.target is operator.getitem:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            plain = all(isinstance(one, int | slice) for one in index[1:])
            if index[0] == slice(None) and plain and isinstance(args[0], StepResult):
                return Step(Selected(index[1:]), args[:1], {})
            return None
        if any(node.target is one for one in _FUNCTIONS) or _divides(node):
            return Step(node.target, args, kwargs)  # type: ignore[arg-type]
    if _calls(node, torch.mean, "mean"):
        return _mean(args, kwargs)
    if node.op == "call_method" and node.target in _METHODS:
        return Step(getattr(Tensor, str(node.target)), args, kwargs)
    return None


def _dropout(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Step | None:
    given = dict(zip(("input", "p", "training"), args, strict=False)) | kwargs
    p, training = given.get("p", 0.5), given.get("training", True)
    if not isinstance(p, float | int) or not isinstance(training, bool):
        return None
    return Step(Dropped(float(p)) if training else nn.Identity(), (given["input"],), {})


def _mean(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Step | None:
    """Returns a mean over one dimension of each example, not over the batch."""
    given = dict(zip(("input", "dim"), args, strict=False)) | kwargs
    dim = given.get("dim")
    if len(args) > 2 or set(given) != {"input", "dim"} or type(dim) is not int or dim < 1:
        return None
    return Step(torch.mean, (given["input"],), {"dim": dim + 1})


def _divides(node: fx.Node) -> bool:
    """Returns whether a node divides by a constant; 0 / 0 in padding rows would spread NaN."""
    return (
        _calls(node, operator.truediv, torch.div)
        and len(node.args) == 2
        and isinstance(node.args[1], int | float)
        and not node.kwargs
    )


def _flattens(node: fx.Node) -> bool:
    """Returns whether a node flattens each example to one row, in any of the usual spellings."""
    if _calls(node, torch.flatten, "flatten"):
        dims = dict(zip(("start_dim", "end_dim"), node.args[1:], strict=False)) | node.kwargs
        return {"end_dim": -1} | dims == {"start_dim": 1, "end_dim": -1}
    if not _calls(node, torch.reshape, "reshape", "view") or node.kwargs:
        return False
    shape = node.args[1:]
    if len(shape) == 1 and isinstance(shape[0], tuple | list):
        shape = tuple(shape[0])
    if len(shape) != 2 or not isinstance(shape[1], int):
        return False
    # Running the chain against the model detects a wrong number of columns.
    return _is_batch_size(shape[0]) or bool(shape[0] == -1)


def _calls(node: fx.Node, *wanted: object) -> bool:
    """Returns whether a node calls one of these functions, or a tensor method of such a name."""
    return node.op in ("call_function", "call_method") and node.target in wanted


def _asks_for_shape(node: Any) -> bool:
    """Returns whether a node is a tensor's shape or a part of one."""
    if not isinstance(node, fx.Node):
        return False
    if _calls(node, operator.getitem):
        return _asks_for_shape(node.args[0])
    return _calls(node, "size") or (_calls(node, getattr) and node.args[1] == "shape")


def _is_batch_size(node: Any) -> bool:
    """Returns whether a node is ``x.size(0)``, ``x.shape[0]`` or ``x.size()[0]``."""
    if not _asks_for_shape(node) or node.kwargs:
        return False
    shape, *which = node.args
    if _calls(node, operator.getitem):  # indexes the whole shape, not a part of it
        whole = _calls(shape, getattr) or (_calls(shape, "size") and len(shape.args) == 1)
        return which == [0] and whole and not shape.kwargs
    return _calls(node, "size") and which == [0]


def _is_read_elsewhere(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Returns whether another node reads what this node overwrites, directly or through a view."""
    while node.all_input_nodes:
        node = node.all_input_nodes[0]
        if sum(not _asks_for_shape(reader) for reader in node.users) > 1:
            return True
        layer = modules.get(str(node.target)) if node.op == "call_module" else None
        if not (_flattens(node) or isinstance(layer, nn.Identity | nn.Flatten)):
            return False
    return False


def _with_pooling(chain: Chain) -> Chain:
    """Fuses each max-pooling into the convolution before it; a ReLU between them runs after both.

    Results outside whole pooling blocks are then not computed, and the ReLU has fewer values to
    process. `fedcore.training.order` explains why it may move.
    """
    steps = list(chain.steps)
    readers: dict[int, list[int]] = {}
    for place, step in enumerate(steps):
        for arg in (*step.args, *step.kwargs.values()):
            if isinstance(arg, StepResult):
                readers.setdefault(arg.index, []).append(place)
    readers.setdefault(chain.output, []).append(len(steps))

    def reader(place: int) -> int | None:
        """Returns the only step that reads the result of step ``place``, if exactly one does."""
        found = readers.get(place + 1, [])
        return found[0] if len(found) == 1 and found[0] < len(steps) else None

    for place, step in enumerate(steps):
        if not isinstance(step.apply, Conv):
            continue
        behind = reader(place)
        relu = behind if behind is not None and is_relu(steps[behind].apply) else None
        last = reader(relu) if relu is not None else behind
        block = pooling_block(steps[last].apply) if last is not None else None
        if last is None or block is None:
            continue
        steps[place] = replace(
            step, apply=replace(step.apply, window=replace(step.apply.window, pool=block))
        )
        steps[last] = replace(steps[last], apply=nn.Identity())
    return replace(chain, steps=tuple(steps))


def is_relu(apply: object) -> bool:
    """Returns whether a step is a ReLU, in any of its spellings."""
    return type(apply) is nn.ReLU or any(apply is one for one in _RELU)


def pooling_block(apply: object) -> Pair | None:
    """Returns the block size of a non-overlapping max-pooling; None for anything else."""
    layer = apply.layer if isinstance(apply, EachImage) else None
    if type(layer) is not nn.MaxPool2d or layer.ceil_mode or pair(layer.dilation) != (1, 1):
        return None
    block = pair(layer.kernel_size)
    return block if pair(layer.stride) == block and pair(layer.padding) == (0, 0) else None
