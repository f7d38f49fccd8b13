"""Export of a model to ONNX, as bytes that depend only on its weights and architecture.

In: a torch model with its preprocessing. Out: one self-contained ONNX file. Start with
`export_onnx`; `export_with_scopes` also says which nodes are the preprocessing.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import io
import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from fedcore.artifacts.manifest import MAX_MODEL_BYTES
from fedcore.errors import CompressionError, TaskError
from fedcore.observability.words import counted

INPUT, OUTPUT = "input", "output"
LABELS_KEY, KIND_KEY = "fedcore.labels", "fedcore.kind"
OPSET = 20  # fixed: torch's default may change the bytes
_SCOPES_KEY = "pkg.torch.onnx.name_scopes"  # the modules that a node comes from, outermost first
_PREPROCESS = "preprocess"  # the submodule of `fedcore.task.model.FullModel`


@dataclass(frozen=True)
class OnnxExport:
    """An ONNX file, and which of its nodes are preprocessing."""

    onnx: bytes = field(repr=False)
    preprocessing: frozenset[str]
    """Names of the nodes that come from the model's ``preprocess``."""


def export_onnx(
    module: nn.Module, example_batch: Tensor, *, labels: tuple[str, ...], kind: str
) -> bytes:
    """Exports a model as `export_with_scopes` does, and returns the ONNX file alone."""
    return export_with_scopes(module, example_batch, labels=labels, kind=kind).onnx


def export_with_scopes(
    module: nn.Module, example_batch: Tensor, *, labels: tuple[str, ...], kind: str
) -> OnnxExport:
    """Exports a model for serving, with its preprocessing, label names and kind.

    Args:
        module: The model with its preprocessing, a `fedcore.task.model.FullModel`. Not changed.
        example_batch: Two inputs ``(2, ...)`` of the dtype that devices use; from a single input
            the exporter would infer a constant batch dimension.
        labels: Names of the classes, in order; may be empty.
        kind: Name of the kind of problem.

    Returns:
        One ONNX file: input ``input`` and output ``output`` with a dynamic batch dimension, weights
        inline; and the names of its preprocessing's nodes.

    Guarantee:
        Equal weights and architecture give equal bytes, in any process and folder: source lines,
        paths and producer versions are removed.

    Raises:
        TaskError: the model fails on ``example_batch``, or contains something that ONNX can't
            express; the message names the submodule if it is known.
    """
    module = copy.deepcopy(module).cpu().eval()
    try:
        with torch.no_grad():
            answer = module(example_batch)
    except Exception as error:  # user code: may raise anything
        raise TaskError(
            f"model: it fails on a batch of inputs of shape {tuple(example_batch.shape)}: "
            f"{_first_line(error)}. Nothing was exported; make `example_input` one input of the "
            "model without the batch dimension."
        ) from error
    if not isinstance(answer, Tensor) or answer.shape[:1] != example_batch.shape[:1]:
        got = tuple(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
        raise TaskError(
            f"model: for {counted(len(example_batch), 'input')} it returns {got}, expected one "
            "tensor with as many rows. Nothing was exported; return only the outputs, one row "
            "per input."
        )
    try:
        model = _to_proto(module, (example_batch,))
    except Exception as error:  # may raise anything its passes or the model raise
        culprit = _culprit(module, example_batch)
        raise TaskError(
            f"model: {culprit or type(module).__name__} cannot be exported to ONNX: "
            f"{_first_line(_root(error))}. Nothing was exported; replace it with operations that "
            "ONNX supports, without control flow that depends on values."
        ) from error
    rows = model.graph.output[0].type.tensor_type.shape.dim[0]
    if rows.HasField("dim_value"):
        raise TaskError(
            f"model: it always returns {rows.dim_value} rows, but devices send batches of 1. "
            "Nothing was exported; look for an expand, view or reshape with a fixed batch size."
        )
    preprocessing = frozenset(node.name for node in model.graph.node if _is_preprocessing(node))
    properties = {LABELS_KEY: json.dumps(list(labels)), KIND_KEY: kind}
    return OnnxExport(finish(model, properties), preprocessing)


def finish(model: onnx.ModelProto, properties: Mapping[str, str]) -> bytes:
    """Serialises a model with ``properties`` as its only metadata.

    Removes every trace of where, when and how the model was made: metadata and documentation of the
    model, its graphs, nodes, values, weights and functions, and the producer's version.

    Raises:
        CompressionError: the model exceeds the size limit of one file.
    """
    model.producer_name, model.producer_version = "fedcore", ""
    model.domain, model.model_version = "", 0
    _clear(model, *model.functions)
    for function in model.functions:
        _strip_nodes(function.node)
        _clear(*function.value_info)
    _strip_graph(model.graph)
    _drop_unused_domains(model)
    for key, value in sorted(properties.items()):
        model.metadata_props.add(key=key, value=value)
    size = model.ByteSize()
    if size > MAX_MODEL_BYTES:
        raise CompressionError(
            f"export: the model takes {size} bytes, but an ONNX file can have at most "
            f"{MAX_MODEL_BYTES}. Nothing was exported; use a smaller model."
        )
    serialised: bytes = model.SerializeToString(deterministic=True)
    return serialised


def properties_of(model: onnx.ModelProto) -> dict[str, str]:
    """Returns the label names and kind that `export_onnx` wrote, for use with `finish`."""
    keys = (LABELS_KEY, KIND_KEY)
    return {item.key: item.value for item in model.metadata_props if item.key in keys}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppresses output, logs and warnings of exporters and quantisers.

    Exceptions pass through. Logging and standard streams are process-wide, so other threads are
    silenced, too.
    """
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    sink = io.StringIO()
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(sink),
            contextlib.redirect_stderr(sink),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


@contextlib.contextmanager
def _plain_attention() -> Iterator[None]:
    """Has transformer layers of torch's compute attention from operations that ONNX has.

    In evaluation mode without gradients they otherwise call one fused operation. The switch is
    process-wide, and affects the speed of other threads alone.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def _to_proto(module: nn.Module, inputs: tuple[Any, ...]) -> onnx.ModelProto:
    with quiet(), torch.no_grad(), _plain_attention():
        program = torch.onnx.export(
            module,
            inputs,
            input_names=[INPUT],
            output_names=[OUTPUT],
            opset_version=OPSET,
            dynamo=True,
            dynamic_shapes=tuple({0: "batch"} for _ in inputs),
            external_data=False,
            verbose=False,
        )
    assert program is not None  # dynamo=True always returns one
    return program.model_proto


def _is_preprocessing(node: onnx.NodeProto) -> bool:
    """Returns whether the exporter's record of modules places a node in ``preprocess``."""
    scopes = next((item.value for item in node.metadata_props if item.key == _SCOPES_KEY), "[]")
    modules = ast.literal_eval(scopes)
    return (
        bool(node.name) and _PREPROCESS in modules[:2]
    )  # the full model's own name, which is empty, comes first


def _culprit(module: nn.Module, example_batch: Tensor) -> str | None:
    """Describes the innermost submodule that fails to export by itself; None if there is none."""
    seen: list[tuple[str, nn.Module, tuple[Any, ...]]] = []
    hooks = [
        inner.register_forward_hook(
            lambda inner, inputs, _, name=name: seen.append((name, inner, inputs))
        )
        for name, inner in module.named_modules()
        if name
    ]
    with torch.no_grad():
        module(example_batch)
    for hook in hooks:
        hook.remove()
    # Forward hooks fire when a module returns, so inner modules precede the ones that contain them.
    for name, inner, inputs in seen:
        if not all(isinstance(value, Tensor) for value in inputs):
            continue
        try:
            _to_proto(inner, inputs)
        except Exception:  # the failure is the answer; the caller reports the cause
            return f"layer {name!r} ({type(inner).__name__})"
    return None


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _first_line(error: BaseException) -> str:
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()]
    said = 2 if lines and lines[0].endswith(":") else 1  # a heading alone is uninformative
    return f"{type(error).__name__}: {' '.join(lines[:said])}".rstrip(".")


def _strip_graph(graph: onnx.GraphProto) -> None:
    _clear(graph, *graph.input, *graph.output, *graph.value_info, *graph.initializer)
    # Tools can infer intermediate shapes; kept, they would contain the exporter's symbols.
    del graph.value_info[:]
    _strip_nodes(graph.node)


def _strip_nodes(nodes: Sequence[onnx.NodeProto]) -> None:
    for node in nodes:
        _clear(node)
        for attribute in node.attribute:
            attribute.ClearField("doc_string")
            if attribute.HasField("t"):
                _clear(attribute.t)
            for graph in _subgraphs(attribute):
                _strip_graph(graph)


def _drop_unused_domains(model: onnx.ModelProto) -> None:
    """Removes unused operator sets; quantisers declare all that their onnxruntime supports."""
    used = {""}
    graphs: list[Any] = [model.graph, *model.functions]
    while graphs:
        for node in graphs.pop().node:
            used.add(node.domain)
            graphs += [graph for attribute in node.attribute for graph in _subgraphs(attribute)]
    kept = [opset for opset in model.opset_import if opset.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(kept)


def _subgraphs(attribute: onnx.AttributeProto) -> list[onnx.GraphProto]:
    return [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]


def _clear(*parts: Any) -> None:
    for part in parts:
        del part.metadata_props[:]
        part.ClearField("doc_string")
