"""Quantisation of weights alone: stored in 8 or 4 bits, and decoded when a model is loaded.

The file holds codes and scales, and operators that compute the weights from them. These depend on
constants alone, so onnxruntime computes them once, when it loads the file, and then runs the model
of float32 weights, in its time and memory, on any processor or accelerator.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from fedcore.errors import CompressionError
from server.compression.quantise import before_layers, quantised

_FEWEST = 1024
"""Smaller weights stay as they are: what decodes them would take as many bytes."""
_BLOCK = 32  # weights that share a scale in 4 bits
_HALF = _BLOCK // 2
_SHRINKS = np.linspace(0.7, 1.0, 13, dtype=np.float32)
"""Scales that are tried for a block, relative to the one that clips nothing."""
_LEAST_SCALE, _LARGEST_SCALE = 2.0**-14, 6e4  # normal numbers of float16

Floats = NDArray[np.float32]


def int8_weights(model: bytes, *, preprocessing: Collection[str] = ()) -> bytes:
    """Stores the weights of all layers in 8 bits, with one scale per output channel.

    Args:
        model: An ONNX file of `server.compression.export`.
        preprocessing: Names of nodes whose weights stay float32.

    Raises:
        CompressionError: the model has no weights that are large enough.
    """
    return quantised(model, _rewriter(_in_8_bits, preprocessing))


def int4_weights(model: bytes, *, preprocessing: Collection[str] = ()) -> bytes:
    """Stores the weights of all layers in 4 bits, with one scale per 32 weights of a channel.

    The scale of a block is the one of 13 with the least squared error; large weights are clipped
    where that leaves the others more precise.

    Args:
        model: An ONNX file of `server.compression.export`.
        preprocessing: Names of nodes whose weights stay float32.

    Raises:
        CompressionError: the model has no weights that are large enough.
    """
    return quantised(model, _rewriter(_in_4_bits, preprocessing))


@dataclass(frozen=True)
class _Decoder:
    """Constants that encode a weight, and the nodes that compute it from them."""

    constants: list[onnx.TensorProto]
    nodes: list[onnx.NodeProto]


_Encode = Callable[[str, Floats, int], _Decoder]
"""Encodes a weight of a name, with scales by the axis of its output channels."""


def _rewriter(encode: _Encode, preprocessing: Collection[str]) -> Callable[[Path, Path], None]:
    def rewrite(source: Path, target: Path) -> None:
        model = onnx.load(source)
        graph = model.graph
        channels = _channels(graph, before_layers(model, preprocessing))
        decoders, kept = [], []
        for each in graph.initializer:
            wide = each.data_type == onnx.TensorProto.FLOAT and len(each.dims) > 1
            if wide and each.name in channels and np.prod(each.dims) >= _FEWEST:
                weight = numpy_helper.to_array(each)
                decoders.append(encode(each.name, weight, channels[each.name] % weight.ndim))
            else:
                kept.append(each)
        if not decoders:
            raise CompressionError("none of its layers has weights that are large enough")
        nodes = [*(node for one in decoders for node in one.nodes), *graph.node]
        constants = [*kept, *(tensor for one in decoders for tensor in one.constants)]
        del graph.node[:], graph.initializer[:]
        graph.node.extend(nodes)
        graph.initializer.extend(constants)
        onnx.save(model, target)

    return rewrite


def _channels(graph: onnx.GraphProto, excluded: Collection[str]) -> dict[str, int]:
    """Returns the axis of output channels of each weight, by the weight's name.

    Weights of excluded nodes are left out, even where others share them.
    """
    found: dict[str, int] = {}
    left_out: set[str] = set()
    for node in graph.node:
        if node.name and node.name in excluded:
            left_out.update(node.input)
            continue
        for place, axis in _channel_axes(node).items():
            if place < len(node.input):
                found.setdefault(node.input[place], axis)
    return {name: axis for name, axis in found.items() if name not in left_out}


def _channel_axes(node: onnx.NodeProto) -> dict[int, int]:
    """Returns the axis of output channels of a node's weights, by the place of its input."""
    set_to = {each.name: each.i for each in node.attribute}
    if node.op_type == "Gemm":
        return {1: 0 if set_to.get("transB") else 1}
    if node.op_type == "Gather":
        return {0: 0} if not set_to.get("axis") else {}
    return {
        "MatMul": {0: -2, 1: -1},
        "Conv": {1: 0},
        "ConvTranspose": {1: 1},
        "GRU": {1: 1, 2: 1},
        "LSTM": {1: 1, 2: 1},
        "RNN": {1: 1, 2: 1},
    }.get(node.op_type, {})


def _in_8_bits(name: str, weight: Floats, axis: int) -> _Decoder:
    others = tuple(each for each in range(weight.ndim) if each != axis)
    scale = np.abs(weight).max(axis=others, keepdims=True) / np.float32(127)
    scale = np.where(scale > 0, scale, np.float32(1))
    codes = np.rint(weight / scale).astype(np.int8)
    steps = _Steps(name)
    wide = steps.add("Cast", [steps.constant("codes", codes)], to=onnx.TensorProto.FLOAT)
    steps.add("Mul", [wide, steps.constant("scale", scale)])
    return steps.decoder()


def _in_4_bits(name: str, weight: Floats, axis: int) -> _Decoder:
    turned = np.moveaxis(weight, axis, 0)
    rows = turned.reshape(len(turned), -1)
    width = rows.shape[1]
    padded = np.pad(rows, ((0, 0), (0, -width % _BLOCK)))
    blocks = padded.reshape(len(rows), -1, _BLOCK)
    scale = _best_scale(blocks)
    codes = _codes(blocks, scale).astype(np.uint8)
    packed = codes[..., :_HALF] | codes[..., _HALF:] << 4

    steps = _Steps(name)
    stored = steps.constant("codes", packed)
    low = steps.add("BitwiseAnd", [stored, steps.constant("mask", np.array(15, np.uint8))])
    high = steps.add(
        "BitShift", [stored, steps.constant("shift", np.array(4, np.uint8))], direction="RIGHT"
    )
    both = steps.add("Concat", [low, high], axis=2)
    wide = steps.add("Cast", [both], to=onnx.TensorProto.FLOAT)
    signed = steps.add("Sub", [wide, steps.constant("zero", np.array(8, np.float32))])
    of_block = steps.constant("scale", scale)
    if scale.dtype == np.float16:
        of_block = steps.add("Cast", [of_block], to=onnx.TensorProto.FLOAT)
    scaled = steps.add("Mul", [signed, of_block])
    flat = steps.add("Reshape", [scaled, steps.integers("rows", [len(rows), -1])])
    if padded.shape[1] > width:
        ends = [steps.integers(part, [at]) for part, at in (("start", 0), ("end", width))]
        flat = steps.add("Slice", [flat, *ends, steps.integers("axis", [1])])
    shaped = steps.add("Reshape", [flat, steps.integers("shape", list(turned.shape))])
    steps.add("Transpose", [shaped], perm=_inverse_of_moving(axis, weight.ndim))
    return steps.decoder()


def _best_scale(blocks: Floats) -> NDArray[np.floating]:
    """Returns the scale ``(R, B, 1)`` of each block of ``(R, B, 32)`` with the least error.

    Codes reach from -8 to 7, so scales are signed: -8 stands for the largest weight.
    """
    place = np.abs(blocks).argmax(axis=2, keepdims=True)
    largest = np.take_along_axis(blocks, place, axis=2) / np.float32(-8)
    whole = np.where(largest != 0, largest, np.float32(1))
    sizes = np.abs(whole)
    fits = sizes.min() * _SHRINKS[0] >= _LEAST_SCALE and sizes.max() <= _LARGEST_SCALE
    best, least = whole, np.full_like(whole, np.inf)
    for shrink in _SHRINKS:
        scale = whole * shrink
        if fits:
            scale = scale.astype(np.float16).astype(np.float32)
        # Relative to the block, so that squares neither overflow nor vanish.
        apart = (_codes(blocks, scale) - 8) * (scale / whole) - blocks / whole
        error = np.square(apart).sum(axis=2, keepdims=True)
        best = np.where(error < least, scale, best)
        least = np.minimum(least, error)
    return best.astype(np.float16) if fits else best


def _codes(blocks: Floats, scale: NDArray[np.floating]) -> Floats:
    """Returns codes from 0 to 15, of which 8 stands for zero."""
    rounded = np.rint(blocks / scale.astype(np.float32))
    return np.asarray(np.clip(rounded, -8, 7) + 8, np.float32)


def _inverse_of_moving(axis: int, dims: int) -> list[int]:
    """Returns the permutation that moves the first axis back to place ``axis``."""
    moved = [axis, *(each for each in range(dims) if each != axis)]
    return [moved.index(each) for each in range(dims)]


class _Steps:
    """Nodes and constants that compute one weight; the last node's output has the weight's name."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._constants: list[onnx.TensorProto] = []
        self._nodes: list[onnx.NodeProto] = []

    def constant(self, part: str, values: NDArray[np.generic]) -> str:
        name = f"{self._name}.{part}"
        self._constants.append(numpy_helper.from_array(values, name))
        return name

    def integers(self, part: str, values: list[int]) -> str:
        return self.constant(part, np.array(values, np.int64))

    def add(self, operator: str, inputs: list[str], **attributes: Any) -> str:
        output = f"{self._name}.{len(self._nodes)}"
        self._nodes.append(helper.make_node(operator, inputs, [output], **attributes))
        return output

    def decoder(self) -> _Decoder:
        self._nodes[-1].output[0] = self._name
        return _Decoder(self._constants, self._nodes)
