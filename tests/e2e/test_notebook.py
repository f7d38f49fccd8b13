"""fedcore in a Jupyter kernel: tasks of a cell, workers, progress, and sweeps."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest

from tests.e2e.test_api import LEAKS, SWEEP

ROOT = Path(__file__).parents[2]
TASK = """
import torch
from torch import nn
from torch.utils.data import TensorDataset

import fedcore


def made(seed):
    rng = torch.Generator().manual_seed(seed)
    inputs = torch.randn(120, 6, generator=rng)
    return TensorDataset(inputs, (inputs[:, 0] > 0).long() + (inputs[:, 1] > 0).long())


task = fedcore.Task(
    name="corners",
    kind="classification",
    model=lambda: nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)),
    clients=lambda folder: ["a", "b", "c", "d"],
    client_data=lambda client, folder: made(ord(client)),
    cloud_data=lambda folder: made(1),
    test_data=lambda folder: made(2),
    example_input=torch.zeros(6),
)
quick = {"compression": {"timing_runs": 100, "candidates": ("fp32",)}}
"""
RUN = """
result = fedcore.simulate(
    task, federation={"rounds": 50}, finetune={"epochs": 1}, simulation={"workers": 2}, **quick
)
result
"""
REFUSED = """
try:
    fedcore.simulate(task, finetune={"processes": 2})
except fedcore.FedcoreError as error:
    print(error)
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs cells in a kernel, and gives the outputs of each."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))

    def execute(*cells: str) -> list[list[Any]]:
        notebook = nbformat.v4.new_notebook(cells=[*map(nbformat.v4.new_code_cell, cells)])
        where = {"metadata": {"path": str(tmp_path)}}
        nbclient.NotebookClient(notebook, timeout=250, resources=where).execute()
        return [cell.outputs for cell in notebook.cells]

    return execute


@pytest.mark.slow
def test_a_task_of_a_cell_is_trained_by_workers_and_fine_tuned(run: Any) -> None:
    _, shown, frame, refused = run(TASK, RUN, "result.history.to_pandas()", REFUSED)
    progress, result = shown  # one output is kept up to date, however many rounds there are
    text = progress.data["text/plain"]
    assert "by 2 workers" in text
    assert "[finetune] done in" in text
    assert "50/50" in text
    assert len(text.splitlines()) < 20
    assert "<svg" in result.data["text/html"]
    assert result.data["text/plain"].startswith("<Result 'corners': 50 rounds; accuracy:")
    assert "accuracy" in frame[0].data["text/html"]
    assert "finetune.processes = 2: this starts processes" in refused[0].text


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="Linux tells what a process holds")
def test_a_sweep_in_a_kernel_leaves_nothing_behind(run: Any) -> None:
    *_, told = run(TASK, SWEEP, LEAKS)
    assert told[-1].text.endswith("nothing leaks\n")
