"""``fedcore simulate`` with client-level privacy, from the run's file to the signed manifest."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from fedcore.privacy.accounting import Charge, epsilon_of

pytestmark = pytest.mark.slow

Fedcore = Callable[..., subprocess.CompletedProcess[str]]
PRIVATE = [
    *("--set", "federation.rounds=4", "--set", "federation.cohort=4", "--set", "client.epochs=1"),
    *("--set", "finetune.epochs=0", "--set", 'compression.candidates=["fp32"]'),
    *("--set", "compression.timing_runs=100", "--set", "simulation.workers=1"),
    *("--set", "simulation.training=loop", "--set", "privacy.noise_multiplier=2.0"),
    *("--set", "privacy.client.target_delta=1e-3", "--set", "privacy.client.accountant=rdp"),
    *("--set", "privacy.client.noise_multiplier=2.0", "--set", "privacy.client.max_epsilon=1.5"),
]


def test_both_units_from_the_file_to_the_manifest(fedcore: Fedcore, tmp_path: Path) -> None:
    assert fedcore("new", "work", cwd=tmp_path).returncode == 0
    folder = tmp_path / "work"
    keys = ["--keys", "keys", "--repository", "repository"]
    assert fedcore("release", "init", *keys, cwd=folder).returncode == 0
    released = ["--set", "release.keys=keys", "--set", "release.repository=repository"]
    both = ["--set", "privacy.unit=both", "--set", "client.batch_size=1000"]
    done = fedcore("simulate", "run.toml", *PRIVATE, *both, *released, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    results = folder / "runs" / "work"
    events = [json.loads(line) for line in (results / "metrics.jsonl").read_text().splitlines()]
    rounds = [event for event in events if event["event"] == "round_finished"]
    assert 0 < len(rounds) < 4  # the budget of clients ends the run
    assert (
        "would raise the client-level epsilon above privacy.client.max_epsilon = 1.5" in done.stdout
    )
    assert all(event["train_loss"] is None for event in rounds)
    expected = [
        epsilon_of([Charge(n, 2.0, 0.5, n)], target_delta=1e-3, accountant="rdp")
        for n in range(1, len(rounds) + 2)
    ]
    assert [event["client_epsilon"] for event in rounds] == pytest.approx(expected[:-1])
    assert expected[-2] <= 1.5 < expected[-1]
    manifest = json.loads(next((folder / "repository").rglob("*manifest.json")).read_text())
    privacy = manifest["privacy"]
    assert (privacy["unit"], privacy["noise"]) == ("both", "simulated")
    assert 0 < privacy["epsilon"] <= 8
    assert privacy["client"] == {
        "epsilon": pytest.approx(expected[-2]),
        "target_delta": 1e-3,
        "adjacency": "zero_out_client",
        "mechanism": "gaussian",
        "noise_multiplier": 2.0,
        "clip_norm": 1.0,
        "sample_rate": 0.5,
        "separation": None,
        "clients": 8,
        "rounds": len(rounds),
        "accountant": "rdp",
    }
    summary = json.loads((results / "summary.json").read_text())
    assert summary["client_privacy"] == privacy["client"]
    assert summary["epsilon"]["max"] == pytest.approx(privacy["epsilon"])
    report = (results / "report.html").read_text()
    assert "one client with all of its data" in report
    assert "one example of one client" in report


def test_a_budget_too_small_is_refused_before_anything(fedcore: Fedcore, tmp_path: Path) -> None:
    assert fedcore("new", "work", cwd=tmp_path).returncode == 0
    options = ["--set", "privacy.unit=client", "--set", "privacy.client.target_delta=0.1"]
    done = fedcore("simulate", "run.toml", *PRIVATE, *options, cwd=tmp_path / "work")
    assert done.returncode == 5
    assert "privacy.client.target_delta = 0.1 with 8 clients: expected at most 0.013" in done.stderr
    assert not (tmp_path / "work" / "runs").exists()
