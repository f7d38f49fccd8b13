"""What a candidate must show before release, and that devices answer as it was measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import Subset

from edge_client.inference.confined import predict
from edge_client.inference.process import ModelLimits
from fedcore import Task
from fedcore.artifacts.manifest import FileEntry, Manifest, PrivacyStatement
from fedcore.config.finetune import Finetune
from fedcore.config.run import CANDIDATES, FederationConfig, RunConfig
from fedcore.files import sha256_hex
from fedcore.task.model import FullModel
from server.cloud import CloudData
from server.compression.compress import compress
from server.compression.compressed import Compressed
from server.compression.runtime import answer, open_session
from tests.origin import LINEAGE

QuickRun = Callable[..., RunConfig]


def quiet(line: str) -> None:
    assert "\n" not in line


@pytest.mark.parametrize("name", [name for name in CANDIDATES if name != "int8_mixed"])
def test_a_device_answers_each_input_of_a_batch_as_if_it_were_alone(
    name: str, compressed: Compressed, digits: Task, tmp_path: Path
) -> None:
    raw = compressed.files[name]
    (tmp_path / "model.onnx").write_bytes(raw)
    entry = FileEntry(path="model.onnx", sha256=sha256_hex(raw), length=len(raw))
    manifest = Manifest(
        model="digits",
        version=1,
        created="2026-01-01T00:00:00Z",
        kind="classification",
        labels=digits.labels,
        input_shape=(64,),
        input_dtype="float32",
        onnx=entry,
        golden=entry,
        golden_tolerance=1.0,
        lineage=LINEAGE,
        privacy=PrivacyStatement(unit="none", epsilon=None, target_delta=None, noise="none"),
        parity=compressed.parity,
    )
    inputs = compressed.golden.inputs.copy()
    inputs[3] *= 1000  # in a batch, it would set the scale of all others
    found = predict(manifest, tmp_path / "model.onnx", inputs, threads=1, limits=ModelLimits())
    np.testing.assert_array_equal(found, answer(open_session(raw, threads=1), inputs))


@pytest.mark.parametrize(
    ("epochs", "kept", "reason"),
    [
        (0, True, "finetune.epochs = 0 turns training on them off"),
        (5, False, "the gate did not keep the model that was fine-tuned on them"),
    ],
)
def test_no_candidate_trains_on_data_that_fine_tuning_may_not(
    digits: Task,
    digits_model: FullModel,
    digits_cloud: CloudData,
    quick_run: QuickRun,
    epochs: int,
    kept: bool,
    reason: str,
) -> None:
    tuning = Finetune(epochs=epochs)

    def candidates(**more: object) -> dict[str, str]:
        run = quick_run(**more).model_copy(update={"finetune": tuning})
        found = compress(run, digits, digits_model, digits_cloud, progress=quiet, tuning_kept=kept)
        return {each.name: each.reason for each in found.records}

    reasons = candidates(candidates=("fp32", "pruned", "pruned_int8"))
    assert all(reason in reasons[name] for name in ("pruned", "pruned_int8"))
    assert reason not in candidates(candidates=("fp32", "pruned"), prune_epochs=0)["pruned"]


def test_a_loss_that_few_examples_cannot_exclude_is_not_risked(
    digits: Task, digits_model: FullModel, digits_cloud: CloudData, quick_run: QuickRun
) -> None:
    few = CloudData(digits_cloud.train, Subset(digits_cloud.heldout, range(20)))
    run = quick_run(max_slowdown=9.0)
    found = compress(run, digits, digits_model, few, progress=quiet)
    records = {record.name: record for record in found.records}
    assert not records["pruned"].admitted
    assert "at 95 % confidence" in records["pruned"].reason
    static = records["int8_static"]  # not trained on the cloud's data, so these may count
    assert static.drop_bound is not None
    assert static.drop_bound < 0.1
    assert "without labels" in static.evidence


def test_where_devices_judge_no_retrained_candidate_goes_unjudged(
    digits: Task, digits_model: FullModel, digits_cloud: CloudData, quick_run: QuickRun
) -> None:
    quick = quick_run(candidates=("fp32", "pruned"))
    held = FederationConfig(evaluate_cohort=2, holdout=0.2)

    def reason(**finetune: str) -> str:
        run = quick.model_copy(
            update={"federation": held, "finetune": Finetune.model_validate(finetune)}
        )
        found = compress(run, digits, digits_model, digits_cloud, progress=quiet)
        return {each.name: each.reason for each in found.records}["pruned"]

    assert "which clients judge" in reason()
    assert "which clients judge" not in reason(judge="cloud")
