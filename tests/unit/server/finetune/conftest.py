"""Processes that train together, forked from this one: they start in milliseconds."""

from __future__ import annotations

import argparse
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import TensorDataset

from fedcore.config.run import RunConfig
from fedcore.config.settings import load_run
from fedcore.seeds import kept_streams
from fedcore.task.definition import Examples, Task, load_task
from fedcore.task.model import FullModel, build_model, checkpoint_bytes
from server.commands import finetune
from server.finetune.control import ALONE, make_group
from server.finetune.curve import Curve
from server.finetune.loop import train_start

Grouped = Callable[..., list[Any]]
EXAMPLES = 44


def make_examples(count: int = EXAMPLES) -> Examples:
    rng = torch.Generator().manual_seed(1)
    targets = torch.arange(count) % 3
    inputs = nn.functional.one_hot(targets, 5) + 0.5 * torch.randn(count, 5, generator=rng)
    return TensorDataset(inputs, targets)  # type: ignore[return-value]


def make_task(loss: object = None, width: int = 8, model: object = None) -> Task:
    return Task(
        name="tiny",
        kind="classification",
        model=model  # type: ignore[arg-type]
        or (
            lambda: nn.Sequential(
                nn.Linear(5, width),
                nn.BatchNorm1d(width),
                nn.Dropout(0.2),
                nn.ReLU(),
                nn.Linear(width, 3),
            )
        ),
        clients=lambda folder: ["anna"],
        client_data=lambda client, folder: make_examples(),
        example_input=torch.zeros(5),
        loss=loss,  # type: ignore[arg-type]
    )


def make_run(**settings: Any) -> RunConfig:
    finetune = {"epochs": 3, "batch_size": 8, "optimizer": "adamw", "learning_rate": 0.01}
    return RunConfig.model_validate(
        {"name": "run", "task": "task.py", "seed": 3, "finetune": finetune | settings}
    )


def trained_here(
    run: RunConfig,
    task: Task | None = None,
    *,
    rank: int = 0,
    world: int = 1,
    remember: float = 0.0,
    **given: Any,
) -> tuple[FullModel, Curve]:
    """Trains a new model in this process, and returns it with its course."""
    task = task or make_task()
    curve, model, device = Curve(), build_model(task, run), torch.device("cpu")
    with kept_streams():
        train_start(
            model,
            task,
            make_examples(),
            run,
            device,
            remember=remember,
            group=make_group(device) if world > 1 else ALONE,
            curve=curve if rank == 0 else None,
            **given,
        )
    return model, curve


def _serve(rank: int, world: int, store: str, work: Callable[..., Any], sent: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=60),
        )
        sent.send((True, work(rank, world)))
    except BaseException as error:  # the test sees it
        sent.send((False, error))
    os._exit(0)


@contextmanager
def forked(world: int, work: Callable[[int, int], Any]) -> Iterator[list[Any]]:
    """Yields the processes of a group and the ends of their pipes, and kills them at the end."""
    context, started = get_context("fork"), []
    with tempfile.TemporaryDirectory() as folder:
        for rank in range(world):
            here, there = context.Pipe(duplex=False)
            arguments = (rank, world, f"{folder}/store", work, there)
            process = context.Process(target=_serve, args=arguments)
            process.start()
            there.close()
            started.append((process, here))
        try:
            yield started
        finally:
            for process, here in started:
                process.kill()
                process.join()
                here.close()


@pytest.fixture
def in_group() -> Grouped:
    def run(world: int, work: Callable[[int, int], Any]) -> list[Any]:
        with forked(world, work) as started:
            found = [here.recv() for _, here in started]
        for good, value in found:
            if not good:
                raise value
        return [value for _, value in found]

    return run


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints" / "this-training"


COMMAND_TASK = """
import torch
from torch import nn
from torch.utils.data import TensorDataset
from fedcore import Task

rng = torch.Generator().manual_seed(0)
targets = torch.randint(3, (90,), generator=rng)
data = TensorDataset(nn.functional.one_hot(targets, 5).float(), targets)
task = Task(
    name="tiny",
    kind="classification",
    model=lambda: nn.Linear(5, 3),
    clients=lambda folder: ["anna"],
    client_data=lambda client, folder: data,
    cloud_data=lambda folder: data,
    example_input=torch.zeros(5),
)
"""


def command(folder: Path, *more: str) -> int:
    parser = argparse.ArgumentParser()
    finetune.arguments(parser)  # type: ignore[misc]
    given = [str(folder / "run.toml"), "--runs", str(folder / "runs"), *more]
    return int(finetune.run(parser.parse_args(given)))  # type: ignore[misc]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "task.py").write_text(COMMAND_TASK)
    text = 'name = "run"\ntask = "task.py"\n[finetune]\nepochs = 3\ncheckpoints = "kept"\n'
    (tmp_path / "run.toml").write_text(text)
    start = build_model(load_task(tmp_path / "task.py"), load_run(tmp_path / "run.toml", []))
    (tmp_path / "runs" / "run").mkdir(parents=True)
    (tmp_path / "runs" / "run" / "global.safetensors").write_bytes(checkpoint_bytes(start))
    return tmp_path
