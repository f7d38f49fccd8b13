"""Adds a decode graph to the file of a next-token model, after comparing it with the model."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnxruntime
from numpy.typing import NDArray
from onnx import helper

from fedcore.artifacts.decode import DECODE_KEY, MAX_CACHE_BYTES, MAX_GRAPH_BYTES
from fedcore.artifacts.parity import FloatArray, max_abs_error
from fedcore.errors import CompressionError
from server.compression.decode.errors import NotDecodable
from server.compression.decode.rewrite import decode_graph
from server.compression.export import finish, properties_of
from server.compression.runtime import open_session

_COMPARED = 4
"""Most golden inputs that are compared."""
_STEPS = 32
"""Most tokens of a comparison that run one by one."""


def with_decode_graph(
    onnx_file: bytes, inputs: NDArray[Any], outputs: FloatArray, *, allowed: float
) -> bytes:
    """Returns a model's file with a decode graph in its metadata; the model itself is unchanged.

    Args:
        onnx_file: A next-token model, exported or quantised.
        inputs: Tokens ``(N, T)`` to compare the graph with the model on.
        outputs: The model's logits for them, ``(N, T, V)``.
        allowed: Largest difference of a logit.

    Raises:
        NotDecodable: the model has no decode graph, or the graph's logits differ from the model's.
    """
    model = onnx.load_model_from_string(onnx_file)
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    graph = _rewritten(model)
    caches = sum(
        int(np.prod([dim.dim_value for dim in each.type.tensor_type.shape.dim]))
        * helper.tensor_dtype_to_np_dtype(each.type.tensor_type.elem_type).itemsize
        for each in graph.input[2:]
    )
    if caches > MAX_CACHE_BYTES:
        raise NotDecodable(f"its caches would take {caches} bytes, more than {MAX_CACHE_BYTES}")
    raw = graph.SerializeToString(deterministic=True)
    if len(raw) > MAX_GRAPH_BYTES:
        raise NotDecodable(f"its graph would take {len(raw)} bytes, more than {MAX_GRAPH_BYTES}")
    try:
        error = _largest_error(_whole(model, graph), inputs[:_COMPARED], outputs[:_COMPARED])
    except Exception as error_:  # onnxruntime's errors have no common base class
        raise NotDecodable(f"onnxruntime cannot run it token by token: {error_}") from error_
    if not error <= allowed:  # also true for NaN
        raise NotDecodable(
            f"its logits would differ by {error:.3g} when it runs token by token, and at most "
            f"{allowed:.3g} is allowed: is each position blind to those after it?"
        )
    told = {**properties_of(model), DECODE_KEY: base64.b64encode(raw).decode()}
    try:
        return finish(onnx.load_model_from_string(onnx_file), told)
    except CompressionError as error_:
        raise NotDecodable(str(error_)) from error_


def _rewritten(model: onnx.ModelProto) -> onnx.GraphProto:
    try:
        return decode_graph(model)
    except NotDecodable:
        raise
    except Exception as error:  # a graph that no rule foresaw must not keep a release back
        raise NotDecodable(
            f"its graph is not understood ({type(error).__name__}: {error})"
        ) from error


def _whole(model: onnx.ModelProto, graph: onnx.GraphProto) -> bytes:
    """Returns the decode graph as a file of its own, with the weights."""
    alone = onnx.ModelProto()
    alone.ir_version = model.ir_version
    alone.opset_import.extend(model.opset_import)
    alone.graph.CopyFrom(graph)
    used = {name for node in graph.node for name in node.input}
    alone.graph.initializer.extend(each for each in model.graph.initializer if each.name in used)
    serialised: bytes = alone.SerializeToString()
    return serialised


def _largest_error(decode: bytes, inputs: NDArray[Any], outputs: FloatArray) -> float:
    """Runs part of each sequence at once, and the rest token by token."""
    session = open_session(decode, threads=1)
    window = inputs.shape[1]
    errors = []
    for row, (tokens, expected) in enumerate(zip(inputs, outputs, strict=True)):
        steps = min(_STEPS, window - 1) if row == 0 else window // 2
        sizes = [window - steps, *([1] * steps if row == 0 else [steps])]
        errors.append(max_abs_error(expected, _logits(session, tokens, sizes)))
    return max(errors)


def _logits(
    session: onnxruntime.InferenceSession, tokens: NDArray[Any], sizes: list[int]
) -> FloatArray:
    names = [each.name for each in session.get_inputs()]
    caches = [np.zeros(each.shape, _NUMPY[each.type]) for each in session.get_inputs()[2:]]
    found, start = [], 0
    for size in sizes:
        places = np.arange(start, start + size)
        given = [tokens[None, start : start + size], places, *caches]
        logits, *caches = session.run(None, dict(zip(names, given, strict=True)))
        found.append(logits[0])
        start += size
    joined: FloatArray = np.concatenate(found)
    return joined


_NUMPY = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(bool)": np.bool_,
    "tensor(int64)": np.int64,
}
