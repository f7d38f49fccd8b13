from __future__ import annotations

import json
import math
from dataclasses import asdict, replace

from fedcore.artifacts.manifest import TestStatement
from server.records import ClientTestRecord, MetricSource, RunRecord, TrainingRecord, VirtualRecord
from server.report.choice import why_chosen
from server.report.summary import summary


def test_a_whole_run(record: RunRecord) -> None:
    assert summary(record, target_delta=1e-3, torch_p50_us=70.0, seconds=5.0) == {
        "task": {"name": "digits", "kind": "classification", "sha256": None},
        "rounds": 3,
        "accuracy": {
            "federated": 0.86,
            "cloud_alone": 0.89,
            "finetuned": 0.955,
            "released": 0.95,
        },
        "epsilon": {"max": 4.5},
        "initial": None,
        "target_delta": 1e-3,
        "client_privacy": None,
        "bytes": {"up": 3000, "down": 6000},
        "model": {"fp32_bytes": 218_000, "released_bytes": 64_000},
        "candidate": {
            "name": "int8_static",
            "reason": "chosen: the smallest",
            "why": why_chosen(record.candidates, "int8_static", primary="accuracy"),
            "agreement": 0.99,
            "drop_bound": None,
        },
        "latency": {"torch_p50_us": 70.0, "fp32_p50_us": 11.0, "released_p50_us": 9.0},
        "release": {
            "version": 3,
            "digest": "ab" * 32,
            "withheld": None,
            "failed": None,
            "untrained": None,
        },
        "test": None,
        "evaluation": None,
        "settings": {},
        "finetune": {"auto": None, "privacy": None},
        "best_round": 3,
        "seconds": {"rounds": 1.5, "compression": 2.5, "total": 5.0},
        "training": None,
        "virtual": None,
        "clients": [asdict(each) for each in record.clients],
    }
    assert record.clients


def test_what_a_run_lacks_is_null_and_not_left_out(record: RunRecord) -> None:
    bare = replace(
        record,
        rounds=(),
        epsilon=None,
        clients=(),
        candidates=(),
        chosen=None,
        manifest=None,
        scores={},
        stages={},
    )
    assert summary(bare, target_delta=None, torch_p50_us=None, seconds=1.0) == {
        "task": {"name": "digits", "kind": "classification", "sha256": None},
        "rounds": 0,
        "accuracy": dict.fromkeys(("federated", "cloud_alone", "finetuned", "released")),
        "epsilon": {"max": None},
        "initial": None,
        "target_delta": None,
        "client_privacy": None,
        "bytes": {"up": 0, "down": 0},
        "model": {"fp32_bytes": None, "released_bytes": None},
        "candidate": dict.fromkeys(("name", "reason", "why", "agreement", "drop_bound")),
        "latency": {"torch_p50_us": None, "fp32_p50_us": None, "released_p50_us": None},
        "release": {
            "version": None,
            "digest": None,
            "withheld": None,
            "failed": None,
            "untrained": None,
        },
        "test": None,
        "evaluation": None,
        "settings": {},
        "finetune": {"auto": None, "privacy": None},
        "best_round": None,
        "seconds": {"total": 1.0},
        "training": None,
        "virtual": None,
        "clients": [],
    }


def test_how_clients_were_trained_and_what_their_devices_did(record: RunRecord) -> None:
    rounds = [
        replace(each, virtual=VirtualRecord(60.0 * each.round, 1, 2, 3, 500, 400, 300))
        for each in record.rounds
    ]
    training = TrainingRecord("vectorised", "it is quicker", 0.002, 0.0005, workers=2)
    made = summary(
        replace(record, rounds=tuple(rounds), training=training),
        target_delta=1e-3,
        torch_p50_us=None,
        seconds=1.0,
    )
    assert made["training"] == {
        "method": "vectorised",
        "reason": "it is quicker",
        "loop_s": 0.002,
        "vectorised_s": 0.0005,
        "workers": 2,
    }
    assert made["virtual"] == {
        "simulated_s": 360.0,
        "unavailable": 3,
        "dropped": 6,
        "stragglers": 9,
        "bytes_down": 1500,
        "bytes_up": 1200,
        "bytes_wasted": 900,
    }


def test_scores_carry_the_names_of_their_metrics(record: RunRecord) -> None:
    scores = {"rmse": {"federated": 20.0}, "mae": {"released": 9.0}}
    regression = replace(record, primary="rmse", higher_is_better=False, scores=scores)
    made = summary(regression, target_delta=None, torch_p50_us=None, seconds=1.0)
    assert "accuracy" not in made
    assert made["rmse"]["federated"] == 20.0
    assert made["rmse"]["released"] is None
    assert made["mae"]["released"] == 9.0


def test_a_metric_named_like_another_entry_replaces_nothing(record: RunRecord) -> None:
    made = summary(
        replace(record, primary="bytes", scores={"bytes": {"released": 0.5}}),
        target_delta=None,
        torch_p50_us=None,
        seconds=1.0,
    )
    assert made["bytes"] == {"up": 3000, "down": 6000}
    assert made["bytes_metric"]["released"] == 0.5


def test_what_is_not_finite_is_null(record: RunRecord) -> None:
    scores = {"accuracy": {"federated": math.nan, "released": math.inf}}
    made = summary(
        replace(record, scores=scores), target_delta=None, torch_p50_us=None, seconds=1.0
    )
    json.dumps(made, allow_nan=False)
    assert made["accuracy"]["federated"] is None
    assert made["accuracy"]["released"] is None


def test_the_final_test_is_told_with_its_warning_and_each_client(record: RunRecord) -> None:
    tested = TestStatement(
        metric="accuracy", examples=8, federated=0.9, released=0.8, drop=0.1, clients=2
    )
    of_clients = (ClientTestRecord("anna", 5, 1.0, 0.8), ClientTestRecord("ben", 3, 0.7, math.nan))
    made = summary(
        replace(record, tested=tested, test_warning="worse", client_tests=of_clients),
        target_delta=None,
        torch_p50_us=None,
        seconds=1.0,
    )
    assert made["test"]["drop"] == 0.1
    assert made["test"]["clients"] == 2
    assert made["test"]["warning"] == "worse"
    assert made["test"]["by_client"] == [
        {"client": "anna", "examples": 5, "federated": 1.0, "released": 0.8},
        {"client": "ben", "examples": 3, "federated": 0.7, "released": None},
    ]


def test_clients_behind_each_metric_are_told(record: RunRecord) -> None:
    sources = {
        "accuracy": MetricSource(10, 10, 0, averaged=False, reason=""),
        "auc": MetricSource(7, 10, 3, averaged=True, reason="one class only"),
    }
    metrics: dict[str, float | None] = {"accuracy": 0.9, "auc": None}
    rounds = tuple(replace(each, metrics=metrics, sources=sources) for each in record.rounds)
    made = summary(
        replace(record, rounds=rounds), target_delta=None, torch_p50_us=None, seconds=1.0
    )
    assert made["evaluation"] == {
        "mean_of_clients": ["auc"],
        "metrics": {"accuracy": 0.9, "auc": None},
        "sources": {name: asdict(each) for name, each in sources.items()},
    }
    json.dumps(made, allow_nan=False)
