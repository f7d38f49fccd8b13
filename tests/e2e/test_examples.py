"""The examples on real data reach what the results page says of them."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from fedcore import load_run, load_task
from fedcore.config.run import ClientConfig
from fedcore.task.definition import Examples
from fedcore.task.model import build_model, standardise_of
from fedcore.training.evaluate import evaluate
from fedcore.training.local import train
from tests.prefork import Prefork

EXAMPLES = Path(__file__).parents[2] / "examples"


Fedcore = Callable[..., subprocess.CompletedProcess[str]]
Simulate = Callable[..., Mapping[str, Any]]


@pytest.fixture
def simulate(prefork: Prefork, tmp_path: Path) -> Simulate:
    """Runs an example with the data sets in a folder, and returns its summary."""

    def run(config: Path, data: Path, *options: str) -> Mapping[str, Any]:
        done = prefork.run(
            ["simulate", config, "--runs", tmp_path / "runs", *options],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1", "FEDCORE_DATA": str(data)},
            timeout=850,
        )
        assert done.returncode == 0, done.stderr
        return summary_in(tmp_path / "runs")

    return run


def summary_in(runs: Path) -> Mapping[str, Any]:
    (summary,) = runs.glob("*/summary.json")
    figures: Mapping[str, Any] = json.loads(summary.read_text())
    return figures


@pytest.mark.slow
def test_the_demo_keeps_its_promises(fresh_fedcore: Fedcore, tmp_path: Path) -> None:
    """In processes as a user starts them, for it measures latencies."""
    keys, repository, runs = (tmp_path / name for name in ("keys", "repository", "runs"))
    made = fresh_fedcore(
        "release", "init", "--keys", keys, "--repository", repository, cwd=tmp_path
    )
    assert made.returncode == 0, made.stderr
    done = fresh_fedcore(
        *("simulate", EXAMPLES / "digits" / "run.toml", "--runs", runs),
        *("--set", f"release.keys={json.dumps(str(keys))}"),
        *("--set", f"release.repository={json.dumps(str(repository))}"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    summary = summary_in(runs)
    accuracy, latency, model = summary["accuracy"], summary["latency"], summary["model"]
    assert accuracy["federated"] >= 0.80
    assert summary["epsilon"]["max"] <= 8
    assert summary["target_delta"] == 1e-3
    assert accuracy["finetuned"] > max(accuracy["federated"], accuracy["cloud_alone"])
    assert accuracy["released"] >= accuracy["finetuned"] - 0.01
    # 2.9 to 3.9 between processors (docs/results.md): of few microseconds, the call takes most.
    assert latency["torch_p50_us"] / latency["released_p50_us"] >= 2.4
    faster = latency["fp32_p50_us"] / latency["released_p50_us"] >= 1.3
    assert faster or model["released_bytes"] <= model["fp32_bytes"] / 2
    assert summary["release"]["version"] == 1


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_mnist_by_writer_on_people_never_seen(simulate: Simulate, data_folder: Path) -> None:
    config = EXAMPLES / "mnist_by_writer" / "run.toml"
    run = load_run(config)
    assert (run.federation.rounds, run.federation.cohort, run.client.epochs) == (20, 20, 3)
    assert not run.private
    only = ("--set", "finetune.epochs=0", "--set", 'compression.candidates=["fp32"]')
    summary = simulate(config, data_folder, *only)
    assert summary["accuracy"]["federated"] >= 0.96


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_one_round_of_private_mnist(simulate: Simulate, data_folder: Path) -> None:
    config = EXAMPLES / "mnist_private" / "run.toml"
    task = load_task(config.with_name("task.py"))
    shares = [task.client_data(client, data_folder) for client in task.clients(data_folder)]
    assert [len(share) for share in shares] == [6000] * 10  # type: ignore[arg-type]
    summary = simulate(config, data_folder, "--set", "federation.rounds=1")
    assert summary["accuracy"]["federated"] >= 0.93  # ten steps a client, the whole budget
    assert summary["accuracy"]["released"] == summary["accuracy"]["federated"]
    assert 2.9 <= summary["epsilon"]["max"] <= 3


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_private_mnist_is_accurate_within_its_budget(simulate: Simulate, data_folder: Path) -> None:
    config = EXAMPLES / "mnist_private" / "run.toml"
    run = load_run(config)
    assert (run.privacy.unit, run.privacy.max_epsilon, run.privacy.target_delta) == (
        "example",
        3.0,
        1e-5,
    )
    summary = simulate(config, data_folder)
    assert summary["rounds"] <= 30
    assert summary["epsilon"]["max"] <= 3
    assert summary["accuracy"]["federated"] >= 0.965


def pooled_rmse(folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[float, float]:
    """Of the example's own network on all clients' data at once, and of predicting the mean."""
    monkeypatch.setenv("FEDCORE_DATA", str(data))
    run, task = load_run(folder / "run.toml"), load_task(folder / "task.py")
    parts = [task.client_data(client, data) for client in task.clients(data)]
    tensors = [part.tensors for part in parts]  # type: ignore[attr-defined]
    inputs, targets = map(torch.cat, zip(*tensors, strict=True))
    pool: Examples = torch.utils.data.TensorDataset(inputs, targets)  # type: ignore[assignment]
    model = build_model(task, run)
    standardise_of(model).mean.copy_(inputs.mean(0))
    standardise_of(model).deviation.copy_(inputs.std(0))
    settings = ClientConfig(learning_rate=0.02, momentum=0.9)
    order = torch.Generator().manual_seed(run.seed)
    train(model, pool, task.loss_of, settings, epochs=20, batch_size=64, rng=order)
    test = task.test_data(data)
    wanted = test.tensors[1]  # type: ignore[attr-defined]
    constant = (wanted - targets.mean()).square().mean().sqrt().item()
    return evaluate(model, test, task.metrics)["rmse"], constant


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_turbofan_learns_nearly_as_from_pooled_data(
    simulate: Simulate, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "elsewhere"  # a task is a file that lies anywhere
    shutil.copytree(EXAMPLES / "turbofan", folder)
    summary = simulate(folder / "run.toml", data_folder)
    pooled, constant = pooled_rmse(folder, data_folder, monkeypatch)
    assert pooled <= constant / 2
    assert summary["rmse"]["federated"] <= 1.15 * pooled
    assert all(math.isfinite(value) for value in summary["rmse"].values())
    assert summary["model"]["released_bytes"] < summary["model"]["fp32_bytes"]


def test_frames_by_site_give_a_report_by_site_in_a_few_lines(tmp_path: Path) -> None:
    """The script is what the page shows."""
    script = EXAMPLES / "sites" / "sites.py"
    source = script.read_text()
    assert len(source.splitlines()) <= 25
    page = (EXAMPLES.parent / "docs" / "task.md").read_text()
    assert source.partition('"""\n\n')[2] in page
    done = subprocess.run(
        [sys.executable, script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        *("east", "north", "south", "west"),
        "report",
    ]
    assert all(float(line.split()[2]) > 0.8 for line in lines[:4])
    assert "south" in (tmp_path / "runs" / "sites" / "report.html").read_text()


def test_a_gpt_is_trained_over_roles(data_folder: Path) -> None:
    task = load_task(EXAMPLES / "shakespeare" / "small.py")
    clients = task.clients(data_folder)
    assert "kinghenryv.FLUELLEN" in clients
    assert not any(name.startswith(("hamlet.", "othello.")) for name in clients)
    inputs, targets = task.client_data(clients[0], data_folder)[0]
    assert inputs[1:].tolist() == targets[:-1].tolist()
    text = "".join(task.labels[place] for place in inputs)
    assert text.startswith("So shaken as we are, so wan with care,\nFind we a time")
    outputs = task.model()(inputs.unsqueeze(0))
    assert outputs.shape == (1, 64, len(task.labels))
    small, large = (
        load_run(EXAMPLES / "shakespeare" / f"{name}.toml") for name in ("small", "run")
    )
    assert (small.finetune.every, large.finetune.every) == (5, 10)
    assert sum(p.numel() for p in load_task(large.path(large.task)).model().parameters()) > 10e6
