"""Quantisation to 8 bits with onnxruntime's static and dynamic quantisers."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
import torch
from numpy.typing import NDArray
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantType,
    quantize_dynamic,
)
from onnxruntime.quantization.calibrate import TensorsData, create_calibrator
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
from onnxruntime.quantization.quant_utils import load_model_with_shape_infer
from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor

from fedcore.errors import CompressionError
from server.compression.export import INPUT, finish, properties_of, quiet

_CALIBRATION_BATCH = 32
_DOT_PRODUCT = {"avx512_vnni", "avx_vnni", "amx_int8"}
_WEIGHTED = {"Gemm", "MatMul", "Conv"}
_LEARNT = {*_WEIGHTED, "ConvTranspose", "Einsum", "Gather", "GRU", "LSTM", "RNN"}
"""Operators of layers with weights; what stands before the first of them only prepares inputs."""
_QUANTISABLE = sorted({*QLinearOpsRegistry, *QDQRegistry})


def saturates(cpuinfo: str) -> bool:
    """Returns whether an x86 processor's 8-bit products can overflow 16 bits and change outputs.

    Processors with VNNI or AMX accumulate in 32 bits. So do Arm processors, whose ``/proc/cpuinfo``
    has no ``flags``.

    Args:
        cpuinfo: The text of ``/proc/cpuinfo``; empty if it doesn't exist.
    """
    lines = [line for line in cpuinfo.splitlines() if line.startswith("flags")]
    return bool(lines) and not _DOT_PRODUCT & set(lines[0].split())


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """A model that is prepared for static quantisation, with the ranges of its activations."""

    prepared: bytes = field(repr=False)
    ranges: TensorsData = field(repr=False)
    kept: tuple[str, ...]
    """Names of the nodes that stay float32 in any case."""
    layers: tuple[str, ...]
    """Names of the nodes with weights that can be quantised, in order."""
    properties: Mapping[str, str]


def calibrate(
    model: bytes, calibration: Tensor, *, preprocessing: Collection[str] = ()
) -> Calibrated:
    """Prepares a model for `int8_static`, and records the ranges of its activations.

    The last layer is among those that stay float32: it separates close outputs, and its rounding
    dominated the worst error while saving little size. So is all that comes before the first layer
    with weights: one scale for raw features of different ranges rounds the small ones to zero.

    Args:
        model: An ONNX file of `server.compression.export`.
        calibration: Inputs ``(N, ...)`` from the cloud's training data.
        preprocessing: Names of nodes that stay float32, too, whatever they are.

    Raises:
        CompressionError: the model cannot be prepared, or fails on an input.
    """
    properties = properties_of(onnx.load_model_from_string(model))
    with _workplace() as folder:
        source, prepared = folder / "model.onnx", folder / "prepared.onnx"
        source.write_bytes(model)
        _prepare(source, prepared)
        graph = onnx.load(prepared)
        calibrator = create_calibrator(
            prepared,
            _QUANTISABLE,
            augmented_model_path=str(folder / "augmented.onnx"),
            calibrate_method=CalibrationMethod.MinMax,
        )
        calibrator.collect_data(_Calibration(calibration))
        ranges = calibrator.compute_data()
        raw = prepared.read_bytes()
    kept = [*before_layers(graph, preprocessing), *_last_layers(graph)]
    layers = [
        node.name
        for node in graph.graph.node
        if node.op_type in _WEIGHTED and node.name and node.name not in kept
    ]
    return Calibrated(
        prepared=raw, ranges=ranges, kept=tuple(kept), layers=tuple(layers), properties=properties
    )


def int8_static(
    calibrated: Calibrated, *, reduce_range: bool, layers: Sequence[str] | None = None
) -> bytes:
    """Quantises weights and activations; weights have one scale per output channel.

    Args:
        calibrated: The model with its ranges.
        reduce_range: Limit weights to 7 bits, for processors for which `saturates` is true. It
            changes the file, so the caller decides on it and reports it.
        layers: Names of the layers to quantise; all other operators then stay float32. None for all
            operators that can be quantised.

    Raises:
        CompressionError: nothing in the model can be quantised, or the quantiser fails.
    """
    with _workplace() as folder:
        prepared, target = folder / "prepared.onnx", folder / "quantised.onnx"
        prepared.write_bytes(calibrated.prepared)
        quantiser = QDQQuantizer(
            load_model_with_shape_infer(prepared),
            True,  # a scale per channel
            reduce_range,
            QuantType.QInt8,  # weights
            QuantType.QUInt8,  # activations
            calibrated.ranges,
            list(layers or []),
            list(calibrated.kept),
            _QUANTISABLE,
            {},
        )
        quantiser.quantize_model()
        quantiser.model.save_model_to_file(str(target))
        result = onnx.load(target)
    return _finished(result, calibrated.properties)


def int8_dynamic(model: bytes, *, reduce_range: bool, preprocessing: Collection[str] = ()) -> bytes:
    """Quantises the weights of matrix products; activation ranges are computed at run time.

    Convolutions stay float32: onnxruntime has no convolution kernel for signed 8-bit weights. A
    range is that of all inputs that run together: an input's outputs depend on the others of its
    batch, so devices run the inputs of any model one at a time.

    Args:
        model: An ONNX file of `server.compression.export`.
        reduce_range: Limit weights to 7 bits, for processors for which `saturates` is true.
        preprocessing: Names of nodes that stay float32.

    Raises:
        CompressionError: nothing in the model can be quantised, or the quantiser fails.
    """

    def quantise(source: Path, target: Path) -> None:
        quantize_dynamic(
            source,
            target,
            op_types_to_quantize=["MatMul", "Gemm", "LSTM", "Gather"],
            per_channel=True,
            reduce_range=reduce_range,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=before_layers(onnx.load(source), preprocessing),
        )

    return quantised(model, quantise)


class _Calibration(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
    """Reader from which onnxruntime pulls calibration batches."""

    def __init__(self, inputs: Tensor) -> None:
        batches = torch.split(inputs, _CALIBRATION_BATCH)
        self._batches: Iterator[NDArray[Any]] = iter([batch.numpy() for batch in batches])

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        batch = next(self._batches, None)
        return None if batch is None else {INPUT: batch}


def quantised(model: bytes, quantise: Callable[[Path, Path], None]) -> bytes:
    """Prepares a model, and rewrites it by a function from file to file.

    Raises:
        CompressionError: the function fails, or leaves no weights of 8 bits.
    """
    properties = properties_of(onnx.load_model_from_string(model))
    with _workplace() as folder:
        source, prepared, target = (
            folder / name for name in ("model.onnx", "prepared.onnx", "quantised.onnx")
        )
        source.write_bytes(model)
        _prepare(source, prepared)
        quantise(prepared, target)
        result = onnx.load(target)
    return _finished(result, properties)


@contextmanager
def _workplace() -> Iterator[Path]:
    """Gives onnxruntime's tools a folder, silences them, and turns their errors into reasons."""
    with tempfile.TemporaryDirectory(prefix="fedcore-quantise-") as folder:
        try:
            with quiet():
                yield Path(folder)
        except CompressionError:
            raise
        except Exception as error:  # onnxruntime raises plain Exceptions, too
            reason = str(error).strip().partition("\n")[0][:200]
            raise CompressionError(
                f"it cannot be quantised: {type(error).__name__}: {reason}"
            ) from error


def _finished(result: onnx.ModelProto, properties: Mapping[str, str]) -> bytes:
    narrow = (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
    if not any(t.data_type in narrow and len(t.dims) > 1 for t in result.graph.initializer):
        raise CompressionError("none of its layers can be quantised")
    return finish(result, properties)


def _prepare(source: Path, prepared: Path) -> None:
    """Infers shapes and folds constants, as the quantisers need."""
    try:
        quant_pre_process(source, prepared)
    except Exception:  # symbolic inference knows fewer operators (no STFT) than ONNX's own
        quant_pre_process(source, prepared, skip_symbolic_shape=True)


def before_layers(model: onnx.ModelProto, preprocessing: Collection[str]) -> list[str]:
    """Returns the names of the nodes that prepare inputs for the first layer with weights.

    These are the nodes of the model's preprocessing, with those that a fusion named after them, and
    all nodes that depend on the inputs but on no layer.
    """
    found, prepared = [], {each.name for each in model.graph.input}
    constants = {"", *(each.name for each in model.graph.initializer)}
    for node in model.graph.node:  # in topological order, as ONNX demands
        named = node.name in preprocessing or node.name.split("/")[0] in preprocessing
        fed = set(node.input) - constants
        if named or (node.op_type not in _LEARNT and fed and fed <= prepared):
            found += [node.name] if node.name else []  # an empty name would exclude every one
            prepared.update(node.output)
        elif not fed:
            constants.update(node.output)
    return found


def _last_layers(model: onnx.ModelProto) -> list[str]:
    """Returns the names of the layers after which no other one follows.

    Where there are several, as in a model with several outputs, the nodes after them belong to
    these: one scale for outputs of different ranges rounds the small ones to zero.
    """
    before: dict[str, set[str]] = {}  # by value: the layers that reach it through no other one
    passed: set[str] = set()  # layers that another one follows
    for node in model.graph.node:
        reached: set[str] = set().union(*(before.get(name, set()) for name in node.input))
        if node.op_type in _WEIGHTED:
            passed |= reached
            reached = {node.name}
        before.update(dict.fromkeys(node.output, reached))
    last = set().union(*(before.get(each.name, set()) for each in model.graph.output)) - passed
    if len(last) < 2:
        names = [node.name for node in model.graph.node if node.op_type in _WEIGHTED]
        return names[-1:]
    return [
        node.name
        for node in model.graph.node
        if node.name in last
        or (node.name and node.output and (found := before[node.output[0]]) and found <= last)
    ]
