"""GRU, LSTM and plain recurrent layers with a set of weights for each of many clients.

Shapes: ``K`` clients, ``T`` steps, ``B`` examples, ``H`` hidden values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


class Gru(Function):
    """One direction of one GRU layer, with its backward pass through time."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, first: Tensor, weight: Tensor, bias: Tensor, anchor: Tensor | None
    ) -> Tensor:
        """Returns all hidden states ``(K, T, B, H)``.

        Args:
            ctx: Of the backward pass.
            x: Products of the inputs, ``(K, T, B, 3H)``, for reset gate, update gate and candidate.
            first: Hidden state before the first step, ``(K, B, H)``.
            weight: ``(K, 3H, H)``.
            bias: ``(K, 3H)``.
            anchor: Zeros ``(K, T, B, 3H)`` that receive the gradients of the states' products.
        """
        from fedcore.kernels.recurrent import gru_forward  # compiles on first use

        run: Any = gru_forward
        x = x.contiguous()
        states, products = _beginning(x, first), x.new_empty((len(x), *x.shape[2:]))
        gates = x.new_empty((*x.shape[:3], 4 * first.shape[2]))
        arrays: Any = [one.numpy() for one in (x, products, gates, states)]
        added, turned = bias.unsqueeze(1), weight.transpose(1, 2)
        for step in range(x.shape[1]):
            torch.baddbmm(added, states[:, step], turned, out=products)
            run(*arrays, step)
        ctx.save_for_backward(weight, gates, states)
        return states[:, 1:]

    @staticmethod
    def backward(ctx: Any, grads: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the gradients of the arguments."""
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
        of_weights = _of_weights(ctx, 2, of_products, states)
        of_anchor = of_products.clone() if ctx.needs_input_grad[4] else None
        of_products[..., 2 * hidden :] = of_candidates  # the reset gate acts on the state alone
        return of_products, back, *of_weights, of_anchor


class Lstm(Function):
    """One direction of one LSTM layer, with its backward pass through time."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        first: Tensor,
        cell: Tensor,
        weight: Tensor,
        bias: Tensor,
        anchor: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Returns all hidden states ``(K, T, B, H)`` and the last cell state ``(K, B, H)``.

        Args:
            ctx: Of the backward pass.
            x: Products of the inputs, ``(K, T, B, 4H)``, for input, forget, cell and output gates.
            first: Hidden state before the first step, ``(K, B, H)``.
            cell: Cell state before the first step, ``(K, B, H)``.
            weight: ``(K, 4H, H)``.
            bias: ``(K, 4H)``.
            anchor: Zeros ``(K, T, B, 4H)`` that receive the gradients of the states' products.
        """
        from fedcore.kernels.recurrent import lstm_forward  # compiles on first use

        run: Any = lstm_forward
        x = x.contiguous()
        states, cells = _beginning(x, first), _beginning(x, cell)
        squashed = x.new_empty((*x.shape[:3], first.shape[2]))
        gates, products = torch.empty_like(x), x.new_empty((len(x), *x.shape[2:]))
        tensors = (x, products, gates, cells, squashed, states)
        arrays: Any = [one.numpy() for one in tensors]
        added, turned = bias.unsqueeze(1), weight.transpose(1, 2)
        for step in range(x.shape[1]):
            torch.baddbmm(added, states[:, step], turned, out=products)
            run(*arrays, step)
        ctx.save_for_backward(weight, gates, cells, squashed, states)
        return states[:, 1:], cells[:, -1].clone()

    @staticmethod
    def backward(ctx: Any, grads: Tensor, of_last: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the gradients of the arguments."""
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
        of_anchor = of_products.clone() if ctx.needs_input_grad[5] else None
        return of_products, back, of_cell, *_of_weights(ctx, 3, of_products, states), of_anchor


class PlainRecurrent(Function):
    """One direction of one plain recurrent layer, with its backward pass through time."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, first: Tensor, weight: Tensor, bias: Tensor, relu: bool
    ) -> Tensor:
        """Returns all hidden states ``(K, T, B, H)``; arguments as for `Gru`, with one gate."""
        states, turned, added = _beginning(x, first), weight.transpose(1, 2), bias.unsqueeze(1)
        for step in range(x.shape[1]):
            h = states[:, step + 1]
            torch.add(torch.baddbmm(added, states[:, step], turned), x[:, step], out=h)
            h.relu_() if relu else h.tanh_()
        ctx.save_for_backward(weight, states)
        ctx.relu = relu
        return states[:, 1:]

    @staticmethod
    def backward(ctx: Any, grads: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the gradients of the arguments."""
        weight, states = ctx.saved_tensors
        of_products, back = torch.empty_like(states[:, 1:]), torch.zeros_like(states[:, 0])
        for step in reversed(range(grads.shape[1])):
            h, mine = states[:, step + 1], of_products[:, step]
            back = back + grads[:, step]
            torch.mul(back, (h > 0) if ctx.relu else 1 - h * h, out=mine)
            back = torch.bmm(mine, weight)
        return of_products, back, *_of_weights(ctx, 2, of_products, states), None


def _beginning(x: Tensor, first: Tensor) -> Tensor:
    """Returns memory for all states, ``(K, T + 1, B, H)``, that begins with the first one."""
    states = x.new_empty((x.shape[0], x.shape[1] + 1, x.shape[2], first.shape[2]))
    states[:, 0] = first
    return states


def _of_weights(
    ctx: Any, place: int, of_products: Tensor, states: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Returns the gradients of the state's weight and bias, over all steps and examples.

    None where the weight, the argument at this place, needs none.
    """
    if not ctx.needs_input_grad[place]:
        return None, None
    flat, before = of_products.flatten(1, 2), states[:, :-1].flatten(1, 2)
    return torch.bmm(flat.transpose(1, 2), before), flat.sum(dim=1)
