"""GRU, LSTM and plain recurrent layers of many clients, step by step for all of them.

Shapes: ``K`` clients, ``T`` steps, ``B`` examples, ``H`` hidden values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from server.simulation.batched.stacked.dropout import Streams
from server.simulation.batched.stacked.weights import NotStackable, StackedWeight


class _Gru(Function):
    """One direction of one GRU layer, with its backward pass through time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, first: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Returns all hidden states ``(K, T, B, H)``.

        Args:
            ctx: Of the backward pass.
            x: Products of the inputs, ``(K, T, B, 3H)``, for reset gate, update gate and candidate.
            first: Hidden state before the first step, ``(K, B, H)``.
            weight: ``(K, 3H, H)``.
            bias: ``(K, 3H)``.
        """
        from fedcore.kernels.recurrent import gru_forward  # compiles on first use

        run: Any = gru_forward
        states, products = _beginning(x, first), x.new_empty((len(x), *x.shape[2:]))
        gates = x.new_empty((*x.shape[:3], 4 * first.shape[2]))
        arrays: Any = [one.numpy() for one in (x.contiguous(), products, gates, states)]
        added, turned = bias.unsqueeze(1), weight.transpose(1, 2)
        for step in range(x.shape[1]):
            torch.baddbmm(added, states[:, step], turned, out=products)
            run(*arrays, step)
        ctx.save_for_backward(weight, gates, states)
        return states[:, 1:]

    @staticmethod
    def backward(ctx: Any, grads: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns the gradients of products, first state, weight and bias."""
        from fedcore.kernels.recurrent import gru_backward

        run: Any = gru_backward
        weight, gates, states = ctx.saved_tensors
        hidden = states.shape[3]
        of_products = gates.new_empty((*gates.shape[:3], 3 * hidden))
        of_candidates = gates.new_empty((*gates.shape[:3], hidden))
        back = torch.zeros_like(states[:, 0])
        tensors = (back, grads.contiguous(), gates, states, of_products, of_candidates)
        arrays: Any = [one.numpy() for one in tensors]
        for step in reversed(range(gates.shape[1])):
            run(*arrays, step)
            back.baddbmm_(of_products[:, step], weight)
        of_weight, of_bias = _of_weights(of_products, states)
        of_products[..., 2 * hidden :] = of_candidates  # the reset gate acts on the state alone
        return of_products, back, of_weight, of_bias


class _Lstm(Function):
    """One direction of one LSTM layer, with its backward pass through time."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, first: Tensor, cell: Tensor, weight: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns all hidden states ``(K, T, B, H)`` and the last cell state ``(K, B, H)``.

        Args:
            ctx: Of the backward pass.
            x: Products of the inputs, ``(K, T, B, 4H)``, for input, forget, cell and output gates.
            first: Hidden state before the first step, ``(K, B, H)``.
            cell: Cell state before the first step, ``(K, B, H)``.
            weight: ``(K, 4H, H)``.
            bias: ``(K, 4H)``.
        """
        from fedcore.kernels.recurrent import lstm_forward  # compiles on first use

        run: Any = lstm_forward
        states, cells = _beginning(x, first), _beginning(x, cell)
        squashed = x.new_empty((*x.shape[:3], first.shape[2]))
        gates, products = torch.empty_like(x), x.new_empty((len(x), *x.shape[2:]))
        tensors = (x.contiguous(), products, gates, cells, squashed, states)
        arrays: Any = [one.numpy() for one in tensors]
        added, turned = bias.unsqueeze(1), weight.transpose(1, 2)
        for step in range(x.shape[1]):
            torch.baddbmm(added, states[:, step], turned, out=products)
            run(*arrays, step)
        ctx.save_for_backward(weight, gates, cells, squashed, states)
        return states[:, 1:], cells[:, -1].clone()

    @staticmethod
    def backward(
        ctx: Any, grads: Tensor, of_last: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Returns the gradients of products, first states, weight and bias."""
        from fedcore.kernels.recurrent import lstm_backward

        run: Any = lstm_backward
        weight, gates, cells, squashed, states = ctx.saved_tensors
        of_products, of_cell = (
            torch.empty_like(gates),
            of_last.clone(memory_format=torch.contiguous_format),
        )
        back = torch.zeros_like(of_cell)
        tensors = (back, of_cell, grads.contiguous(), gates, cells, squashed, of_products)
        arrays: Any = [one.numpy() for one in tensors]
        for step in reversed(range(gates.shape[1])):
            run(*arrays, step)
            torch.bmm(of_products[:, step], weight, out=back)
        return of_products, back, of_cell, *_of_weights(of_products, states)


class _Plain(Function):
    """One direction of one plain recurrent layer, with its backward pass through time."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, first: Tensor, weight: Tensor, bias: Tensor, relu: bool
    ) -> Tensor:
        """Returns all hidden states ``(K, T, B, H)``; arguments as for `_Gru`, with one gate."""
        states, turned, added = _beginning(x, first), weight.transpose(1, 2), bias.unsqueeze(1)
        for step in range(x.shape[1]):
            h = states[:, step + 1]
            torch.add(torch.baddbmm(added, states[:, step], turned), x[:, step], out=h)
            h.relu_() if relu else h.tanh_()
        ctx.save_for_backward(weight, states)
        ctx.relu = relu
        return states[:, 1:]

    @staticmethod
    def backward(ctx: Any, grads: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        """Returns the gradients of products, first state, weight and bias."""
        weight, states = ctx.saved_tensors
        of_products, back = torch.empty_like(states[:, 1:]), torch.zeros_like(states[:, 0])
        for step in reversed(range(grads.shape[1])):
            h, mine = states[:, step + 1], of_products[:, step]
            back = back + grads[:, step]
            torch.mul(back, (h > 0) if ctx.relu else 1 - h * h, out=mine)
            back = torch.bmm(mine, weight)
        return of_products, back, *_of_weights(of_products, states), None


def _beginning(x: Tensor, first: Tensor) -> Tensor:
    """Returns memory for all states, ``(K, T + 1, B, H)``, that begins with the first one."""
    states = x.new_empty((x.shape[0], x.shape[1] + 1, x.shape[2], first.shape[2]))
    states[:, 0] = first
    return states


def _of_weights(of_products: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the gradients of the state's weight and bias, over all steps and examples."""
    flat, before = of_products.flatten(1, 2), states[:, :-1].flatten(1, 2)
    return torch.bmm(flat.transpose(1, 2), before), flat.sum(dim=1)


GATES = {"gru": 3, "lstm": 4, "rnn_tanh": 1, "rnn_relu": 1}


def recurrent(
    kind: str,
    streams: Streams,
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
    function: Any = {"gru": _Gru, "lstm": _Lstm}.get(kind, _Plain)
    if kind == "lstm":
        result, *others = function.apply(products, *states, of_state, bias)
    else:
        relu = () if kind == "gru" else (kind == "rnn_relu",)
        result, others = function.apply(products, *states, of_state, bias, *relu), []
    last = (result[:, -1], *others)
    return result.flip(1) if backwards else result, last
