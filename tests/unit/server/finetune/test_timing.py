"""Timing of steps in real processes: slow, for each of them imports torch."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from fedcore.config.settings import load_run
from fedcore.errors import TrainingError
from server.finetune.timing import timing_processes

pytestmark = pytest.mark.slow


@pytest.mark.timeout(300)  # two processes import torch
def test_processes_time_and_cost_and_are_replaced_when_one_is_killed(folder: Path) -> None:
    run = load_run(folder / "run.toml")
    two = run.finetune.model_copy(update={"processes": 2})
    start = (folder / "runs" / "run" / "global.safetensors").read_bytes()
    with timing_processes(run, start) as processes:
        timed, costs = processes.time_and_cost(two, window_s=0.1, limit_s=120.0)
        assert (timed.processes, len(timed.busy_s), timed.fits) == (2, 2, True)
        assert timed.examples_per_s > timed.steps / timed.seconds
        assert timed.peak_bytes > 100 << 20
        assert costs.parameters == 18
        assert costs.flops_per_example == 2 * 2 * 5 * 3
        assert costs.all_reduce_s is not None
        pids = [process.pid or 0 for process, _ in processes._started]
        alone = processes.time(run.finetune, window_s=0.1, limit_s=120.0)
        assert alone.processes == 1
        assert [process.pid for process, _ in processes._started] == pids  # still the same
        with pytest.raises(TrainingError, match=r"no second step|timeout_s"):
            processes.time(run.finetune, window_s=9.0, limit_s=0.001)
        os.kill(pids[0], signal.SIGKILL)
        with pytest.raises(TrainingError, match="without giving a reason"):
            processes.time(run.finetune, window_s=0.1, limit_s=120.0)
        assert not processes._started
    for pid in pids:
        assert not Path(f"/proc/{pid}").exists()
