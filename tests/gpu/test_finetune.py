"""Fine-tuning on an NVIDIA GPU: every way to compute learns what the CPU learns."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fedcore.config.finetune import Finetune
from fedcore.config.settings import load_run
from fedcore.seeds import kept_streams
from fedcore.task.definition import Task, load_task
from fedcore.task.model import build_model, checkpoint_bytes, load_checkpoint
from server.finetune.agent import launch
from server.finetune.control import make_group
from server.finetune.curve import Curve
from server.finetune.job import Job, trained
from server.finetune.loading import loaded
from server.finetune.loop import train_start
from server.finetune.parallel import device_of, distributed
from server.finetune.sharding import whole_state
from tests.unit.server.finetune.conftest import make_examples, make_run, make_task

pytestmark = pytest.mark.gpu
# The CPU where there is no GPU: then these tests are skipped, and run by hand they still check.
DEVICE = device_of(0)
DIGITS = Path(__file__).parents[2] / "examples" / "digits" / "run.toml"


def task() -> Task:
    """Without dropout, whose masks are drawn otherwise on a GPU."""
    return make_task(
        model=lambda: nn.Sequential(
            *(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
        )
    )


def trained_on(device: torch.device, **settings: Any) -> tuple[Tensor, tuple[float, ...]]:
    run, curve = make_run(epochs=12, **settings), Curve()
    model = build_model(task(), run).to(device)
    with kept_streams():
        train_start(model, task(), make_examples(), run, device, remember=0.0, curve=curve)
    return nn.utils.parameters_to_vector(model.parameters()).detach().cpu(), curve.losses


@pytest.mark.parametrize(
    ("settings", "most"),
    [
        ({}, 1e-3),
        ({"prefetch": 2, "fused": True}, 1e-3),
        ({"compile": True}, 1e-3),
        ({"accumulate_steps": 2, "activation_checkpointing": True}, None),
        ({"precision": "bf16"}, 0.15),
        ({"precision": "fp16"}, 0.15),
        ({"precision": "bf16", "compile": True, "prefetch": 2, "fused": True}, 0.15),
    ],
    ids=lambda value: "-".join(value) or "plain" if isinstance(value, dict) else "",
)
def test_a_way_to_compute_has_the_losses_of_the_cpu(
    settings: dict[str, Any], most: float | None
) -> None:
    weights, losses = trained_on(DEVICE, **settings)
    again, _ = trained_on(DEVICE, **settings)
    assert torch.equal(weights, again)
    assert sum(losses[-6:]) < sum(losses[:6]) / 2  # an epoch each
    if most is not None:  # batch normalisation sees parts of a batch otherwise than the whole
        _, exact = trained_on(torch.device("cpu"))
        assert len(losses) == len(exact)
        assert max(abs(a - b) for a, b in zip(losses, exact, strict=True)) < most


def test_batches_that_are_copied_from_pinned_memory_are_the_same_ones() -> None:
    examples, parts = make_examples(), list(torch.arange(44).split(4))
    plain = list(loaded(examples, parts, torch.device("cpu"), ahead=0))
    ahead = list(loaded(examples, parts, DEVICE, ahead=3))
    assert len(plain) == len(ahead) == 11
    for (inputs, targets), (moved, labels) in zip(plain, ahead, strict=True):
        assert moved.device.type == labels.device.type == DEVICE.type
        assert torch.equal(inputs, moved.cpu())
        assert torch.equal(targets, labels.cpu())


@pytest.fixture
def lone_group(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone, over NCCL where there is a GPU."""
    backend = "nccl" if DEVICE.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.usefixtures("lone_group")
@pytest.mark.parametrize(
    ("settings", "most"),
    [({}, 1e-6), ({"shard": "always"}, 1e-6), ({"communication": "bf16"}, 1e-2)],
    ids=["ddp", "fsdp2", "bf16-gradients"],
)
def test_a_step_in_a_group_is_the_step_without_one(settings: dict[str, Any], most: float) -> None:
    inputs, targets = (each.to(DEVICE) for each in make_examples().tensors)  # type: ignore[attr-defined]
    found, notes = [], list[str]()
    for grouped in (False, True):
        torch.manual_seed(0)
        model: nn.Module = task().model().to(DEVICE)
        called = model
        if grouped:
            asked, group = Finetune(**settings), make_group(DEVICE)
            called = distributed(model, asked, group, DEVICE, unused=False, note=notes.append)
        nn.functional.cross_entropy(called(inputs), targets).backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        found.append(torch.cat([each.flatten().float() for each in whole_state(model).values()]))
    assert torch.allclose(*found, atol=most)
    assert bool(notes) == ("shard" in settings)


@pytest.mark.timeout(600)  # a process that imports torch
def test_a_process_that_torchrun_starts_trains_as_this_one(tmp_path: Path) -> None:
    settings = ["finetune.epochs=1", "finetune.precision=bf16", "finetune.prefetch=2"]
    run = load_run(DIGITS, settings)
    digits = load_task(run.path(run.task))
    start = tmp_path / "start.safetensors"
    start.write_bytes(checkpoint_bytes(build_model(digits, run)))
    one = run.finetune.model_copy(update={"processes": 1})
    run = run.model_copy(update={"finetune": one})
    job = Job(
        run=run.model_dump_json(),
        base=str(run.base),
        starts=(str(start),),
        folder=str(tmp_path),
        models=("finetuned",),
        places=(None,),
    )
    assert "RANK" not in os.environ
    launch(job)
    model = build_model(digits, run)
    load_checkpoint(trained(start).read_bytes(), model, where="the result")
    assert trained(start).read_bytes() != start.read_bytes()
    losses = Curve(job.curve_file(0)).losses
    assert losses[-1] < losses[0]
