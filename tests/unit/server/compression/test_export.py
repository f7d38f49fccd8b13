from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from fedcore.errors import TaskError
from fedcore.files import sha256_hex
from server.compression.export import export_onnx, finish

LABELS = ("cat", "dog", "eel")


class Halve(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 2


def small_model() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(Halve(), nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))


class Gru(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.gru = nn.GRU(6, 7, batch_first=True)
        self.head = nn.Linear(7, 11)

    def forward(self, x: Tensor) -> Tensor:
        hidden, _ = self.gru(self.embedding(x))
        return self.head(hidden)  # type: ignore[no-any-return]


class BranchesOnValues(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


class WritesBatchSizeOut(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, 5)


class AlwaysTwoRows(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sum(dim=0, keepdim=True).expand(2, 5)


class OverTheBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sum(dim=0)


class TwoOutputs(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


def session(exported: bytes) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(exported, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def exported() -> bytes:
    return export_onnx(small_model(), torch.zeros(2, 5), labels=LABELS, kind="classification")


@pytest.mark.parametrize("size", [1, 2, 7])
def test_answers_like_torch_at_any_batch_size(exported: bytes, size: int) -> None:
    inputs = torch.randn(size, 5)
    (answer,) = session(exported).run(None, {"input": inputs.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(answer, small_model()(inputs).numpy(), atol=1e-5)


def test_preprocessing_is_part_of_the_file(exported: bytes) -> None:
    operations = [node.op_type for node in onnx.load_model_from_string(exported).graph.node]
    assert operations[0] in {"Div", "Mul"}
    raw, inputs = small_model()[1:], torch.randn(4, 5)
    (answer,) = session(exported).run(None, {"input": inputs.numpy()})
    with torch.no_grad():
        assert not np.allclose(answer, raw(inputs).numpy(), atol=1e-3)


def test_labels_and_kind_are_the_only_metadata(exported: bytes) -> None:
    metadata = session(exported).get_modelmeta().custom_metadata_map
    assert set(metadata) == {"fedcore.labels", "fedcore.kind"}
    assert json.loads(metadata["fedcore.labels"]) == list(LABELS)
    assert metadata["fedcore.kind"] == "classification"
    model = onnx.load_model_from_string(exported)
    graph = model.graph
    parts = [graph, *graph.node, *graph.input, *graph.output, *graph.initializer, *model.functions]
    assert not any(part.metadata_props or part.doc_string for part in parts)
    assert (model.producer_name, model.producer_version) == ("fedcore", "")


def test_nothing_tells_where_it_was_made(exported: bytes) -> None:
    for path in (Path.cwd(), Path(__file__).parent, Path(torch.__file__).parent, Path.home()):
        assert str(path).encode() not in exported
    for word in (b".py", b"stack_trace", b"site-packages", b"torch", b"test_export", b"Halve"):
        assert word not in exported


def test_is_valid_and_whole(exported: bytes) -> None:
    model = onnx.load_model_from_string(exported)
    onnx.checker.check_model(model, full_check=True)
    assert not any(weight.external_data for weight in model.graph.initializer)


def test_subgraphs_are_stripped_too() -> None:
    inner = onnx.parser.parse_graph(
        "inner () => (float[1] y) { y = Constant <value_float = 1.0> () }"
    )
    inner.node[0].doc_string = "/home/someone/model.py"
    inner.node[0].metadata_props.add(key="where", value="/home/someone")
    node = onnx.helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)
    graph = onnx.helper.make_graph([node], "g", [], [])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)])
    model.opset_import.add(domain="com.example.unused", version=1)
    raw = finish(model, {})
    assert b"someone" not in raw
    assert b"com.example.unused" not in raw


def test_token_models_take_whole_numbers() -> None:
    module = Gru().eval()
    raw = export_onnx(module, torch.zeros(2, 4, dtype=torch.int64), labels=(), kind="next_token")
    running = session(raw)
    for size in (1, 2, 7):
        tokens = torch.randint(0, 11, (size, 4))
        (answer,) = running.run(None, {"input": tokens.numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(answer, module(tokens).numpy(), atol=1e-5)


def test_a_transformer_layer_is_exported_without_its_fused_operation() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    inputs = torch.randn(3, 5, 8)
    found = session(export_onnx(layer, inputs[:2], labels=(), kind="regression"))
    with torch.no_grad():
        expected = layer(inputs).numpy()
    np.testing.assert_allclose(found.run(None, {"input": inputs.numpy()})[0], expected, atol=1e-5)
    assert torch.backends.mha.get_fastpath_enabled()


def test_the_module_stays_as_it_was() -> None:
    module = small_model().train()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    export_onnx(module, torch.zeros(2, 5), labels=(), kind="classification")
    assert module.training
    assert all(torch.equal(before[name], t) for name, t in module.state_dict().items())


def test_says_nothing_while_it_succeeds(capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export_onnx(small_model(), torch.zeros(2, 5), labels=(), kind="classification")
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


_ELSEWHERE = """
import hashlib, runpy, sys
module = runpy.run_path(sys.argv[1])
raw = module["export_onnx"](
    module["small_model"](), module["torch"].zeros(2, 5), labels=("cat", "dog", "eel"),
    kind="classification",
)
print(hashlib.sha256(raw).hexdigest())
"""


def test_another_process_and_folder_give_the_same_bytes(exported: bytes, tmp_path: Path) -> None:
    other = subprocess.run(
        [sys.executable, "-c", _ELSEWHERE, str(Path(__file__))],
        cwd=tmp_path,
        env={**os.environ, "PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert other.stdout.strip() == sha256_hex(exported)


def test_other_weights_give_other_bytes(exported: bytes) -> None:
    module = small_model()
    with torch.no_grad():
        module[1].bias[0] += 1e-3  # type: ignore[index, operator]
    again = export_onnx(module, torch.zeros(2, 5), labels=LABELS, kind="classification")
    assert again != exported


def test_an_operation_without_onnx_is_named_with_its_layer() -> None:
    module = nn.Sequential(nn.Linear(5, 5), nn.Sequential(nn.ReLU(), BranchesOnValues()))
    with pytest.raises(TaskError, match=r"layer '1\.1' \(BranchesOnValues\) cannot be exported"):
        export_onnx(module, torch.zeros(2, 5), labels=(), kind="classification")


def test_a_model_that_does_not_run_says_so() -> None:
    with pytest.raises(TaskError, match=r"shape \(2, 4\).*Nothing was exported") as caught:
        export_onnx(small_model(), torch.zeros(2, 4), labels=(), kind="classification")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (WritesBatchSizeOut(), r"layer '1' \(WritesBatchSizeOut\).*ranges"),
        (AlwaysTwoRows(), "always returns 2 rows"),
        (OverTheBatch(), r"for 2 inputs it returns \(5,\)"),
        (TwoOutputs(), "for 2 inputs it returns tuple"),
    ],
)
def test_what_is_not_one_row_an_input_is_refused(module: nn.Module, reason: str) -> None:
    with pytest.raises(TaskError, match=f"{reason}.*Nothing was exported") as caught:
        export_onnx(nn.Sequential(Halve(), module), torch.zeros(2, 5), labels=(), kind="regression")
    assert "\n" not in str(caught.value)
