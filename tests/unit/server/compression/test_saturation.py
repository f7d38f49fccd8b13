"""What processors without 8-bit dot products make of int8 weights, with and without reduce_range.

Their ``vpmaddubsw`` adds two products of unsigned activations and signed weights in 16 bits, and
saturates. It is emulated here: processors with VNNI do not show it.
"""

from __future__ import annotations

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import nn

from server.compression.export import export_onnx
from server.compression.quantise import calibrate, int8_static

INPUTS = 0.5 + 0.5 * torch.rand(400, 16, generator=torch.Generator().manual_seed(0))
"""Large activations beside large weights of one sign: what saturates most."""


def model() -> nn.Sequential:
    """Decides whether the first eight numbers have a larger sum than the others."""
    made = nn.Sequential(nn.Linear(16, 2), nn.ReLU(), nn.Linear(2, 2))
    with torch.no_grad():
        made[0].weight.copy_(torch.eye(2).repeat_interleave(8, dim=1))
        made[0].bias.zero_()
        made[2].weight.copy_(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]))
        made[2].bias.zero_()
    return made.eval()


def hidden(raw: bytes, *, saturating: bool) -> NDArray[np.float64]:
    """Computes the first layer of a statically quantised file in integers, as a processor does."""
    graph = onnx.load_model_from_string(raw).graph
    constants = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    first = next(node for node in graph.node if node.op_type == "QuantizeLinear")
    scale, zero = (constants[name] for name in first.input[1:])
    codes, of_channel = next(
        (constants[node.input[0]].astype(np.int64), constants[node.input[1]])
        for node in graph.node
        if node.op_type == "DequantizeLinear" and constants.get(node.input[0], scale).ndim == 2
    )
    codes = codes if codes.shape[0] == 2 else codes.T
    inputs = np.clip(np.rint(INPUTS.numpy() / scale) + zero, 0, 255).astype(np.int64)
    pairs = (inputs[:, None, :] * codes).reshape(len(inputs), 2, -1, 2).sum(axis=3)
    if saturating:
        pairs = np.clip(pairs, -(2**15), 2**15 - 1)
    sums = pairs.sum(axis=2) - int(zero) * codes.sum(axis=1)
    return np.asarray(sums * float(scale) * of_channel, np.float64)


def accuracy(values: NDArray[np.float64]) -> float:
    right = (INPUTS[:, :8].sum(1) > INPUTS[:, 8:].sum(1)).numpy()
    return float(((values[:, 0] > values[:, 1]) == right).mean())


def test_weights_of_7_bits_keep_the_accuracy_where_8_bits_saturate() -> None:
    raw = export_onnx(model(), INPUTS[:2], labels=(), kind="classification")
    calibrated = calibrate(raw, INPUTS)
    wide, narrow = (int8_static(calibrated, reduce_range=each) for each in (False, True))
    assert accuracy(hidden(wide, saturating=False)) > 0.95
    assert accuracy(hidden(wide, saturating=True)) < 0.6
    assert accuracy(hidden(narrow, saturating=True)) > 0.95
    exact, found = (hidden(narrow, saturating=each) for each in (False, True))
    np.testing.assert_array_equal(found, exact)
