"""Recurrent layers in a chain: finds them in a traced model, and runs them."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from fedcore.training.recurrent import Gru, Lstm

_Held = Literal["results", "states", "pair"]


@dataclass(frozen=True)
class SequenceValue:
    """What a node of a traced model holds that is no single tensor of examples."""

    held: _Held
    """``results``: a layer's output and its last states; ``states``: the last states of all layers;
    ``pair``: hidden and cell states of an LSTM."""
    place: int
    """Where in the chain the states of the topmost layer are."""
    layers: int
    """How many layers there are."""


def is_supported(layer: nn.RNNBase) -> bool:
    """Whether a chain can run a layer: a GRU or LSTM, forwards, examples first, without dropout."""
    return (
        type(layer) in (nn.GRU, nn.LSTM)
        and layer.batch_first
        and not layer.bidirectional
        and not layer.proj_size
        and (layer.num_layers == 1 or not layer.dropout)
        and all(one.dtype == torch.float32 and one.is_cpu for one in layer.parameters())
    )


def part_of(node: fx.Node, sequences: dict[fx.Node, SequenceValue]) -> SequenceValue | int | None:
    """Returns what a node takes from a sequence.

    Returns:
        Another `SequenceValue`; the place of all states, if the node is a layer's output; -1, if it
        is the topmost layer's last state; None for anything else.
    """
    source = node.args[0] if node.args else None
    given = sequences.get(source) if isinstance(source, fx.Node) else None
    if given is None or node.kwargs or len(node.args) != 2:
        return None
    index = node.args[1]
    if node.op == "call_method" and node.target == "squeeze":
        return -1 if given.held == "states" and given.layers == 1 and index == 0 else None
    if node.op != "call_function" or node.target is not operator.getitem:
        return None
    if given.held == "states":
        return -1 if index in (-1, given.layers - 1) else None
    if index == 0:
        return given.place if given.held == "results" else SequenceValue("states", *_rest(given))
    if index == 1 and given.held == "results":
        held: _Held = "pair" if _is_lstm(source) else "states"
        return SequenceValue(held, *_rest(given))
    return None


def _rest(given: SequenceValue) -> tuple[int, int]:
    return given.place, given.layers


def _is_lstm(node: Any) -> bool:
    owner = node.graph.owning_module
    return type(owner.get_submodule(node.target)) is nn.LSTM if owner is not None else False


@dataclass(frozen=True)
class Selected:
    """Indexes each example's tensor, ``(K, B, ...)``."""

    index: tuple[Any, ...]

    def __call__(self, x: Tensor) -> Tensor:
        """Returns the selection, ``(K, B, ...)``."""
        return x[(slice(None), slice(None), *self.index)]


def unrolled(
    kind: Literal["gru", "lstm"], given: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs a recurrent layer from a state of zeros.

    Args:
        kind: The kind of layer.
        given: Products of the inputs with their weight, ``(K, B, T, G * H)`` for ``G`` gates.
        weight: Weight of the states, ``(K, G * H, H)``.
        bias: Bias of the states' products, ``(K, G * H)``.

    Returns:
        The states after each step, ``(K, B, T, H)``; those before each step, without gradients; and
        a tensor of zeros that receives the gradients of the states' products,
        ``(K, B, T, G * H)``.
    """
    products = given.new_zeros(()).expand_as(given)
    if torch.is_grad_enabled():
        products.requires_grad_()
    added = weight.new_zeros(weight.shape[:2]) if bias is None else bias
    zero = given.new_zeros((*given.shape[:2], weight.shape[2]))
    x, anchor = given.transpose(1, 2), products.transpose(1, 2)  # steps before examples
    function: Any = Gru if kind == "gru" else Lstm
    if kind == "gru":
        found = function.apply(x, zero, weight, added, anchor)
    else:
        found, _ = function.apply(x, zero, zero, weight, added, anchor)
    states: Tensor = found.transpose(1, 2)
    before = torch.cat([zero.unsqueeze(2), states.detach()[:, :, :-1]], dim=2)
    return states, before, products
