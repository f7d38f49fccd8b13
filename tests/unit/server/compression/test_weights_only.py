from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor, nn

from edge_client.inference.fixed_work import why_unbounded
from edge_client.inference.row_wise import why_coupled
from fedcore.errors import CompressionError
from fedcore.task.model import FullModel
from server.compression.export import export_onnx, export_with_scopes
from server.compression.runtime import answer, open_session
from server.compression.weights_only import _in_4_bits, int4_weights, int8_weights

WAYS = {"int8": (int8_weights, 0.02, 0.32), "int4": (int4_weights, 0.2, 0.3)}
"""By number of bits: the function, and the most relative error and share of bytes."""


class Sequence(nn.Module):
    """Layers whose weights have their output channels in different places."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(300, 48)
        self.gru = nn.GRU(48, 40, batch_first=True)
        self.attention = nn.TransformerEncoderLayer(40, 2, 64, batch_first=True, dropout=0.0)
        self.head = nn.Linear(40, 300)

    def forward(self, x: Tensor) -> Tensor:
        hidden, _ = self.gru(self.embedding(x))
        return self.head(self.attention(hidden))  # type: ignore[no-any-return]


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 40, 3),
        nn.BatchNorm2d(40),
        nn.ReLU(),
        nn.ConvTranspose2d(40, 33, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(132, 70),
        nn.Linear(70, 20),
    )


MODELS = {
    "sequence": (Sequence, torch.randint(0, 300, (12, 9))),
    "convolutional": (convolutional, torch.rand(12, 3, 8, 8)),
}


@pytest.fixture(scope="module", params=MODELS)
def exported(request: pytest.FixtureRequest) -> tuple[bytes, NDArray[np.generic]]:
    make, inputs = MODELS[request.param]
    torch.manual_seed(0)
    raw = export_onnx(make().eval(), inputs[:2], labels=("a",), kind="classification")
    return raw, inputs.numpy()


@pytest.mark.parametrize("bits", WAYS)
def test_files_shrink_and_answers_stay_close(
    exported: tuple[bytes, NDArray[np.generic]], bits: str
) -> None:
    raw, inputs = exported
    quantise, most, share = WAYS[bits]
    small = quantise(raw)
    expected, found = (answer(open_session(each, threads=1), inputs) for each in (raw, small))
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert 0 < error < most
    assert len(small) < share * len(raw)
    assert small == quantise(raw)
    kept = {each.key for each in onnx.load_model_from_string(small).metadata_props}
    assert kept == {"fedcore.labels", "fedcore.kind"}


@pytest.mark.parametrize("bits", WAYS)
def test_weights_are_decoded_once_and_the_model_runs_in_float32(
    exported: tuple[bytes, NDArray[np.generic]], bits: str, tmp_path: Path
) -> None:
    import onnxruntime

    raw, _ = exported
    small = WAYS[bits][0](raw)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "loaded.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(small, options, providers=["CPUExecutionProvider"])
    loaded = onnx.load(tmp_path / "loaded.onnx")
    assert not {"Cast", "BitShift", "BitwiseAnd"} & {
        node.op_type for node in loaded.graph.node if node.input[0].endswith("codes")
    }
    names = {each.name for each in loaded.graph.initializer}
    assert not any(name.endswith(".codes") for name in names)


@pytest.mark.parametrize("bits", WAYS)
def test_a_device_knows_the_work_of_such_a_file(
    exported: tuple[bytes, NDArray[np.generic]], bits: str
) -> None:
    raw, inputs = exported
    assert why_unbounded(raw) == ""
    small = WAYS[bits][0](raw)
    assert why_unbounded(small) == ""
    assert why_coupled(small, inputs.shape[1:]) == why_coupled(raw, inputs.shape[1:])


def decoded(weight: NDArray[np.float32], axis: int) -> NDArray[np.float32]:
    steps = _in_4_bits("weight", weight, axis)
    graph = onnx.helper.make_graph(
        steps.nodes,
        "decode",
        [],
        [onnx.helper.make_tensor_value_info("weight", onnx.TensorProto.FLOAT, weight.shape)],
        steps.constants,
    )
    opsets = [onnx.helper.make_opsetid("", 20)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    (found,) = open_session(model.SerializeToString(), threads=1).run(None, {})
    return np.asarray(found, np.float32)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("shape", [(3, 33, 7), (1, 64, 32), (5, 1, 1)])
def test_what_four_bits_hold_is_read_back(shape: tuple[int, ...], axis: int) -> None:
    weight = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    found = decoded(weight, axis)
    assert found.shape == shape
    assert np.linalg.norm(found - weight) < 0.1 * np.linalg.norm(weight)


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e30])
def test_weights_of_any_size_are_kept(value: float) -> None:
    weight = np.full((4, 40), value, np.float32)
    weight[1] *= -1
    np.testing.assert_allclose(decoded(weight, 0), weight, rtol=0.01)


@pytest.mark.parametrize("bits", WAYS)
def test_a_model_without_large_weights_has_nothing_to_quantise(bits: str) -> None:
    raw = export_onnx(nn.Linear(8, 3), torch.zeros(2, 8), labels=(), kind="regression")
    with pytest.raises(CompressionError, match=r"^none of its layers has weights that are large"):
        WAYS[bits][0](raw)


class Projects(nn.Module):
    matrix: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("matrix", torch.eye(64) + 0.01)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix


@pytest.mark.parametrize("bits", WAYS)
def test_matrices_of_the_preprocessing_stay_float32(bits: str) -> None:
    torch.manual_seed(0)
    model = FullModel(Projects(), nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2)))
    exported = export_with_scopes(model, torch.rand(2, 64), labels=(), kind="classification")
    small = WAYS[bits][0](exported.onnx, preprocessing=exported.preprocessing)
    tensors = onnx.load_model_from_string(small).graph.initializer
    wide = [
        numpy_helper.to_array(each)
        for each in tensors
        if each.data_type == onnx.TensorProto.FLOAT and list(each.dims) == [64, 64]
    ]
    assert len(wide) == 1
    np.testing.assert_array_equal(wide[0], model.preprocess.matrix.numpy())  # type: ignore[union-attr, operator]
