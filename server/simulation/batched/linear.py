"""Training of many clients of a linear classifier, with one compiled loop per client.

Matrix products over ten examples cost less than their call overhead, and copying examples into
batches costs as much again. The loop reads examples in place and keeps a client's weights in the
cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedcore.config.run import ClientConfig
from fedcore.errors import DataError
from fedcore.kernels.compiled import compiled
from fedcore.task.model import FullModel
from fedcore.training.per_example.chain import Chain, Dense, flattened
from server.simulation.batched.rows import client_rows, shuffled_order
from server.simulation.batched.work import LocalWork, TrainedClients

_CACHED_BYTES = 256 << 10  # 256 KiB: larger weights do not fit a core's cache with an example


def fits(chain: Chain, model: FullModel, settings: ClientConfig) -> bool:
    """Whether `train_linear` supports the model, given that its loss is cross-entropy."""
    if len(chain.layers) != 1 or chain.output != len(chain.steps):
        return False
    if any(
        not isinstance(step.apply, Dense) and step.apply is not flattened for step in chain.steps
    ):
        return False
    weight = model.model.get_parameter(chain.layers[0].weight)
    return (
        weight.dim() == 2
        and weight.dtype == torch.float32
        and weight.device.type == "cpu"
        and weight.numel() * weight.itemsize <= _CACHED_BYTES
        and settings.optimizer == "sgd"
        and not settings.momentum
        and settings.max_grad_norm is None
        and settings.steps is None
    )


def train_linear(
    model: FullModel,
    layer: Dense,
    work: Sequence[LocalWork],
    settings: ClientConfig,
    *,
    proximal_mu: float,
) -> TrainedClients:
    """Trains one copy of ``model`` per client, with cross-entropy and SGD, without privacy.

    Guarantee:
        Each result equals that of `fedcore.training.local.train` on the same client, up to the
        order of float32 sums, and does not depend on other clients.

    Args:
        model: The global model, for which `fits` is true; not changed.
        layer: The only layer of the model's chain.
        work: Clients with at least one example each.
        settings: Settings of local training.
        proximal_mu: Weight of FedProx's penalty; 0 without.

    Raises:
        DataError: a client's inputs or targets do not match the model in shape, dtype or range.
    """
    weight = model.model.get_parameter(layer.weight).detach()
    bias = None if layer.bias is None else model.model.get_parameter(layer.bias).detach()
    shape, numbers = weight.shape, weight.numel()
    start = weight.contiguous().numpy()
    start_bias = np.zeros(shape[0], np.float32) if bias is None else bias.numpy()
    rows = np.empty((len(work), numbers + (0 if bias is None else shape[0])), np.float32)
    rate, decay, mu = map(np.float32, (settings.learning_rate, settings.weight_decay, proximal_mu))
    losses: list[float | None] = []
    for row, one in zip(rows, work, strict=True):
        inputs, targets = _examples(model, one, shape[1])
        order = shuffled_order(one, settings)
        own = row[:numbers].reshape(shape)
        own[:] = start
        own_bias = start_bias.copy() if bias is None else row[numbers:]
        own_bias[:] = start_bias
        loss, wrong = _descend(
            inputs.numpy(), targets.numpy(), order.rows.numpy(), settings.batch_size, own, own_bias,
            start, start_bias, bias is not None, rate, decay, mu,
        )  # fmt: skip
        if wrong >= 0:
            raise DataError(
                f"data: example {int(wrong)} has the target {int(targets[int(wrong)])}, but the "
                f"model has {shape[0]} outputs. Its client was not trained."
            )
        losses.append(loss)
    return TrainedClients(torch.from_numpy(rows), losses)


def _examples(model: FullModel, one: LocalWork, width: int) -> tuple[Tensor, Tensor]:
    """Returns contiguous inputs ``(N, width)`` and targets ``(N,)``."""
    inputs, targets = client_rows(model, one, torch.device("cpu"))
    inputs = inputs.detach().flatten(1)
    if inputs.dtype != torch.float32 or inputs.shape[1] != width:
        kind = f"inputs of {inputs.shape[1]} numbers each, {inputs.dtype}"
        raise DataError(
            f"data: {kind}; the model expects {width}, torch.float32. No client was trained."
        )
    if targets.dtype != torch.int64 or targets.shape != inputs.shape[:1]:
        kind = f"targets of shape {tuple(targets.shape)} and dtype {targets.dtype}"
        raise DataError(f"data: {kind}, expected one class per example. No client was trained.")
    if len(inputs) != one.size:
        raise DataError(f"data: {one.size} examples became {len(inputs)} after preprocessing.")
    return inputs.contiguous(), targets.contiguous()


_FREE = {"reassoc", "contract"}
"""LLVM fast-math flags: sums may be reordered; infinities and NaN keep their meaning."""


@compiled(
    "float32(float32[::1], int64, float32[:, ::1], float32[::1], float32[::1], float32)",
    fastmath=_FREE,
)
def _forward(
    x: NDArray[np.float32],
    target: int,
    weight: NDArray[np.float32],
    bias: NDArray[np.float32],
    grads: NDArray[np.float32],
    step: np.float32,
) -> np.float32:
    """Returns one example's loss; fills ``slopes`` with ``step`` times its output gradient."""
    outputs, width = weight.shape
    four = outputs - outputs % 4
    for o in range(0, four, 4):  # reads each input once for four outputs
        a, b, c, d = weight[o], weight[o + 1], weight[o + 2], weight[o + 3]
        sum_a, sum_b, sum_c, sum_d = bias[o], bias[o + 1], bias[o + 2], bias[o + 3]
        for i in range(width):
            sum_a += x[i] * a[i]
            sum_b += x[i] * b[i]
            sum_c += x[i] * c[i]
            sum_d += x[i] * d[i]
        grads[o], grads[o + 1], grads[o + 2], grads[o + 3] = sum_a, sum_b, sum_c, sum_d
    for o in range(four, outputs):
        whole = bias[o]
        for i in range(width):
            whole += x[i] * weight[o, i]
        grads[o] = whole
    largest = grads[0]
    for o in range(1, outputs):
        largest = max(largest, grads[o])
    found, total = grads[target], np.float32(0)
    for o in range(outputs):
        grads[o] = np.exp(grads[o] - largest)
        total += grads[o]
    for o in range(outputs):
        grads[o] *= step / total
    grads[target] -= step
    return np.float32(np.log(total) + largest - found)


@compiled("void(float32[:, ::1], int64[::1], float32[:], float32[::1])", fastmath=_FREE)
def _update_weights(
    x: NDArray[np.float32],
    rows: NDArray[np.int64],
    grads: NDArray[np.float32],
    weight: NDArray[np.float32],
) -> None:
    """Updates the weights of one output, ``(in,)``, by a batch's gradients.

    Processes four examples at a time.
    """
    four = len(rows) - len(rows) % 4
    for n in range(0, four, 4):
        a, b, c, d = x[rows[n]], x[rows[n + 1]], x[rows[n + 2]], x[rows[n + 3]]
        of_a, of_b, of_c, of_d = grads[n], grads[n + 1], grads[n + 2], grads[n + 3]
        for i in range(len(weight)):
            weight[i] -= (of_a * a[i] + of_b * b[i]) + (of_c * c[i] + of_d * d[i])
    for n in range(four, len(rows)):
        a, of_a = x[rows[n]], grads[n]
        for i in range(len(weight)):
            weight[i] -= of_a * a[i]


@compiled(
    "UniTuple(float64, 2)(float32[:, ::1], int64[::1], int64[::1], int64, float32[:, ::1], "
    "float32[::1], float32[:, ::1], float32[::1], boolean, float32, float32, float32)",
    fastmath=_FREE,
)
def _descend(
    x: NDArray[np.float32],
    y: NDArray[np.int64],
    order: NDArray[np.int64],
    batch_size: int,
    weight: NDArray[np.float32],
    bias: NDArray[np.float32],
    start: NDArray[np.float32],
    start_bias: NDArray[np.float32],
    has_bias: bool,
    rate: np.float32,
    decay: np.float32,
    mu: np.float32,
) -> tuple[float, float]:
    """Runs all steps of one client.

    Args:
        x: Examples, ``(N, in)``.
        y: Their classes.
        order: Rows of the examples in the order of training, epoch after epoch.
        batch_size: Examples per step; an epoch's last step may have fewer.
        weight: ``(out, in)``; changed in place.
        bias: ``(out,)``; changed in place if ``has_bias``.
        start: Global weights, for FedProx's penalty.
        start_bias: Global bias, for FedProx's penalty.
        has_bias: Whether the layer has a bias.
        rate: Learning rate.
        decay: Weight decay.
        mu: Weight of FedProx's penalty.

    Returns:
        The mean loss over the last epoch, NaN where any epoch's was not finite; and the row of an
        example with an invalid target, else -1.
    """
    outputs, width = weight.shape
    grads = np.empty((min(batch_size, len(x)), outputs), np.float32)
    total, finite = 0.0, True
    for epoch in range(0, len(order), len(x)):
        total = 0.0
        for begin in range(epoch, epoch + len(x), batch_size):
            rows = order[begin : min(begin + batch_size, epoch + len(x))]
            step = rate / np.float32(len(rows))
            for number in range(len(rows)):
                row = rows[number]
                if y[row] < 0 or y[row] >= outputs:
                    return 0.0, float(row)
                total += float(_forward(x[row], y[row], weight, bias, grads[number], step))
            if decay != 0 or mu != 0:
                for o in range(outputs):
                    bias[o] -= rate * (mu * (bias[o] - start_bias[o]) + decay * bias[o])
                    for i in range(width):
                        pull = mu * (weight[o, i] - start[o, i]) + decay * weight[o, i]
                        weight[o, i] -= rate * pull
            for o in range(outputs):
                _update_weights(x, rows, grads[:, o], weight[o])
                if has_bias:
                    for number in range(len(rows)):
                        bias[o] -= grads[number, o]
        finite = finite and bool(np.isfinite(total))
    return (total / len(x) if finite else np.nan), -1.0
