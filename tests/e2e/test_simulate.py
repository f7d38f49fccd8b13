"""``fedcore simulate`` from a scaffold to a signed release, as a user runs it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedcore.config.run import DEFAULT_CANDIDATES
from fedcore.files import sha256_hex
from tests.e2e.conftest import without_waiting
from tests.prefork import Process

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("simulate")]

Fedcore = Callable[..., subprocess.CompletedProcess[str]]
TINY = [
    *("--set", "federation.rounds=2", "--set", "client.epochs=1"),
    *("--set", "finetune.epochs=1", "--set", "compression.prune_epochs=1"),
    *("--set", "compression.timing_runs=100"),
]
SHORT = [
    *TINY,
    *("--set", "finetune.epochs=0"),
    *("--set", 'compression.candidates=["fp32", "int8_dynamic"]'),
]
KEYS = {
    *("rounds", "accuracy.federated", "accuracy.released", "target_delta", "epsilon.max"),
    *("bytes.up", "bytes.down", "model.fp32_bytes", "model.released_bytes"),
    *("latency.torch_p50_us", "latency.fp32_p50_us", "latency.released_p50_us"),
    *("release.version", "release.digest", "seconds.total"),
}


def simulate(fedcore: Fedcore, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    done = fedcore("simulate", "run.toml", *options, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def flat(values: dict[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{before}{name}.")
        else:
            yield before + name, value


def summary(results: Path) -> dict[str, Any]:
    return dict(flat(json.loads((results / "summary.json").read_text())))


def check_results(results: Path) -> None:
    """What every run leaves, and nothing half-written."""
    events = [json.loads(line) for line in (results / "metrics.jsonl").read_text().splitlines()]
    rounds = [event for event in events if event["event"] == "round_finished"]
    assert len(rounds) == 2
    assert "<svg" in (results / "report.html").read_text()
    assert list((results / "tensorboard").iterdir())
    assert not list(results.rglob(".*"))


@pytest.fixture(scope="module")
def trained(
    fedcore: Fedcore, fresh_fedcore: Fedcore, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Two private runs of one classification with the same seed, each published."""
    folder = tmp_path_factory.mktemp("work") / "cls"
    assert fedcore("new", folder, cwd=folder.parent).returncode == 0
    keys = ["--keys", folder / "keys", "--repository", folder / "repository"]
    assert fedcore("release", "init", *keys, cwd=folder).returncode == 0
    options = [
        *TINY,
        *("--set", "privacy.unit=example", "--set", "client.batch_size=1000"),
        *("--set", "finetune.max_metric_drop=1.0"),
        *("--set", "release.keys=keys", "--set", "release.repository=repository"),
    ]
    (folder / "said.txt").write_text(simulate(fedcore, folder, *options, "--runs", "one").stdout)
    lines = simulate(fedcore, folder, *options, "--runs", "two", "--json").stdout
    (folder / "lines.jsonl").write_text(lines)
    return folder


def test_a_whole_run_leaves_its_results(trained: Path) -> None:
    results = trained / "one" / "cls"
    check_results(results)
    found = summary(results)
    assert set(found) >= KEYS | {"accuracy.cloud_alone", "accuracy.finetuned"}
    assert found["rounds"] == 2
    assert 0 < found["epsilon.max"] <= 8
    assert found["release.version"] == 1
    assert summary(trained / "two" / "cls")["release.version"] == 2
    assert all(0 <= found[name] <= 1 for name in found if name.startswith("accuracy."))
    names = {path.name for path in (results / "candidates").iterdir()}
    assert names == {f"{name}.onnx" for name in DEFAULT_CANDIDATES}


def test_the_same_seed_gives_the_same_bytes(trained: Path) -> None:
    def digests(runs: str) -> dict[str, str]:
        results = trained / runs / "cls"
        files = [
            results / "global.safetensors",
            results / "finetuned.safetensors",
            *(results / "candidates").iterdir(),
        ]
        return {path.name: sha256_hex(path.read_bytes()) for path in files}

    assert digests("one") == digests("two")
    assert len(digests("one")) == 2 + len(DEFAULT_CANDIDATES)


def test_json_is_lines_of_json_alone_with_the_summary_last(trained: Path) -> None:
    events = [json.loads(line) for line in (trained / "lines.jsonl").read_text().splitlines()]
    assert all(event["event"] for event in events)
    last = events[-1]
    assert last.pop("event") == "summary"
    assert last == json.loads((trained / "two" / "cls" / "summary.json").read_text())


def test_piped_output_is_plain_lines(trained: Path) -> None:
    said = (trained / "said.txt").read_text()
    assert "\x1b" not in said
    assert "\r" not in said
    assert re.search(r"^round 1/2: accuracy 0\.\d+, epsilon \d", said, re.MULTILINE)
    assert said.splitlines()[-1] == "report: one/cls/report.html"


@pytest.mark.parametrize("kind", ["regression", "next_token"])
def test_other_kinds_of_tasks_run_through_too(kind: str, fedcore: Fedcore, tmp_path: Path) -> None:
    assert fedcore("new", "work", "--kind", kind, cwd=tmp_path).returncode == 0
    done = simulate(fedcore, tmp_path / "work", *SHORT)
    assert done.stderr == ""
    results = tmp_path / "work" / "runs" / "work"
    check_results(results)
    metric = "rmse" if kind == "regression" else "accuracy"
    found = summary(results)
    missing = KEYS - set(found) - {"release.version", "release.digest"}
    assert {name for name in missing if not name.startswith("accuracy.")} == set()
    assert found[f"{metric}.released"] > 0


@pytest.mark.parametrize("stage", ["federate", "finetune"])
def test_ctrl_c_ends_a_run_with_one_line_and_the_next_one_works(
    stage: str,
    fedcore: Fedcore,
    start: Callable[..., Process],
    tmp_path: Path,
) -> None:
    assert fedcore("new", "work", cwd=tmp_path).returncode == 0
    folder, results = tmp_path / "work", tmp_path / "work" / "runs" / "work"
    rounds = 100_000 if stage == "federate" else 1
    long = ["--set", f"federation.rounds={rounds}", "--set", "finetune.epochs=10000"]
    process = start("simulate", "run.toml", *long, "--set", "finetune.processes=2", cwd=folder)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(("round 3/", "[finetune] started")):
            break
    os.killpg(process.pid, signal.SIGINT)  # a terminal interrupts the children, too
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    *first, last = without_waiting(said).splitlines()
    assert last.startswith("Interrupted: `fedcore simulate run.toml --set federation.rounds=")
    assert last.endswith(" --resume` continues it.")
    assert len(first) == (stage == "federate")  # a round is finished first
    assert not (results / "summary.json").exists()
    assert not list(results.rglob(".*"))
    assert running(process.pid) == []
    if stage == "federate":
        refused = fedcore("simulate", "run.toml", *SHORT, cwd=folder)
        assert refused.returncode == 2
        assert (
            "continue with `fedcore simulate --resume`, or start over with --fresh"
            in refused.stderr
        )
        simulate(fedcore, folder, "--fresh", *SHORT)
        check_results(results)


def test_fine_tuning_does_not_outlive_a_killed_run(
    fedcore: Fedcore, start: Callable[..., Process], tmp_path: Path
) -> None:
    assert fedcore("new", "work", cwd=tmp_path).returncode == 0
    long = ["--set", "federation.rounds=1", "--set", "finetune.epochs=10000"]
    process = start(
        "simulate", "run.toml", *long, "--set", "finetune.processes=2", cwd=tmp_path / "work"
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("[finetune] started"):
            break
    wait_until(lambda: len(trainers(process.pid)) == 2)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(timeout=60)
    wait_until(lambda: running(process.pid) == [])


def trainers(session: int) -> list[str]:
    return [line for line in running(session) if "spawn_main" in line]


def wait_until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def running(session: int) -> list[str]:
    """What still runs of a session; zombies wait for whoever adopted them."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            line = (folder / "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(line.replace(b"\0", b" ").decode())
    return found
