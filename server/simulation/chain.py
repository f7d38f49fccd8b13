"""Finds in a model a chain of dense layers, which many clients can run through at once."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

Elementwise = Callable[..., Tensor]

_MODULES = (
    *(nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU),
    *(nn.Mish, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid),
)
"""Layers that treat each number alone, so that a further dimension changes nothing."""
_FUNCTIONS = (
    *(torch.relu, torch.tanh, torch.sigmoid, torch.sin, torch.abs, torch.square),
    *(functional.relu, functional.tanh, functional.sigmoid, functional.gelu, functional.silu),
    *(functional.leaky_relu, functional.elu, functional.softplus),
    *(operator.add, operator.sub, operator.mul, operator.neg, torch.add, torch.mul),
)
_METHODS = ("relu", "tanh", "sigmoid", "abs", "square")


@dataclass(frozen=True)
class Dense:
    """One dense layer: names of its weight ``(out, in)`` and bias ``(out,)`` in the model."""

    weight: str
    bias: str | None


@dataclass(frozen=True)
class Step:
    """Applies ``apply`` to results of earlier steps (an int is a step's place) and constants."""

    apply: Dense | Elementwise
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Chain:
    """A model as steps; the input is place 0, step ``i`` gives place ``i + 1``."""

    steps: tuple[Step, ...]
    output: int

    @property
    def layers(self) -> tuple[Dense, ...]:
        """The dense layers, in the order in which they run."""
        return tuple(step.apply for step in self.steps if isinstance(step.apply, Dense))


@dataclass(frozen=True)
class Place:
    """Stands for the result of a step among a step's arguments."""

    index: int


def find_chain(model: nn.Module, example: Tensor) -> Chain | None:
    """The chain that ``model`` is, or None when it is anything else.

    A chain holds dense layers, each used once, and between them only functions that treat each
    number alone. What is found is run beside the model on ``example`` and must answer the same.

    Args:
        model: On any device.
        example: A batch behind preprocessing, shape ``(B, ...)``, on the model's device.
    """
    chain = _traced(model)
    if chain is None:
        return None
    named = dict(model.named_parameters())
    used = [name for one in chain.layers for name in (one.weight, one.bias) if name is not None]
    if sorted(used) != sorted(named) or list(model.buffers()):
        return None  # shared, unused or other weights
    stacked = {name: p.detach().unsqueeze(0) for name, p in named.items()}
    try:
        with torch.no_grad():
            expected = model(example)
            found = run_chain(chain, stacked, example.unsqueeze(0)).output.squeeze(0)
    except (RuntimeError, TypeError, ValueError):
        return None  # the model will say what is wrong when it is trained by itself
    same = found.shape == expected.shape and torch.allclose(found, expected, atol=1e-5, rtol=1e-4)
    return chain if same else None


@dataclass(frozen=True)
class Pass:
    """What a run through the chain leaves for the way back."""

    output: Tensor
    """``(K, B, ...)``."""
    inputs: Sequence[Tensor]
    """What each dense layer was given, ``(K, B, in)``."""
    sums: Sequence[Tensor]
    """What each dense layer gave, ``(K, B, out)``."""


def run_chain(chain: Chain, weights: dict[str, Tensor], x: Tensor) -> Pass:
    """Runs ``K`` clients' batches through ``K`` copies of the weights.

    Args:
        chain: From `find_chain`.
        weights: ``(K, ...)`` each, by their names in the model; no gradient reaches them.
        x: ``(K, B, ...)``.
    """
    places: list[Tensor] = [x]
    inputs: list[Tensor] = []
    sums: list[Tensor] = []
    for step in chain.steps:
        if not isinstance(step.apply, Dense):
            args = [places[a.index] if isinstance(a, Place) else a for a in step.args]
            places.append(step.apply(*args, **step.kwargs))
            continue
        a = places[step.args[0].index]
        weight = weights[step.apply.weight].transpose(1, 2)
        if step.apply.bias is None:
            z = torch.bmm(a, weight)
        else:
            z = torch.baddbmm(weights[step.apply.bias].unsqueeze(1), a, weight)
        if not z.requires_grad and torch.is_grad_enabled():
            z.requires_grad_()
        inputs.append(a.detach())
        sums.append(z)
        places.append(z)
    return Pass(places[chain.output], inputs, sums)


def _traced(model: nn.Module) -> Chain | None:
    if isinstance(model, nn.Linear):  # tracing a layer looks inside it
        model = nn.Sequential(model)
        prefix = ""
    else:
        prefix = None
    try:
        graph = fx.Tracer().trace(model)
    except Exception:  # the user's code, run on stand-ins for tensors: anything can happen
        return None
    modules = dict(model.named_modules())
    places: dict[fx.Node, int] = {}
    steps: list[Step] = []
    for node in graph.nodes:
        if node.op == "placeholder":
            if places:
                return None
            places[node] = 0
        elif node.op == "output":
            (result,) = node.args
            return Chain(tuple(steps), places[result]) if result in places else None
        else:
            step = _step(node, modules, places, prefix)
            if step is None:
                return None
            steps.append(step)
            places[node] = len(steps)
    return None


def _step(
    node: fx.Node, modules: dict[str, nn.Module], places: dict[fx.Node, int], prefix: str | None
) -> Step | None:
    if any(isinstance(a, fx.Node) and a not in places for a in node.all_input_nodes):
        return None
    args = tuple(Place(places[a]) if isinstance(a, fx.Node) else a for a in node.args)
    kwargs = dict(node.kwargs)
    if any(isinstance(value, fx.Node) for value in kwargs.values()):
        return None
    if node.op == "call_module":
        layer = modules[str(node.target)]
        name = str(node.target) if prefix is None else prefix
        if type(layer) is nn.Linear:
            dot = f"{name}." if name else ""
            return Step(
                Dense(f"{dot}weight", f"{dot}bias" if layer.bias is not None else None), args, {}
            )
        if type(layer) is nn.Flatten and (layer.start_dim, layer.end_dim) == (1, -1):
            return Step(_flatten, args, {})
        if type(layer) in _MODULES:
            return Step(_pure(layer), args, kwargs)
    if node.op == "call_function" and not kwargs.get("inplace"):
        if node.target is torch.flatten and node.args[1:] == (1,) and not kwargs:
            return Step(_flatten, args[:1], {})
        if any(node.target is one for one in _FUNCTIONS):
            return Step(node.target, args, kwargs)  # type: ignore[arg-type]
    if node.op == "call_method":
        if node.target == "flatten" and node.args[1:] == (1,) and not kwargs:
            return Step(_flatten, args[:1], {})
        if node.target in _METHODS:
            return Step(getattr(Tensor, str(node.target)), args, kwargs)
    return None


def _flatten(x: Tensor) -> Tensor:
    return x.flatten(2)


def _pure(layer: nn.Module) -> Elementwise:
    """The layer, never in place: what went in is needed on the way back."""
    layer = copy.copy(layer)
    if getattr(layer, "inplace", False):
        layer.__dict__["inplace"] = False
    return layer
