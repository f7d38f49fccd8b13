from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from fedcore.errors import CompressionError
from fedcore.task.model import FullModel, Standardise
from server.compression.compressed import Compressed
from server.compression.export import export_onnx, export_with_scopes
from server.compression.quantise import calibrate, int8_dynamic, int8_static, saturates
from server.compression.runtime import answer, open_session


def weights(raw: bytes) -> dict[str, onnx.TensorProto]:
    graph = onnx.load_model_from_string(raw).graph
    return {each.name: each for each in graph.initializer if len(each.dims) > 1}


def test_static_answers_close_to_fp32(compressed: Compressed, calibration: Tensor) -> None:
    fp32 = compressed.files["fp32"]
    raw = int8_static(calibrate(fp32, calibration), reduce_range=False)
    expected, found = (
        answer(open_session(each, threads=1), calibration.numpy()) for each in (fp32, raw)
    )
    assert 0 < np.abs(expected - found).max() < 0.05 * np.abs(expected).max()
    assert (expected.argmax(1) == found.argmax(1)).mean() > 0.98


def test_static_keeps_the_last_layer_in_float(compressed: Compressed, calibration: Tensor) -> None:
    found = weights(
        int8_static(calibrate(compressed.files["fp32"], calibration), reduce_range=False)
    )
    types = {tuple(each.dims): each.data_type for each in found.values()}
    assert types[10, 128] == onnx.TensorProto.FLOAT
    assert types[256, 64] == types[128, 256] == onnx.TensorProto.INT8


def test_static_has_one_scale_for_each_channel(compressed: Compressed, calibration: Tensor) -> None:
    raw = int8_static(calibrate(compressed.files["fp32"], calibration), reduce_range=False)
    graph = onnx.load_model_from_string(raw).graph
    scales = {each.dims[0] for each in graph.initializer if each.name.endswith("weight_scale")}
    assert scales == {256, 128}


@pytest.mark.parametrize("reduce_range", [True, False])
def test_reduce_range_keeps_weights_to_7_bits(
    compressed: Compressed, calibration: Tensor, reduce_range: bool
) -> None:
    fp32 = compressed.files["fp32"]
    for raw in (
        int8_static(calibrate(fp32, calibration), reduce_range=reduce_range),
        int8_dynamic(fp32, reduce_range=reduce_range),
    ):
        largest = max(
            int(np.abs(onnx.numpy_helper.to_array(each).astype(int)).max())
            for each in weights(raw).values()
            if each.data_type == onnx.TensorProto.INT8
        )
        assert largest <= 64 if reduce_range else largest > 100


def test_labels_travel_and_nothing_else(compressed: Compressed, calibration: Tensor) -> None:
    fp32 = compressed.files["fp32"]
    for raw in (
        int8_static(calibrate(fp32, calibration), reduce_range=True),
        int8_dynamic(fp32, reduce_range=True),
    ):
        model = onnx.load_model_from_string(raw)
        kept = {each.key for each in model.metadata_props}
        assert kept == {"fedcore.labels", "fedcore.kind"}
        assert model.producer_name == "fedcore"
        assert not any(each.metadata_props or each.doc_string for each in model.graph.node)
        for folder in (Path.cwd(), tempfile.gettempdir()):
            assert f"{folder}/".encode() not in raw


def test_calibration_decides_the_bytes(compressed: Compressed, calibration: Tensor) -> None:
    fp32 = compressed.files["fp32"]
    one = int8_static(calibrate(fp32, calibration), reduce_range=False)
    assert one == int8_static(calibrate(fp32, calibration), reduce_range=False)
    assert one != int8_static(calibrate(fp32, calibration * 2), reduce_range=False)


def test_no_file_is_left_behind(
    compressed: Compressed, calibration: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    int8_static(calibrate(compressed.files["fp32"], calibration), reduce_range=False)
    assert list(tmp_path.iterdir()) == []


def test_one_layer_is_left_alone_by_static_quantisation() -> None:
    raw = export_onnx(
        nn.Sequential(nn.Linear(4, 3)), torch.zeros(2, 4), labels=(), kind="regression"
    )
    with pytest.raises(CompressionError, match="none of its layers can be quantised"):
        int8_static(calibrate(raw, torch.randn(8, 4)), reduce_range=False)


def test_a_failing_quantiser_is_a_reason_not_a_crash() -> None:
    raw = export_onnx(
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)),
        torch.zeros(2, 4),
        labels=(),
        kind="regression",
    )
    with pytest.raises(CompressionError, match="it cannot be quantised") as caught:
        int8_static(calibrate(raw, torch.randn(8, 5)), reduce_range=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx2 avx512f avx512_vnni\n", False),
        ("flags\t\t: fpu avx2 avx_vnni\n", False),
        ("flags\t\t: fpu avx2 amx_int8\n", False),
        ("flags\t\t: fpu avx2 avx512f\n", True),
        ("processor\t: 0\nFeatures\t: fp asimd\n", False),
        ("", False),
    ],
)
def test_saturation_is_read_from_the_processor(cpuinfo: str, expected: bool) -> None:
    assert saturates(cpuinfo) is expected


class LogScale(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (torch.log1p(x) - 2.0) / 3.0


class Projects(nn.Module):
    """A fixed matrix, as of a mel scale, before the logarithm."""

    matrix: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("matrix", torch.eye(6) + 0.01)

    def forward(self, x: Tensor) -> Tensor:
        return torch.log1p(x @ self.matrix) / 3.0


class Spectrum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        window = torch.hann_window(4)
        return torch.stft(x, 4, 2, window=window, return_complex=True).abs().flatten(1)


SKEWED = torch.rand(200, 6, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 4, 6)


def network(inputs: int = 6) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(inputs, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)
    )


def standardised() -> FullModel:
    standardise = Standardise(torch.Size([6]))
    standardise.mean.copy_(SKEWED.mean(0))
    standardise.deviation.copy_(SKEWED.std(0))
    return FullModel(standardise, network())


@pytest.mark.parametrize(
    "model",
    [
        FullModel(LogScale(), network()),
        FullModel(Projects(), network()),
        standardised(),
        nn.Sequential(LogScale(), network()),  # the same inside of a task's own network
    ],
    ids=["log1p", "matrix", "federated normalisation", "in the network"],
)
def test_features_of_different_scales_stay_in_float(model: nn.Module) -> None:
    exported = export_with_scopes(model, SKEWED[:2], labels=(), kind="classification")
    inputs = SKEWED.numpy()
    expected = answer(open_session(exported.onnx, threads=1), inputs)
    named = exported.preprocessing
    for raw in (
        int8_static(calibrate(exported.onnx, SKEWED, preprocessing=named), reduce_range=True),
        int8_dynamic(exported.onnx, reduce_range=True, preprocessing=named),
    ):
        found = answer(open_session(raw, threads=1), inputs)
        assert np.abs(found - expected).max() < 0.03 * np.abs(expected).max()
        kept = next(node for node in onnx.load_model_from_string(raw).graph.node)
        assert kept.op_type not in {"QuantizeLinear", "DynamicQuantizeLinear"}


def test_operators_that_symbolic_shape_inference_does_not_know_are_quantised_around() -> None:
    inputs = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    model = FullModel(Spectrum(), network(27))
    exported = export_with_scopes(model, inputs[:2], labels=(), kind="classification")
    expected = answer(open_session(exported.onnx, threads=1), inputs.numpy())
    named = exported.preprocessing
    for raw in (
        int8_static(calibrate(exported.onnx, inputs, preprocessing=named), reduce_range=True),
        int8_dynamic(exported.onnx, reduce_range=True, preprocessing=named),
    ):
        found = answer(open_session(raw, threads=1), inputs.numpy())
        assert 0 < np.abs(found - expected).max() < 0.1 * np.abs(expected).max()


def test_outputs_of_several_ranges_keep_their_own_scale() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.trunk, self.small, self.large = (
                nn.Linear(8, 64),
                nn.Linear(64, 2),
                nn.Linear(64, 2),
            )

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.trunk(x).relu()
            return torch.cat([self.small(hidden), 10_000 * self.large(hidden)], dim=1)

    module, inputs = Heads().eval(), torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    exported = export_with_scopes(module, inputs[:2], labels=(), kind="regression")
    onnx_ = int8_static(calibrate(exported.onnx, inputs), reduce_range=False)
    with torch.inference_mode():
        expected = module(inputs).numpy()
    found = answer(open_session(onnx_, threads=1), inputs.numpy())
    for part in (slice(0, 2), slice(2, 4)):
        error = np.abs(found[:, part] - expected[:, part]).max()
        assert 0 < error < 0.05 * np.abs(expected[:, part]).max()
