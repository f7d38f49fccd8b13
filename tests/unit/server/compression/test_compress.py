from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset

from fedcore import Task
from fedcore.artifacts.decode import DECODE_KEY
from fedcore.artifacts.golden import golden_bytes, parse_golden
from fedcore.config.run import CANDIDATES, DEFAULT_CANDIDATES, RunConfig
from fedcore.errors import CompressionError, ParityError
from fedcore.files import sha256_hex
from fedcore.task.definition import size_of
from fedcore.task.kinds.registry import KindName
from fedcore.task.model import FullModel
from server.cloud import CloudData
from server.compression.candidates import ALL
from server.compression.compress import compress
from server.compression.compressed import Compressed
from server.records import CandidateRecord

BUILT = tuple(name for name in CANDIDATES if name != "int8_mixed")
"""The candidates of the fixture, whose int8_static leaves no layer to be kept in float32."""
Fresh = Callable[[Task], FullModel]
QuickRun = Callable[..., RunConfig]


def built(compressed: Compressed) -> list[CandidateRecord]:
    return [record for record in compressed.records if record.name in compressed.files]


def quiet(line: str) -> None:
    assert "\n" not in line


def task_of(
    kind: KindName,
    model: Callable[[], nn.Module],
    example_input: Tensor,
    inputs: Tensor,
    targets: Tensor,
) -> tuple[Task, CloudData]:
    """A task whose cloud data are these, half of them held out."""
    data = TensorDataset(inputs, targets)
    task = Task(
        name=kind,
        kind=kind,
        model=model,
        clients=lambda folder: ["one"],
        client_data=lambda client, folder: data,
        test_data=lambda folder: data,
        example_input=example_input,
    )
    middle = len(inputs) // 2
    return task, CloudData(Subset(data, range(middle)), Subset(data, range(middle, len(inputs))))


def test_candidates_stand_in_the_order_of_the_configuration(compressed: Compressed) -> None:
    assert tuple(candidate.name for candidate in ALL) == CANDIDATES
    assert tuple(record.name for record in compressed.records) == CANDIDATES
    assert tuple(compressed.files) == BUILT


def test_the_smallest_that_keeps_the_limits_is_chosen(compressed: Compressed) -> None:
    admitted = [record for record in compressed.records if record.admitted]
    best = min(admitted, key=lambda record: record.bytes)
    assert compressed.chosen == best.name != "fp32"
    fp32 = compressed.records[0]
    assert best.bytes < fp32.bytes / 2
    assert best.drop <= 0.01


def test_the_choice_is_explained_and_drawn(compressed: Compressed) -> None:
    assert compressed.why.startswith(f"{compressed.chosen} (")
    assert "of the time of fp32, and accuracy " in compressed.why
    plot = compressed.plot()
    assert plot is not None
    assert plot.startswith("<svg")
    assert compressed.chosen in plot


def test_records_are_of_the_files(compressed: Compressed) -> None:
    for record in built(compressed):
        raw = compressed.files[record.name]
        assert (record.bytes, record.sha256) == (len(raw), sha256_hex(raw))
        assert 0 < record.p50_min_us <= record.p50_us <= record.p50_max_us
        assert record.reason
    fp32 = compressed.records[0]
    assert (fp32.drop, fp32.agreement) == (0.0, 1.0)
    assert compressed.torch_p50_us > 0


def test_metric_is_that_of_the_onnx_answers(
    compressed: Compressed, digits: Task, digits_cloud: CloudData
) -> None:
    inputs = torch.stack([digits_cloud.heldout[i][0] for i in range(len(digits_cloud.heldout))])  # type: ignore[arg-type]
    targets = [int(digits_cloud.heldout[i][1]) for i in range(len(inputs))]
    for record in built(compressed):
        session = onnxruntime.InferenceSession(compressed.files[record.name])
        answers = [session.run(None, {"input": row[None].numpy()})[0].argmax() for row in inputs]
        assert record.metric == pytest.approx(np.mean(np.equal(answers, targets)))


def test_the_chosen_file_reproduces_its_golden_outputs(compressed: Compressed) -> None:
    golden = parse_golden(golden_bytes(compressed.golden.inputs, compressed.golden.outputs))
    inputs, outputs = golden.inputs, golden.outputs
    assert outputs.dtype == np.float32
    session = onnxruntime.InferenceSession(compressed.files[compressed.chosen])
    for one, expected in zip(inputs, outputs, strict=True):
        (answer,) = session.run(None, {"input": one[None]})
        assert np.abs(answer[0] - expected).max() <= compressed.golden_tolerance
    assert compressed.golden_tolerance < np.abs(outputs).max() / 10


def test_another_model_does_not_reproduce_them(
    compressed: Compressed, digits: Task, fresh: Fresh
) -> None:
    stranger = fresh(digits).eval()
    with torch.no_grad():
        answer = stranger(torch.from_numpy(compressed.golden.inputs)).numpy()
    assert np.abs(answer - compressed.golden.outputs).max() > compressed.golden_tolerance


def test_parity_is_that_of_the_chosen(compressed: Compressed) -> None:
    chosen = next(each for each in compressed.records if each.name == compressed.chosen)
    parity = compressed.parity
    assert parity.metric == "accuracy"
    assert (parity.metric_before, parity.metric_after) == (
        compressed.records[0].metric,
        chosen.metric,
    )
    assert (parity.agreement, parity.max_abs_error) == (chosen.agreement, chosen.max_abs_error)
    assert any("8 bits" in note for note in compressed.notes)


def test_calibration_keeps_to_its_limit_and_is_stated(
    digits: Task, digits_model: FullModel, digits_cloud: CloudData, quick_run: QuickRun
) -> None:
    run = quick_run(
        candidates=("fp32", "int8_static"),
        calibration_examples=50,
        max_slowdown=9.0,
        reduce_range=True,
    )
    found = compress(run, digits, digits_model, digits_cloud, progress=quiet)
    assert found.chosen == "int8_static"
    of = size_of(digits_cloud.train)
    assert found.calibration.startswith(f"50 of {of} examples of the cloud's training data")
    assert any("7 bits" in note for note in found.notes)


def test_the_model_is_not_changed(
    digits: Task, digits_model: FullModel, digits_cloud: CloudData, quick_run: QuickRun
) -> None:
    before = {name: tensor.clone() for name, tensor in digits_model.state_dict().items()}
    digits_model.train()
    run = quick_run(candidates=("fp32", "pruned"))
    compress(run, digits, digits_model, digits_cloud, progress=quiet)
    assert digits_model.training
    digits_model.eval()
    assert all(torch.equal(before[name], t) for name, t in digits_model.state_dict().items())


_ELSEWHERE = """
import json, runpy, sys
from fedcore import load_task
from fedcore.files import sha256_hex
from fedcore.task.model import FullModel
from pathlib import Path
from server.cloud import read_cloud_data
from server.compression.compress import compress
shared = runpy.run_path(sys.argv[1])
task = shared["digits_task"]()
model = shared["build"](task)
model.load_state_dict(__import__("safetensors.torch").torch.load_file(sys.argv[2]))
found = compress(
    shared["configure"](reduce_range=False, candidates=shared["CANDIDATES"]), task, model,
    read_cloud_data(task, None, holdout=0.3, seed=0),
    progress=lambda line: None,
)
print(json.dumps({name: sha256_hex(raw) for name, raw in found.files.items()}))
print(sha256_hex(found.golden.inputs.tobytes()))
"""


@pytest.mark.slow
def test_another_process_and_folder_give_the_same_bytes_of_every_candidate(
    compressed: Compressed, digits_model: FullModel, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    weights = tmp_path / "model.safetensors"
    save_file(digits_model.state_dict(), weights)
    conftest = Path(__file__).with_name("conftest.py")
    other = subprocess.run(
        [sys.executable, "-c", _ELSEWHERE, str(conftest), str(weights)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    files, golden = other.stdout.strip().splitlines()
    assert json.loads(files) == {each.name: each.sha256 for each in built(compressed)}
    assert golden == sha256_hex(compressed.golden.inputs.tobytes())


def test_without_cloud_data_only_fp32_is_made(
    digits: Task, digits_model: FullModel, quick_run: QuickRun
) -> None:
    found = compress(quick_run(), digits, digits_model, None, progress=quiet)
    assert found.chosen == "fp32"
    assert list(found.files) == ["fp32"]
    (record,) = found.records
    assert math.isnan(record.metric)
    assert (found.parity.metric, found.parity.agreement) == ("none", 1.0)
    assert found.calibration == "none"
    assert "without compression" in found.notes[0]
    assert found.golden.inputs.shape == (32, 64)


def test_a_convolutional_model_goes_through(fresh: Fresh, quick_run: QuickRun) -> None:
    torch.manual_seed(0)
    task, cloud = task_of(
        "classification",
        lambda: nn.Sequential(
            nn.Conv2d(1, 8, 3),
            nn.GroupNorm(2, 8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(8 * 16, 3),
        ),
        torch.zeros(1, 8, 8),
        torch.randn(80, 1, 8, 8),
        torch.randint(0, 3, (80,)),
    )
    run = quick_run(max_accuracy_drop=1.0)
    found = compress(run, task, fresh(task), cloud, progress=quiet)
    sizes = {record.name: record.bytes for record in found.records}
    assert set(found.files) >= {"fp32", "int8_static", "pruned", "pruned_int8"}
    assert sizes["pruned"] < sizes["fp32"]
    assert found.records[0].max_abs_error < 1e-4


def test_a_regression_model_goes_through(fresh: Fresh, quick_run: QuickRun) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(120, 6) * torch.tensor([1.0, 10.0, 1.0, 1.0, 1.0, 0.1])
    task, cloud = task_of(
        "regression",
        lambda: nn.Sequential(
            nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)
        ),
        torch.zeros(6),
        inputs,
        inputs.sum(dim=1),
    )
    found = compress(quick_run(), task, fresh(task), cloud, progress=quiet)
    assert found.parity.metric == "rmse"
    assert found.golden.outputs.shape == (32, 1)
    static = next(record for record in found.records if record.name == "int8_static")
    assert 0.9 < static.agreement < 1
    assert abs(static.drop) < 0.1


class NextToken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.gru = nn.Embedding(12, 16), nn.GRU(16, 16, batch_first=True)
        self.head = nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        hidden, _ = self.gru(self.embedding(x))
        return self.head(hidden)  # type: ignore[no-any-return]


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 16)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.1)
        self.head = nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.head(self.block(self.embedding(x), src_mask=mask, is_causal=True))  # type: ignore[no-any-return]


@pytest.mark.parametrize("model", [NextToken, Attends])
def test_a_next_token_model_goes_through(
    model: type[nn.Module], fresh: Fresh, quick_run: QuickRun
) -> None:
    torch.manual_seed(0)
    tokens = torch.randint(0, 12, (60, 7))
    task, cloud = task_of("next_token", model, tokens[0, :6], tokens[:, :6], tokens[:, 1:])
    lines: list[str] = []
    found = compress(
        quick_run(max_accuracy_drop=1.0), task, fresh(task), cloud, progress=lines.append
    )
    assert found.golden.inputs.dtype == np.int64
    assert found.golden.outputs.shape == (32, 6, 12)
    assert tuple(record.name for record in found.records) == DEFAULT_CANDIDATES
    for record in found.records:
        if record.name not in found.files:
            assert not record.admitted
            assert record.reason.startswith("refused: it ")
            assert math.isnan(record.p50_us)
            assert any(f"{record.name} was not built: it " in line for line in lines)
    if model is NextToken:
        assert {"pruned", "pruned_int8"}.isdisjoint(found.files)
    assert "int8_dynamic" in found.files
    assert all(DECODE_KEY.encode() in raw for raw in found.files.values())
    assert not any("decode graph" in note for note in found.notes)


def test_limits_that_nothing_keeps_to_are_an_error(
    digits: Task, digits_model: FullModel, digits_cloud: CloudData, quick_run: QuickRun
) -> None:
    run = quick_run(candidates=("fp32", "int8_dynamic"), max_bytes=1000)
    with pytest.raises(CompressionError, match=r"fp32: takes .* int8_dynamic: takes .*max_bytes"):
        compress(run, digits, digits_model, digits_cloud, progress=quiet)


def test_weights_that_are_not_finite_are_refused_by_name(
    digits: Task, digits_model: FullModel, digits_cloud: CloudData, quick_run: QuickRun
) -> None:
    spoilt = nn.Sequential()
    spoilt.add_module("model", nn.Linear(64, 10))
    with torch.no_grad():
        spoilt.get_submodule("model").weight[0, :3] = torch.nan  # type: ignore[operator]
    with pytest.raises(CompressionError, match=r"3 of the 640 values of 'model\.weight'"):
        compress(quick_run(), digits, spoilt, digits_cloud, progress=quiet)


class OtherwiseWhenExported(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 1.01 if torch.compiler.is_exporting() else x


class Overflows(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x.abs() * 1e30 + 1e30).square()


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (OtherwiseWhenExported(), r"by up to .*, but at most .* is allowed"),
        (Overflows(), "torch returns"),
    ],
)
def test_an_export_that_answers_otherwise_is_a_parity_error(
    layer: nn.Module,
    reason: str,
    digits: Task,
    digits_model: FullModel,
    digits_cloud: CloudData,
    quick_run: QuickRun,
) -> None:
    module = nn.Sequential(digits_model, layer)
    with pytest.raises(ParityError, match=f"candidate fp32: .*{reason}") as caught:
        compress(quick_run(candidates=("fp32",)), digits, module, digits_cloud, progress=quiet)
    assert "\n" not in str(caught.value)


def test_a_metric_that_is_no_number_says_so(
    digits: Task, digits_model: FullModel, digits_cloud: CloudData, quick_run: QuickRun
) -> None:
    never = replace(digits.primary, compute=lambda outputs, targets: math.nan)
    task = replace(digits, metrics=(never,))
    with pytest.raises(
        CompressionError,
        match=r"candidate fp32: its accuracy on the cloud's held-out data is undefined.*Nothing",
    ):
        compress(quick_run(), task, digits_model, digits_cloud, progress=quiet)
