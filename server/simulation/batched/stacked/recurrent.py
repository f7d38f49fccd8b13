"""GRU, LSTM and plain recurrent layers of many clients, step by step for all of them.

Shapes: ``K`` clients, ``T`` steps, ``B`` examples, ``H`` hidden values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedcore.training.recurrent import Gru, Lstm, PlainRecurrent
from server.simulation.batched.dropout import DropoutStreams
from server.simulation.batched.stacked.weights import NotStackable, StackedWeight

GATES = {"gru": 3, "lstm": 4, "rnn_tanh": 1, "rnn_relu": 1}


def recurrent(
    kind: str,
    streams: DropoutStreams,
    x: Tensor,
    states: Tensor | Sequence[Tensor],
    weights: Sequence[Tensor],
    has_biases: bool,
    layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool | None = None,
) -> tuple[Tensor, ...]:
    """Is `torch.gru`, `torch.lstm`, `torch.rnn_tanh` or `torch.rnn_relu` for ``K * B`` sequences.

    Raises:
        NotStackable: sequences are packed, outputs projected, or weights are no parameters.
    """
    if batch_first is None or not all(isinstance(one, StackedWeight) for one in weights):
        raise NotStackable("it packs sequences of unequal lengths, or mixes weights")
    clients = len(streams.counts)
    x = x if batch_first else x.transpose(0, 1)  # (K * B, T, in)
    now = x.reshape(clients, -1, *x.shape[1:]).transpose(1, 2)
    given = [states] if isinstance(states, Tensor) else list(states)
    firsts = [one.view(len(one), clients, -1, one.shape[2]) for one in given]  # (layers, K, B, H)
    directions, size = 1 + bidirectional, 4 if has_biases else 2
    stacked = [one.stacked for one in weights if isinstance(one, StackedWeight)]
    lasts: list[tuple[Tensor, ...]] = []
    for layer in range(layers):
        if layer and dropout and train:
            now = now * streams.keep_steps(now.shape[1], now.shape[3:], dropout, now)
        found = []
        for direction in range(directions):
            place = layer * directions + direction
            own = stacked[place * size : (place + 1) * size]
            state = [one[place] for one in firsts]
            hidden, last = _direction(kind, now, state, own, backwards=direction == 1)
            found.append(hidden)
            lasts.append(last)
        now = torch.cat(found, dim=3) if directions > 1 else found[0]
    result = now.transpose(1, 2).flatten(0, 1)
    ends = [torch.stack(one).flatten(1, 2) for one in zip(*lasts, strict=True)]
    return (result if batch_first else result.transpose(0, 1), *ends)


def _direction(
    kind: str, x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor], *, backwards: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Runs one direction of one layer on ``(K, T, B, in)``.

    Returns:
        Hidden states ``(K, T, B, H)``, and the last states ``(K, B, H)``.
    """
    of_input, of_state, *biases = weights
    if of_state.shape[1] != GATES[kind] * of_state.shape[2]:
        raise NotStackable("its recurrent layer projects its output")
    if x.device.type != "cpu" or x.dtype != torch.float32:
        raise NotStackable("its recurrent layers are not float32 on the CPU")
    x = x.flip(1) if backwards else x
    rows, turned = x.flatten(1, 2), of_input.transpose(1, 2)
    if biases:
        products = torch.baddbmm(biases[0].unsqueeze(1), rows, turned)
        bias = biases[1]
    else:
        products = torch.bmm(rows, turned)
        bias = products.new_zeros((len(x), of_state.shape[1]))
    products = products.view(*x.shape[:3], -1)
    function: Any = {"gru": Gru, "lstm": Lstm}.get(kind, PlainRecurrent)
    if kind == "lstm":
        result, *others = function.apply(products, *states, of_state, bias, None)
    else:
        last = None if kind == "gru" else kind == "rnn_relu"
        result, others = function.apply(products, *states, of_state, bias, last), []
    ends = (result[:, -1], *others)
    return result.flip(1) if backwards else result, ends
