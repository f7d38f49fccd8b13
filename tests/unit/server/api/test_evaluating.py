"""`fedcore.evaluate` and ``fedcore evaluate``: any model, on the data of each simulated client."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import fedcore
from fedcore import cli
from fedcore.config.run import RunConfig
from fedcore.errors import CompressionError, ConfigError, DataError, FedcoreError, PrivacyError
from fedcore.task.model import FullModel, build_model, checkpoint_bytes
from fedcore.training.evaluate import evaluate
from server.compression.export import export_onnx
from server.evaluate_command import evaluate as command
from tests.unit.fedcore.clients import COUNT, data, make_run, make_task

NAMES = ["anna", "ben", "carl"]
FILE = """
from tests.unit.fedcore.clients import data, make_task
task = make_task(clients=lambda folder: ["anna", "ben", "carl"], client_test=lambda c, f: data(c))
"""


def of(**changed: Any) -> tuple[fedcore.Task, RunConfig, FullModel]:
    task = make_task(clients=lambda folder: NAMES, **changed)
    run = make_run(federation={"rounds": 1, "evaluate_cohort": 2, "holdout": 0.25})
    return task, run, build_model(task, run).eval()


def test_a_model_and_its_export_measure_alike_on_what_clients_hold_back(tmp_path: Path) -> None:
    task, run, model = of()
    found = fedcore.evaluate(task, run, model, progress=False)
    assert [each.client for each in found.clients] == NAMES
    assert {each.examples for each in found.clients} == {COUNT // 4}
    assert (found.part, found.known, found.failed) == ("heldout", 3, {})
    onnx = export_onnx(model, torch.zeros(2, 6), labels=(), kind="classification")
    (tmp_path / "model.onnx").write_bytes(onnx)
    (tmp_path / "model.safetensors").write_bytes(checkpoint_bytes(model))
    for other in (onnx, tmp_path / "model.onnx", str(tmp_path / "model.safetensors")):
        again = fedcore.evaluate(task, run, other, progress=False)
        assert again.clients == found.clients


def test_each_part_of_the_data_is_the_one_that_is_asked_for() -> None:
    task, run, model = of(client_test=lambda client, folder: data(f"test of {client}"))
    apart = run.model_copy(update={"federation": run.federation.model_copy()})
    whole = fedcore.evaluate(task, apart, model, data="all", clients=["ben"], progress=False)
    assert [(each.client, each.examples) for each in whole.clients] == [("ben", COUNT)]
    expected = evaluate(model, data("ben"), task.metrics)
    assert whole.clients[0].metrics == expected
    tested = fedcore.evaluate(task, run, model, data="test", clients="anna", progress=False)
    assert tested.clients[0].metrics == evaluate(model, data("test of anna"), task.metrics)
    unheld = make_run()
    assert fedcore.evaluate(task, unheld, model, progress=False).part == "test"
    bare, _, _ = of()
    assert fedcore.evaluate(bare, unheld, model, progress=False).part == "all"
    assert len(fedcore.evaluate(task, run, model, clients=2, progress=False).clients) == 2


def test_a_client_that_fails_is_named_and_the_others_are_measured() -> None:
    def client_data(client: str, folder: Path | None) -> TensorDataset:
        if client == "ben":
            raise OSError("disk gone")
        return data(client)

    task, run, model = of(client_data=client_data)
    found = fedcore.evaluate(task, run, model, progress=False)
    assert [each.client for each in found.clients] == ["anna", "carl"]
    assert "disk gone" in found.failed["ben"]
    assert "1 client could not evaluate it. First: 'ben'" in str(found)
    with pytest.raises(DataError, match=r"none of 1 client could evaluate.*disk gone"):
        fedcore.evaluate(task, run, model, clients=["ben"], progress=False)


def test_a_metric_that_is_undefined_leaves_the_others() -> None:
    odd = fedcore.Metric(
        "odd", lambda outputs, targets: float("nan") if len(targets) == 10 else 1.0, True
    )
    task, run, model = of(metrics=(fedcore.ACCURACY, odd))
    found = fedcore.evaluate(task, run, model, progress=False)
    assert found.spread("odd") is None
    assert found.spread("accuracy") is not None


def test_under_privacy_clients_give_the_primary_metrics_sums_with_noise() -> None:
    task, run, model = of(metrics=(fedcore.ACCURACY, fedcore.metrics.F1))
    private = {"unit": "example", "target_delta": 1e-3, "evaluation_noise_multiplier": 0.7}
    exact = fedcore.evaluate(task, run, model, progress=False)
    found = fedcore.evaluate(task, run, model, progress=False, privacy=private)
    onnx = export_onnx(model, torch.zeros(2, 6), labels=(), kind="classification")
    again = fedcore.evaluate(task, run, onnx, progress=False, privacy=private)
    for noised in (found, again):
        assert [metric.name for metric in noised.metrics] == ["accuracy"]
        for one, other in zip(noised.clients, exact.clients, strict=True):
            gap = one.sums["accuracy"] - other.sums["accuracy"]
            assert 0 < float(abs(gap).max()) < 6 * 0.7
            assert 0 <= one.metrics["accuracy"] <= 1
        assert noised.noise is not None
        assert "noise   multiplier 0.7 on each client's sums; epsilon 4.9" in str(noised)
        assert noised.as_json()["noise"]["noise_multiplier"] == 0.7
    # Two models that answer alike have noise of their own: else comparing them would cancel it.
    assert found.clients[0].sums["accuracy"].tolist() != again.clients[0].sums["accuracy"].tolist()


@pytest.mark.parametrize(
    ("changed", "kind", "said"),
    [
        ({"clients": ["dora"]}, ConfigError, "'dora' is none of them"),
        ({"clients": []}, ConfigError, "none is named"),
        ({"clients": 0}, ConfigError, "expected at least 1"),
        ({"data": "test"}, ConfigError, "has no client_test"),
        (
            {"data": "heldout", "federation": {"holdout": 0.0, "evaluate_cohort": 0}},
            ConfigError,
            "no client holds data back",
        ),
        ({"model": b"no onnx"}, CompressionError, "onnxruntime cannot load it"),
        ({"model": "."}, ConfigError, "this is a folder"),
        ({"model": "none.safetensors"}, DataError, "none.safetensors"),
        ({"model": "other"}, DataError, "another model"),
        (
            {
                "privacy": {"unit": "client", "client": {"target_delta": 1e-3}},
                "federation": {"holdout": 0.0, "evaluate_cohort": 0},
            },
            PrivacyError,
            "exact metrics",
        ),
        (
            {"privacy": {"unit": "example", "target_delta": 1e-3}, "data": "all"},
            PrivacyError,
            "exact metrics",
        ),
        (
            {
                "privacy": {"unit": "example", "target_delta": 1e-3},
                "federation": {"holdout": 0.0, "evaluate_cohort": 0},
            },
            PrivacyError,
            "clients evaluate with noise on data that they hold back",
        ),
    ],
)
def test_what_cannot_be_evaluated_is_refused(
    changed: dict[str, Any], kind: type[FedcoreError], said: str, tmp_path: Path
) -> None:
    task, run, model = of()
    asked: dict[str, Any] = {"model": model} | changed
    if asked["model"] == "other":
        asked["model"] = tmp_path / "other.safetensors"
        other = FullModel(nn.Identity(), nn.Linear(6, 3))
        asked["model"].write_bytes(checkpoint_bytes(other))
    with pytest.raises(kind, match=said):
        fedcore.evaluate(task, run, progress=False, **asked)


def test_the_command_prints_a_table_or_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, _, model = of()
    (tmp_path / "model.safetensors").write_bytes(checkpoint_bytes(model))
    (tmp_path / "task.py").write_text(FILE)
    (tmp_path / "run.toml").write_text(
        'name = "r"\ntask = "task.py"\n[federation]\nholdout = 0.25\nevaluate_cohort = 2\n'
    )
    monkeypatch.chdir(tmp_path)
    parser = cli._Parser()
    command.arguments(parser)

    def ask(*words: str) -> str:
        assert command.run(parser.parse_args(["model.safetensors", "run.toml", *words])) == 0
        return capsys.readouterr().out

    shown = ask()
    assert "30 examples of 3 of 3 clients" in shown
    assert "95 % interval" in shown
    told = json.loads(ask("--json", "--data", "test", "--clients", "anna,carl"))
    assert [each["client"] for each in told["by_client"]] == ["anna", "carl"]
    assert told["data"] == "test"
    assert told["metrics"]["accuracy"]["clients"] == 2
    assert json.loads(ask("--json", "--clients", "2"))["clients_known"] == 3
    with pytest.raises(ConfigError, match="expected a number"):
        ask("--clients", ",")


def test_where_clients_hold_back_all_of_their_data_only_they_are_asked() -> None:
    task, run, model = of()
    apart = {"federation": {"evaluate_cohort": 2, "holdout": 0.73, "holdout_by": "clients"}}
    found = fedcore.evaluate(task, run, model, progress=False, **apart)
    assert [each.client for each in found.clients] == ["anna", "carl"]  # ben trains
    assert {each.examples for each in found.clients} == {COUNT}
    assert (found.part, found.known, found.failed) == ("heldout", 2, {})
    one = fedcore.evaluate(task, run, model, clients="carl", progress=False, **apart)
    assert one.clients == found.clients[1:]
    with pytest.raises(ConfigError, match=r"'ben' trains.*Nothing was evaluated; name those"):
        fedcore.evaluate(task, run, model, clients=["anna", "ben"], progress=False, **apart)
    everyone = fedcore.evaluate(task, run, model, data="all", progress=False, **apart)
    assert [each.client for each in everyone.clients] == NAMES
