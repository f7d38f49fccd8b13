"""One of two processes that fine-tune is killed again and again, at random times.

::

    python -m tests.campaign.finetune_kills --kills 20 --out runs/campaign/finetune_kills.json

Each job is one call of `fine_tune` with checkpoints, whose processes torchrun starts again after a
kill. Kills fall between loading the task and the end of training, within checkpoints and restarts,
too. Every job must end by itself with the losses, step by step, of a job that nobody disturbs.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedcore.config.run import RunConfig
from fedcore.errors import FedcoreError
from fedcore.task.definition import load_task
from fedcore.task.model import build_model
from fedcore.updates.pack import pack
from server.cloud import read_cloud_data
from server.finetune.launch import Finetuned, fine_tune
from tests.campaign.kills import run_kills

TASK = """
import os
import time
from pathlib import Path
import torch
from torch import nn
from torch.utils.data import TensorDataset
from fedcore import Task

rng = torch.Generator().manual_seed(0)
targets = torch.randint(3, (120,), generator=rng)
inputs = nn.functional.one_hot(targets, 5) + 0.3 * torch.randn(120, 5, generator=rng)
data = TensorDataset(inputs, targets)
RANK = os.environ.get("RANK")  # set in the processes that fine-tune
if RANK:
    alive = Path(__file__).with_name(f"alive-{RANK}")
    alive.with_suffix(".new").write_text(str(os.getpid()))
    alive.with_suffix(".new").replace(alive)


def loss(outputs, targets):
    if RANK:
        time.sleep(0.005)  # so that most of the time there is something to lose
    return nn.functional.cross_entropy(outputs, targets)


task = Task(
    name="killed",
    kind="classification",
    model=lambda: nn.Sequential(
        nn.Linear(5, 32), nn.BatchNorm1d(32), nn.Dropout(0.2), nn.ReLU(), nn.Linear(32, 3)
    ),
    clients=lambda folder: ["anna"],
    client_data=lambda client, folder: data,
    cloud_data=lambda folder: data,
    test_data=lambda folder: data,
    example_input=torch.zeros(5),
    loss=loss,
)
"""
MOST_GAP = 1e-6
_KILLS_A_JOB = 5
_LONGEST_WAIT_S = 4.0
_LOOK_S = 0.01


@dataclass
class Killer:
    """Kills one process of a job after the other, each in another pair that was started."""

    folder: Path
    kills: int
    rng: random.Random
    done: int = 0
    ended: threading.Event = field(default_factory=threading.Event)

    def kill(self) -> None:
        """Kills until the job has ended, or often enough."""
        killed = set[int]()
        while self.done < self.kills and not self.ended.is_set():
            found = [self._process(rank) for rank in range(2)]
            if None in found or killed & set(found):
                time.sleep(_LOOK_S)
                continue
            if self.ended.wait(self.rng.uniform(0, _LONGEST_WAIT_S)):
                return
            chosen = self.rng.choice([number for number in found if number is not None])
            # The other one is ended by torchrun: both are of an attempt that is over.
            killed |= {number for number in found if number is not None}
            with suppress(ProcessLookupError):
                os.kill(chosen, signal.SIGKILL)
                self.done += 1

    def _process(self, rank: int) -> int | None:
        path = self.folder / f"alive-{rank}"
        return int(path.read_text()) if path.exists() else None


def one_job(folder: Path, kills: int, rng: random.Random) -> tuple[Finetuned, int]:
    """Fine-tunes a model, and kills processes meanwhile; returns the result and how many."""
    folder.mkdir()
    (folder / "task.py").write_text(TASK)
    settings: dict[str, Any] = {
        "epochs": 60,
        "batch_size": 32,
        "learning_rate": 0.05,
        "processes": 2,
        "checkpoints": "kept",
        "checkpoint_steps": 7,
        "max_restarts": 10 * _KILLS_A_JOB,
    }
    values = {"name": "killed", "task": "task.py", "finetune": settings}
    run = RunConfig.model_validate(values).model_copy(update={"base": folder})
    task = load_task(folder / "task.py")
    cloud = read_cloud_data(task, None, holdout=run.finetune.holdout, seed=0)
    assert cloud is not None
    killer = Killer(folder, kills, rng)
    thread = threading.Thread(target=killer.kill)
    thread.start()
    try:
        found = fine_tune(task, run, build_model(task, run).eval(), cloud)
    finally:
        killer.ended.set()
        thread.join()
    return found, killer.done


def kill_often(root: Path, kills: int, *, seed: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Runs jobs until so many processes were killed."""
    rng, started = random.Random(seed), time.monotonic()
    whole, _ = one_job(root / "whole", 0, rng)
    done, jobs, equal, gaps, wrong = 0, 0, 0, list[float](), list[str]()
    while done < kills and len(wrong) < 3:
        asked = min(_KILLS_A_JOB, kills - done)
        jobs += 1
        try:
            found, killed = one_job(root / f"job-{jobs}", asked, rng)
        except FedcoreError as error:
            wrong.append(f"job {jobs} failed: {error}")
            continue
        done += killed
        if len(found.curve) == len(whole.curve):
            gaps.append(max(abs(a - b) for a, b in zip(found.curve, whole.curve, strict=True)))
        if len(found.curve) != len(whole.curve) or not gaps[-1] <= MOST_GAP:
            wrong.append(f"job {jobs}: the losses differ from those of the undisturbed one")
        equal += pack(found.candidate.model).tobytes() == pack(whole.candidate.model).tobytes()
        say(f"{done} of {kills} kills, {jobs} jobs")
    return {
        "kills": done,
        "jobs": jobs,
        "steps": len(whole.curve),
        "largest_gap_of_losses": max(gaps, default=None),
        "jobs_with_equal_bits": equal,
        "wrong": wrong,
        "seconds": round(time.monotonic() - started, 1),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the campaign; 1 if anything went wrong."""
    return run_kills(
        kill_often,
        name="finetune_kills",
        description=__doc__,
        kills=20,
        faults="wrong",
        arguments=arguments,
    )


if __name__ == "__main__":
    sys.exit(main())
