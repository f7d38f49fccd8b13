"""Training that is interrupted and continues, in this process and in groups of forked ones."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedcore.errors import DataError, DiskFull, ResourceError, TrainingDiverged
from fedcore.task.model import checkpoint_bytes
from server.finetune import checkpoints
from tests.unit.server.finetune.conftest import (
    EXAMPLES,
    Grouped,
    forked,
    make_run,
    make_task,
    trained_here,
)

STEPS = 3 * -(-EXAMPLES // 8)


def after(steps: int) -> Any:
    """Returns a request to stop that comes once it was asked for so many times."""
    asked = iter(range(10**6))
    return lambda: next(asked) >= steps - 1


def stopped(run: Any, place: Path, steps: int, **given: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        trained_here(run, place=place, stop=after(steps), **given)


def unreadable(loss: Tensor) -> Tensor:
    return loss * float("nan")


@pytest.fixture(autouse=True)
def _each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has processes talk after each step, so that a request to stop comes where a test wants it."""
    monkeypatch.setattr("server.finetune.control.MOST_STEPS", 1)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_training_that_was_stopped_ends_with_the_same_bits(place: Path, optimizer: str) -> None:
    """Dropout, batch statistics, moments, NumPy's and Python's streams: all of it continues."""

    def noisy(outputs: Tensor, targets: Tensor) -> Tensor:
        loss = nn.functional.cross_entropy(outputs, targets)
        return loss * (1 + 0.1 * float(np.random.normal()) + 0.1 * random.random())

    task, run = make_task(noisy), make_run(optimizer=optimizer, checkpoint_steps=4)
    np.random.seed(1), random.seed(1)
    whole, curve = trained_here(run, task)
    np.random.seed(1), random.seed(1)
    for steps in (1, 4, 7):
        stopped(run, place, steps, task=task)
    found, resumed = trained_here(run, task, place=place)
    assert checkpoint_bytes(found) == checkpoint_bytes(whole)
    assert resumed.losses == curve.losses[-len(resumed.losses) :]
    assert len(resumed.losses) == STEPS - 12
    assert sorted(path.name for path in place.iterdir()) == [
        f"step-{number:010d}" for number in (STEPS - 2, STEPS)
    ]


def test_a_group_continues_as_another_number_of_processes(place: Path, in_group: Grouped) -> None:
    """Two, then one, then two: without dropout and batch statistics, only rounding differs."""
    task = make_task(model=lambda: nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)))
    run = make_run(checkpoint_steps=100)

    def train(rank: int, world: int, steps: int | None = None) -> Any:
        stop = after(steps) if steps else None
        try:
            found, curve = trained_here(run, task, rank=rank, world=world, place=place, stop=stop)
        except KeyboardInterrupt:
            return None
        return checkpoint_bytes(found), curve.losses

    whole, curve = trained_here(run, task)
    assert in_group(2, lambda rank, world: train(rank, world, 5)) == [None, None]
    stopped(run, place, 3, task=task)
    (first, losses), (second, _) = in_group(2, train)
    assert first == second
    assert np.allclose(losses, curve.losses[8:], atol=1e-5)
    again, _ = trained_here(run, task, place=place)  # nothing is left to do
    assert checkpoint_bytes(again) == first
    for one, other in zip(again.parameters(), whole.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_a_killed_group_continues_with_the_same_bits(place: Path, in_group: Grouped) -> None:
    run = make_run(checkpoint_steps=2)

    def train(rank: int, world: int, kill: int = -1) -> Any:
        def look() -> bool:
            if next(steps) == kill and rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return False

        steps = iter(range(10**6))
        found, curve = trained_here(run, rank=rank, world=world, place=place, stop=look)
        return checkpoint_bytes(found), curve.losses

    whole = in_group(2, lambda rank, world: train(rank, world))
    for path in place.iterdir():
        checkpoints.remove(path)
    for kill in (3, 2, 6):
        with forked(2, partial(train, kill=kill)) as started:
            _, here = started[0]
            good, error = here.recv()
            assert not good
            assert "gloo" in str(error)
            with pytest.raises(EOFError):
                started[1][1].recv()
    (bits, losses), _ = in_group(2, train)
    assert bits == whole[0][0]
    assert losses == whole[0][1][-len(losses) :]


def test_a_loss_that_is_not_finite_goes_back_and_lowers_the_rate(place: Path) -> None:
    calls = iter(range(1, 10**6))

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        value = nn.functional.cross_entropy(outputs, targets)
        return unreadable(value) if next(calls) == 7 else value

    run = make_run(checkpoint_steps=4)
    found, curve = trained_here(run, make_task(loss), place=place)
    assert all(torch.isfinite(each).all() for each in found.parameters())
    assert len(curve.losses) == STEPS
    assert next(calls) == STEPS + 3 + 1  # steps 5, 6 and 7 came twice
    described = json.loads((place / f"step-{STEPS:010d}" / "checkpoint.json").read_text())
    assert described["position"]["rate_scale"] == 0.5
    assert described["position"]["rollbacks"] == 1


def test_weights_that_are_not_finite_are_not_saved(place: Path) -> None:
    """A gradient is NaN where the loss is not: the checkpoint after that step would be useless."""

    class Hole(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
            return grad * float("nan")

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        value = nn.functional.cross_entropy(outputs, targets)
        return Hole.apply(value) if next(calls) == 4 else value  # type: ignore[no-any-return]

    calls = iter(range(1, 10**6))
    found, curve = trained_here(make_run(checkpoint_steps=4), make_task(loss), place=place)
    assert all(torch.isfinite(each).all() for each in found.parameters())
    assert len(curve.losses) == STEPS


def test_training_that_never_recovers_ends_with_the_reason(place: Path) -> None:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return unreadable(nn.functional.cross_entropy(outputs, targets))

    with pytest.raises(TrainingDiverged, match=r"after 2 rollbacks: .*learning_rate 0\.0025"):
        trained_here(make_run(max_rollbacks=2), make_task(loss), place=place)


@pytest.fixture
def begun(place: Path) -> Iterator[tuple[Any, Path]]:
    """A training that was stopped after the sixth step, and its newest checkpoint."""
    run = make_run(checkpoint_steps=4)
    stopped(run, place, 6)
    return run, place / f"step-{6:010d}"


def test_a_checkpoint_with_a_changed_byte_is_refused(begun: tuple[Any, Path], place: Path) -> None:
    run, newest = begun
    file = next(newest.glob("*.safetensors"))
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with pytest.raises(DataError, match=r"is corrupt: .*Nothing was trained; remove this folder"):
        trained_here(run, place=place)
    checkpoints.remove(newest)
    trained_here(run, place=place)  # from the one before


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda newest: next(newest.glob("*.safetensors")).unlink(), "is incomplete: missing"),
        (lambda newest: (newest / "more.safetensors").write_bytes(b""), "is incomplete"),
        (lambda newest: (newest / "checkpoint.json").unlink(), "does not exist"),
        (lambda newest: (newest / "checkpoint.json").write_text("[1]"), "not the description"),
        (lambda newest: (newest / "checkpoint.json").write_text("{"), "not the description"),
    ],
)
def test_an_incomplete_checkpoint_is_refused(
    begun: tuple[Any, Path], place: Path, harm: Any, told: str
) -> None:
    run, newest = begun
    harm(newest)
    with pytest.raises(DataError, match=told):
        trained_here(run, place=place)


def test_a_checkpoint_of_another_training_or_model_is_refused(
    begun: tuple[Any, Path], place: Path
) -> None:
    run, _newest = begun
    other = place.with_name("another-training")
    place.rename(other)
    with pytest.raises(DataError, match="belongs to another training"):
        trained_here(run, place=other)
    other.rename(place)
    with pytest.raises(DataError, match=r"another model: .*other shapes \['model.model.0.bias'"):
        trained_here(run, make_task(width=9), place=place)


def test_a_checkpoint_that_a_kill_left_unfinished_is_ignored(
    begun: tuple[Any, Path], place: Path
) -> None:
    run, _newest = begun
    left = place / f"step-{8:010d}.partial"
    left.mkdir()
    (left / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"half")
    whole, _ = trained_here(run)
    assert checkpoint_bytes(trained_here(run, place=place)[0]) == checkpoint_bytes(whole)
    assert not left.exists()


def test_a_full_disk_leaves_the_checkpoint_before(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, written = make_run(checkpoint_steps=4), iter(range(10**6))
    fsync = os.fsync

    def full(descriptor: int) -> None:
        if next(written) >= 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        with pytest.raises(DiskFull, match=r"step-0000000004: the disk has no room"):
            trained_here(run, place=place)
    assert [path.name for path in place.iterdir()] == [f"step-{0:010d}"]
    whole, _ = trained_here(run)
    assert checkpoint_bytes(trained_here(run, place=place)[0]) == checkpoint_bytes(whole)


def test_a_folder_that_is_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="cannot write this file"):
        trained_here(make_run(), place=tmp_path / "file" / "x")


def test_nothing_is_unpickled(begun: tuple[Any, Path]) -> None:
    _, newest = begun
    kinds = {path.suffix for path in newest.iterdir()}
    assert kinds == {".safetensors", ".json"}
