"""fedcore as a library: a simulation as a call, again and again in one process."""

from __future__ import annotations

import dataclasses
import gc
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import fedcore
from fedcore.task.definition import Examples

QUICK = {"compression": {"timing_runs": 100, "candidates": ("fp32",)}}


def made(seed: int) -> Examples:
    rng = torch.Generator().manual_seed(seed)
    inputs = torch.randn(120, 6, generator=rng)
    return TensorDataset(inputs, (inputs[:, 0] > 0).long() + (inputs[:, 1] > 0).long())  # type: ignore[return-value]


def task_of(*, cloud: bool = False) -> fedcore.Task:
    return fedcore.Task(
        name="corners",
        kind="classification",
        model=lambda: nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)),
        clients=lambda folder: ["a", "b", "c", "d"],
        client_data=lambda client, folder: made(ord(client)),
        cloud_data=(lambda folder: made(1)) if cloud else None,
        test_data=lambda folder: made(2),
        example_input=torch.zeros(6),
    )


def test_a_task_made_in_memory_runs_and_gives_its_results(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    federation = {"rounds": 6, "evaluate_cohort": 4, "holdout": 0.2}
    client = {"learning_rate": 0.5}
    result = fedcore.simulate(task_of(), federation=federation, client=client, seed=4, **QUICK)
    assert capfd.readouterr().out == ""
    rows = result.history.rows()
    assert [row["round"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[-1]["accuracy"] > rows[0]["accuracy"]
    assert result.metrics["accuracy"]["released"] > 0.7
    assert {one.client for one in result.clients} == {"a", "b", "c", "d"}
    with torch.inference_mode():
        assert result.model(torch.zeros(2, 6)).shape == (2, 3)
    assert "<svg" in result._repr_html_()
    saved = result.save(tmp_path / "kept")
    folder = result.folder
    del result
    gc.collect()
    assert (saved / "report.html").is_file()
    assert not folder.exists()


def test_the_same_seed_gives_the_same_model_as_the_command_line(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    task = Path(__file__).parents[2] / "examples/digits/task.py"
    (tmp_path / "run.toml").write_text(
        f'name = "digits"\ntask = "{task}"\nseed = 3\n[federation]\nrounds = 2\n'
        '[simulation]\ntraining = "vectorised"\nworkers = 1\n'
        '[compression]\ntiming_runs = 100\ncandidates = ["fp32"]\n'
    )
    how = {"training": "vectorised", "workers": 1}  # else each run chooses what is quicker
    settings = {"federation": {"rounds": 2}, "simulation": how, "seed": 3, **QUICK}
    result = fedcore.simulate(
        task, runs=tmp_path / "api", name="digits", progress=False, **settings
    )
    run = request.getfixturevalue("fedcore")
    done = run("simulate", "run.toml", "--runs", "command", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name in ("global.safetensors", "finetuned.safetensors"):
        found = [(tmp_path / each / "digits" / name) for each in ("command", "api")]
        assert found[0].exists() == found[1].exists()
        assert not found[0].exists() or found[0].read_bytes() == found[1].read_bytes()
    assert result.folder == tmp_path / "api/digits"


def test_a_run_that_was_interrupted_is_dropped_only_when_told(tmp_path: Path) -> None:
    reads = 0

    def interrupted(client: str, folder: Path | None) -> Examples:
        nonlocal reads
        reads += 1
        if reads == 2 * 4 + 2 * 4 + 2:  # in the third round; all were read twice before the first
            raise KeyboardInterrupt
        return made(ord(client))

    simulation = {"workers": 1, "training": "loop"}
    settings = {"federation": {"rounds": 3}, "simulation": simulation, **QUICK}
    task = dataclasses.replace(task_of(), client_data=interrupted)
    with pytest.raises(KeyboardInterrupt):
        fedcore.simulate(task, runs=tmp_path, progress=False, **settings)
    with pytest.raises(fedcore.FedcoreError, match=r"interrupted after round \d.*fresh=True"):
        fedcore.simulate(task, runs=tmp_path, progress=False, **settings)
    for _ in range(2):  # an interrupted run, then a complete one
        result = fedcore.simulate(task, runs=tmp_path, fresh=True, progress=False, **settings)
        assert len(result.history.rounds) == 3
    with pytest.raises(fedcore.FedcoreError, match=r"this run is complete.*fresh=True"):
        fedcore.simulate(task, runs=tmp_path, progress=False, **settings)
    assert [path.name for path in tmp_path.iterdir()] == ["corners"]


def test_mistakes_are_typed_errors() -> None:
    with pytest.raises(fedcore.FedcoreError, match=r"federation\.round"):
        fedcore.simulate(task_of(), federation={"round": 3})
    with pytest.raises(fedcore.FedcoreError, match=r"federation\.rounds=0"):
        fedcore.simulate(task_of(), federation={"rounds": 0})
    with pytest.raises(fedcore.FedcoreError, match="was created in memory"):
        fedcore.simulate(task_of(cloud=True), finetune={"processes": 2})
    with pytest.raises(fedcore.FedcoreError, match="does not exist"):
        fedcore.simulate("nowhere.py")


SCRIPT = """
import fedcore
result = fedcore.simulate(
    "digits.py", federation={"rounds": 1}, finetune={"epochs": 1, "processes": 2},
    simulation={"workers": 2}, compression={"timing_runs": 100, "candidates": ("fp32",)},
    progress=False,
)
print(sorted(result.metrics["accuracy"]))
"""


@pytest.mark.parametrize("how", ["script", "standard input"])
def test_a_script_needs_no_guard_against_being_run_again(tmp_path: Path, how: str) -> None:
    shutil.copy(Path(__file__).parents[2] / "examples/digits/task.py", tmp_path / "digits.py")
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "script.py" if how == "script" else "-"],
        cwd=tmp_path,
        input=SCRIPT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "['cloud_alone', 'federated', 'finetuned', 'released']\n"
    assert done.stderr == ""


SWEEP = """
import gc, os, re
from pathlib import Path

def used():
    gc.collect()
    memory = int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
    listings = Path("/proc/self/task").glob("*/children")
    children = sum(len(listing.read_text().split()) for listing in listings)
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "processes": children,
        "threads": len(os.listdir("/proc/self/task")),
        "memory": memory,
    }

def sweep():
    found = []
    for rate in (0.01, 0.03, 0.1, 0.3, 1.0):
        result = fedcore.simulate(
            task, federation={"rounds": 3}, client={"learning_rate": rate},
            finetune={"epochs": 1}, simulation={"workers": 2}, progress=False, **quick,
        )
        found.append(result.metrics["accuracy"])
    return found
"""
LEAKS = """
one = sweep()  # loads and caches what every later one uses
before = used()
assert sweep() == one
after = used()
print(before, after)
for what, count in after.items():
    assert count <= 1.05 * before[what], what
print("nothing leaks")
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="Linux tells what a process holds")
def test_a_sweep_leaves_nothing_behind() -> None:
    root = Path(__file__).parents[2]
    made = "import fedcore\nfrom tests.e2e.test_api import QUICK as quick, task_of\n"
    code = f"{made}task = task_of(cloud=True)\n{SWEEP}{LEAKS}"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
