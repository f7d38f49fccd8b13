"""Compiled loops for one step of a GRU or LSTM, forward and backward, over many examples.

The caller computes the products of inputs and states with the weights; the loops apply the gates.
``tanh`` is a rational function, so that the loops vectorise; it is accurate to a few units in the
last place of float32. NaN stays NaN.

Importing this module compiles the loops, which takes a few seconds the first time.

Shapes: ``K`` clients, ``T`` steps, ``B`` examples, ``H`` hidden values. States have one step more
than gates: the first is the state before the first step.

Source:
    The rational function is a minimax fit from Eigen's ``generic_fast_tanh_float``.
"""

from __future__ import annotations

from typing import Any, cast

import numba
import numpy as np
from numpy.typing import NDArray

from fedcore.kernels.compiled import Function, compiled

Floats = NDArray[np.float32]

_BOUND = np.float32(7.90531110763549805)  # beyond it, tanh is 1 in float32
_A = tuple(
    np.float32(value)
    for value in (
        *(-2.76076847742355e-16, 2.00018790482477e-13, -8.60467152213735e-11, 5.12229709037114e-08),
        *(1.48572235717979e-05, 6.37261928875436e-04, 4.89352455891786e-03),
    )
)
_B = tuple(
    np.float32(value)
    for value in (
        *(1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03),
    )
)
_HALF, _ONE = np.float32(0.5), np.float32(1)
_A0, _A1, _A2, _A3, _A4, _A5, _A6 = _A
_B0, _B1, _B2, _B3 = _B


def _inlined(function: Function) -> Function:
    """Compiles a function into the loops that call it; a decorator."""
    return cast(Function, numba.njit(inline="always")(function))


_CONTRACT = {"contract"}  # permits fused multiply-add only
_STEP = "void(float32[:, :, :, ::1], float32[:, :, ::1], {}int64)"
_REST = "float32[:, :, :, ::1], "


@_inlined
def _tanh(value: Any) -> Any:
    # Comparisons with NaN are false: it passes.
    x = _BOUND if value > _BOUND else value
    x = -_BOUND if x < -_BOUND else x
    square = x * x
    top = square * (square * (square * _A0 + _A1) + _A2) + _A3
    top = square * (square * (square * top + _A4) + _A5) + _A6
    bottom = square * (square * (square * _B0 + _B1) + _B2) + _B3
    return x * top / bottom


@_inlined
def _sigmoid(value: Any) -> Any:
    return _HALF * _tanh(_HALF * value) + _HALF


# Each loop writes one array: with more, the tests for overlaps cost more than the loop.


@_inlined
def _add_sigmoid(found: Any, one: Any, other: Any) -> None:
    for j in range(len(found)):
        found[j] = _sigmoid(one[j] + other[j])


@_inlined
def _add_tanh(found: Any, one: Any, other: Any) -> None:
    for j in range(len(found)):
        found[j] = _tanh(one[j] + other[j])


@_inlined
def _through_sigmoid(found: Any, back: Any, factor: Any, gate: Any) -> None:
    for j in range(len(found)):
        found[j] = back[j] * factor[j] * gate[j] * (_ONE - gate[j])


@compiled(_STEP.format(_REST * 2), fastmath=_CONTRACT)
def gru_forward(given: Floats, products: Floats, gates: Floats, states: Floats, step: int) -> None:
    """Computes one step of a GRU.

    Args:
        given: Products of the inputs, ``(K, T, B, 3H)``: reset gate, update gate, candidate.
        products: Products of the states, ``(K, B, 3H)``, with bias.
        gates: Filled for this step, ``(K, T, B, 4H)``: reset gate, update gate, candidate, and the
            state's product that the reset gate multiplies.
        states: ``(K, T + 1, B, H)``; the next one is filled.
        step: Number of the step, from 0.
    """
    h = states.shape[3]
    for k in range(states.shape[0]):
        for b in range(states.shape[2]):
            x, p, g = given[k, step, b], products[k, b], gates[k, step, b]
            before, after = states[k, step, b], states[k, step + 1, b]
            reset, update, candidate, kept = g[:h], g[h : 2 * h], g[2 * h : 3 * h], g[3 * h :]
            _add_sigmoid(reset, x[:h], p[:h])
            _add_sigmoid(update, x[h : 2 * h], p[h : 2 * h])
            product, mine = p[2 * h :], x[2 * h :]
            for j in range(h):
                kept[j] = product[j]
            for j in range(h):
                candidate[j] = _tanh(mine[j] + reset[j] * product[j])
            for j in range(h):
                after[j] = candidate[j] + update[j] * (before[j] - candidate[j])


@compiled(
    "void(float32[:, :, ::1], float32[:, :, :, ::1], float32[:, :, :, ::1], "
    "float32[:, :, :, ::1], float32[:, :, :, ::1], float32[:, :, :, ::1], int64)",
    fastmath=_CONTRACT,
)
def gru_backward(
    back: Floats,
    grads: Floats,
    gates: Floats,
    states: Floats,
    of_products: Floats,
    of_candidates: Floats,
    step: int,
) -> None:
    """Computes the backward pass of one step of a GRU.

    Args:
        back: Gradients of the step's result through later steps, ``(K, B, H)``; replaced by those
            of the state before that do not pass through its products.
        grads: Gradients of all results, ``(K, T, B, H)``.
        gates: From `gru_forward`.
        states: From `gru_forward`.
        of_products: Filled with the gradients of the states' products, ``(K, T, B, 3H)``.
        of_candidates: Filled with the gradients of the candidates' sums, ``(K, T, B, H)``.
        step: Number of the step, from 0.
    """
    h = states.shape[3]
    for k in range(states.shape[0]):
        for b in range(states.shape[2]):
            d, own, g = back[k, b], grads[k, step, b], gates[k, step, b]
            before, p, c = states[k, step, b], of_products[k, step, b], of_candidates[k, step, b]
            reset, update, candidate, kept = g[:h], g[h : 2 * h], g[2 * h : 3 * h], g[3 * h :]
            of_update, of_candidate = p[h : 2 * h], p[2 * h :]
            for j in range(h):
                d[j] += own[j]
            for j in range(h):
                c[j] = d[j] * (_ONE - update[j]) * (_ONE - candidate[j] * candidate[j])
            for j in range(h):
                change = d[j] * (before[j] - candidate[j])
                of_update[j] = change * update[j] * (_ONE - update[j])
            _through_sigmoid(p[:h], c, kept, reset)
            for j in range(h):
                of_candidate[j] = c[j] * reset[j]
            for j in range(h):
                d[j] = d[j] * update[j]


@compiled(_STEP.format(_REST * 4), fastmath=_CONTRACT)
def lstm_forward(
    given: Floats,
    products: Floats,
    gates: Floats,
    cells: Floats,
    squashed: Floats,
    states: Floats,
    step: int,
) -> None:
    """Computes one step of an LSTM.

    Args:
        given: Products of the inputs, ``(K, T, B, 4H)``: input, forget, cell and output gates.
        products: Products of the states, ``(K, B, 4H)``, with bias.
        gates: Filled for this step, ``(K, T, B, 4H)``.
        cells: ``(K, T + 1, B, H)``; the next one is filled.
        squashed: Filled with the next cell state's tanh, ``(K, T, B, H)``.
        states: ``(K, T + 1, B, H)``; the next one is filled.
        step: Number of the step, from 0.
    """
    h = states.shape[3]
    for k in range(states.shape[0]):
        for b in range(states.shape[2]):
            x, p, g = given[k, step, b], products[k, b], gates[k, step, b]
            before, after = cells[k, step, b], cells[k, step + 1, b]
            into, forget, new, out = g[:h], g[h : 2 * h], g[2 * h : 3 * h], g[3 * h :]
            _add_sigmoid(into, x[:h], p[:h])
            _add_sigmoid(forget, x[h : 2 * h], p[h : 2 * h])
            _add_tanh(new, x[2 * h : 3 * h], p[2 * h : 3 * h])
            _add_sigmoid(out, x[3 * h :], p[3 * h :])
            small, result = squashed[k, step, b], states[k, step + 1, b]
            for j in range(h):
                after[j] = forget[j] * before[j] + into[j] * new[j]
            for j in range(h):
                small[j] = _tanh(after[j])
            for j in range(h):
                result[j] = out[j] * small[j]


@compiled(
    "void(float32[:, :, ::1], float32[:, :, ::1], float32[:, :, :, ::1], float32[:, :, :, ::1], "
    "float32[:, :, :, ::1], float32[:, :, :, ::1], float32[:, :, :, ::1], int64)",
    fastmath=_CONTRACT,
)
def lstm_backward(
    back: Floats,
    of_cell: Floats,
    grads: Floats,
    gates: Floats,
    cells: Floats,
    squashed: Floats,
    of_products: Floats,
    step: int,
) -> None:
    """Computes the backward pass of one step of an LSTM.

    Args:
        back: Gradients of the step's result through later steps, ``(K, B, H)``; changed.
        of_cell: Gradients of the step's cell state through later steps, ``(K, B, H)``; replaced by
            those of the cell state before.
        grads: Gradients of all results, ``(K, T, B, H)``.
        gates: From `lstm_forward`.
        cells: From `lstm_forward`.
        squashed: From `lstm_forward`.
        of_products: Filled with the gradients of the products, ``(K, T, B, 4H)``.
        step: Number of the step, from 0.
    """
    h = cells.shape[3]
    for k in range(cells.shape[0]):
        for b in range(cells.shape[2]):
            d, c, own, g = back[k, b], of_cell[k, b], grads[k, step, b], gates[k, step, b]
            before, small, p = cells[k, step, b], squashed[k, step, b], of_products[k, step, b]
            into, forget, new, out = g[:h], g[h : 2 * h], g[2 * h : 3 * h], g[3 * h :]
            of_new = p[2 * h : 3 * h]
            for j in range(h):
                d[j] += own[j]
            for j in range(h):
                c[j] += d[j] * out[j] * (_ONE - small[j] * small[j])
            _through_sigmoid(p[:h], c, new, into)
            _through_sigmoid(p[h : 2 * h], c, before, forget)
            _through_sigmoid(p[3 * h :], d, small, out)
            for j in range(h):
                of_new[j] = c[j] * into[j] * (_ONE - new[j] * new[j])
            for j in range(h):
                c[j] = c[j] * forget[j]
