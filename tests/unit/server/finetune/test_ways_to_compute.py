"""Settings that change how a step is computed: results stay what they should be."""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fedcore.config.finetune import Finetune
from fedcore.errors import ConfigError, DataError
from fedcore.task.definition import Task
from fedcore.task.model import checkpoint_bytes
from server.finetune.communication import compress_gradients
from server.finetune.loading import loaded
from server.finetune.order import Position
from server.finetune.precision import blocks_of, recomputed
from server.finetune.rates import rate_of
from server.finetune.sharding import whole_state
from tests.unit.server.finetune.conftest import (
    Grouped,
    make_examples,
    make_run,
    make_task,
    trained_here,
)

CALLS: list[int] = []


class Block(nn.Module):
    """A residual block with dropout; counts its forward passes."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        CALLS.append(1)
        return x + self.inner(x)  # type: ignore[no-any-return]


class Deep(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.first = nn.Linear(5, width)
        self.blocks = nn.ModuleList([Block(width, dropout) for _ in range(3)])
        self.last = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)  # type: ignore[no-any-return]


def deep(width: int = 8, dropout: float = 0.0) -> Task:
    return make_task(model=lambda: Deep(width, dropout))


def weights(model: nn.Module) -> Tensor:
    return torch.cat([each.detach().flatten() for each in model.parameters()])


def grouped(rank: int, world: int, *, task: Task, settings: dict[str, Any], **given: Any) -> Any:
    model, curve = trained_here(make_run(**settings), task, rank=rank, world=world, **given)
    return {name: each.numpy() for name, each in whole_state(model).items()}, curve.losses


def test_recomputed_activations_give_the_same_bits() -> None:
    results, calls = [], []
    for active in (False, True):
        CALLS.clear()
        run = make_run(activation_checkpointing=active)
        results.append(checkpoint_bytes(trained_here(run, deep(dropout=0.3))[0]))
        calls.append(len(CALLS))
    assert results[0] == results[1]
    looked = 3  # blocks, once: what form the outputs have is found without a backward pass
    assert calls[1] - looked == 2 * (calls[0] - looked)
    model = Deep(8, 0)
    with recomputed(model, active=True) as number:
        assert number == len(blocks_of(model)) == 3
    assert all("forward" not in vars(block) for block in model.blocks)


def test_a_step_in_parts_has_the_gradient_of_the_whole(in_group: Grouped) -> None:
    whole = weights(trained_here(make_run(optimizer="sgd"), deep())[0])
    parts = weights(trained_here(make_run(optimizer="sgd", accumulate_steps=3), deep())[0])
    assert torch.allclose(parts, whole, atol=1e-5)
    assert not torch.equal(parts, whole)
    settings = {"optimizer": "sgd", "accumulate_steps": 3}
    (first, _), (second, _) = in_group(2, partial(grouped, task=deep(), settings=settings))
    assert all(np.array_equal(first[name], second[name]) for name in first)
    both = np.concatenate([first[name].ravel() for name in first])
    assert np.allclose(both, whole.numpy(), atol=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns_and_continues_with_the_same_bits(
    precision: str, place: Path
) -> None:
    run = make_run(precision=precision, epochs=6, checkpoint_steps=5)
    whole, curve = trained_here(run, deep())
    exact, reference = trained_here(make_run(epochs=6), deep())
    assert not torch.equal(weights(whole), weights(exact))
    assert abs(curve.losses[-1] - reference.losses[-1]) < 0.05 < reference.losses[0] / 3
    asked = iter(range(100))
    with pytest.raises(KeyboardInterrupt):
        trained_here(run, deep(), place=place, stop=lambda: next(asked) >= 1)
    assert checkpoint_bytes(trained_here(run, deep(), place=place)[0]) == checkpoint_bytes(whole)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_fused_optimisers_agree_with_the_others_and_continue(place: Path, optimizer: str) -> None:
    run = make_run(fused=True, optimizer=optimizer, checkpoint_steps=5)
    whole, _ = trained_here(run, deep())
    plain, _ = trained_here(make_run(optimizer=optimizer), deep())
    assert torch.allclose(weights(whole), weights(plain), atol=1e-4)
    asked = iter(range(100))
    with pytest.raises(KeyboardInterrupt):
        trained_here(run, deep(), place=place, stop=lambda: next(asked) >= 0)
    assert checkpoint_bytes(trained_here(run, deep(), place=place)[0]) == checkpoint_bytes(whole)


def test_the_rate_rises_and_then_falls_along_half_a_cosine() -> None:
    settings = Finetune(learning_rate=1.0, schedule="cosine", warmup_steps=4, epochs=2)
    rates = [rate_of(settings, Position(step=step), 10) for step in range(21)]
    assert rates[:5] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert rates[12] == pytest.approx(0.5)
    assert rates[20] == pytest.approx(0)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    halved = Position(step=6, rate_scale=0.5)
    assert rate_of(settings, halved, 10) == pytest.approx(rates[6] / 2)
    assert rate_of(Finetune(learning_rate=0.3), Position(step=7), 10) == 0.3
    warm, _ = trained_here(make_run(warmup_steps=5), deep())
    assert not torch.equal(weights(warm), weights(trained_here(make_run(), deep())[0]))


def test_powersgd_keeps_the_buckets_of_a_large_model_apart(in_group: Grouped) -> None:
    run = make_run(communication="powersgd")

    def work(rank: int, world: int) -> float:
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(4)))  # 4 MiB: several buckets
        parallel = DistributedDataParallel(model)
        compress_gradients(parallel, run.finetune)
        for _ in range(30):
            parallel(torch.randn(2, 512)).square().mean().backward()
        return float(model[0].weight.grad.sum())  # type: ignore[operator,union-attr]

    first, second = in_group(2, work)
    assert first == second != 0


@pytest.mark.parametrize(("communication", "least"), [("bf16", 2.0), ("powersgd", 8.0)])
def test_compressed_gradients_are_that_much_smaller_and_still_learn(
    in_group: Grouped, communication: str, least: float
) -> None:
    """A width of 128, so that matrices are most of the parameters, as in real models."""

    def work(rank: int, world: int) -> Any:
        sent, all_reduce = list[int](), dist.all_reduce

        def counted(tensor: Tensor, *rest: Any, **more: Any) -> Any:
            if tensor.dtype is not torch.float64:  # not what processes tell each other besides
                sent.append(tensor.numel() * tensor.element_size())
            return all_reduce(tensor, *rest, **more)

        dist.all_reduce = counted
        settings = {"communication": communication, "epochs": 12, "learning_rate": 0.003}
        found, losses = grouped(rank, world, task=deep(128), settings=settings)
        steps = len(losses) or 1
        return sum(sent), steps, 4 * sum(each.size for each in found.values()), losses

    (sent, steps, size, losses), _ = in_group(2, work)
    whole = {"epochs": 12, "learning_rate": 0.003}
    (_, exact), _ = in_group(2, partial(grouped, task=deep(128), settings=whole))
    first = 10 if communication == "powersgd" else 0  # steps whose gradients travel whole
    assert (steps - first) * size / (sent - first * size) >= least
    assert abs(losses[-1] - exact[-1]) < 0.02


def test_batches_that_are_read_ahead_are_the_same_ones() -> None:
    plain, ahead = (trained_here(make_run(prefetch=number), deep())[0] for number in (0, 3))
    assert checkpoint_bytes(plain) == checkpoint_bytes(ahead)
    before = threading.active_count()
    parts = list(torch.arange(40).split(4))
    batches = loaded(make_examples(), parts, torch.device("cpu"), ahead=2)
    next(batches)
    batches.close()
    assert threading.active_count() == before

    class Broken(list[Any]):
        def __getitem__(self, row: Any) -> Any:
            raise OSError("no such file")

    with pytest.raises(DataError, match="no such file"):
        list(loaded(Broken(range(40)), parts, torch.device("cpu"), ahead=2))  # type: ignore[arg-type]


def test_a_compiled_model_is_trained_and_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, compiled = torch.compile, list[Any]()

    def compile_without_kernels(function: Any, **options: Any) -> Any:
        compiled.append(function)
        return whole(function, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", compile_without_kernels)
    model, _ = trained_here(make_run(compile=True), deep())
    assert len(compiled) == 1
    assert checkpoint_bytes(model) == checkpoint_bytes(trained_here(make_run(), deep())[0])
    assert model._compiled_call_impl is None


def test_a_divided_model_trains_as_its_copies_do(in_group: Grouped, place: Path) -> None:
    settings = {"epochs": 9, "max_grad_norm": 0.5, "accumulate_steps": 2, "checkpoint_steps": 20}
    (whole, exact), _ = in_group(2, partial(grouped, task=deep(), settings=settings))
    shard = settings | {"shard": "always"}
    work = partial(grouped, task=deep(), settings=shard, place=place)
    (divided, losses), (other, _) = in_group(2, work)
    assert len(losses) >= 50
    assert np.abs(np.subtract(losses, exact)).max() < 1e-4
    for name, value in whole.items():
        assert np.allclose(divided[name], value, atol=1e-4)
        assert np.array_equal(divided[name], other[name])
    # What processes have divided among them, one process continues.
    newest = sorted(place.iterdir())[-1]
    assert len(list(newest.glob("*.safetensors"))) == 2
    found, _ = trained_here(make_run(**settings), deep(), place=place)
    for name, value in found.state_dict().items():
        assert np.array_equal(value.numpy(), divided[name])


@pytest.mark.parametrize(("free", "told"), [(10_000, "divides"), (10**9, "")])
def test_a_model_that_does_not_fit_is_divided(
    in_group: Grouped, monkeypatch: pytest.MonkeyPatch, free: int, told: str
) -> None:
    heaps = list[str]()

    def work(rank: int, world: int) -> Any:
        notes = list[str]()
        grouped(rank, world, task=deep(64), settings={"epochs": 1}, note=notes.append)
        return notes, heaps

    monkeypatch.setattr("server.finetune.sharding.free_bytes", lambda device: free)
    returned = partial(heaps.append, "returned")
    monkeypatch.setattr("server.finetune.parallel.return_freed_blocks", returned)
    (notes, first), (_, second) = in_group(2, work)
    assert bool(notes) == bool(told)
    # Freed parts of a divided model go back to the system, in every process; copies are not freed.
    assert first == second == ["returned"] * bool(told)
    if told:
        assert "divides the model among 2 processes (FSDP2): weights, gradients and" in notes[0]


@pytest.mark.parametrize("settings", [{"precision": "fp16"}, {"communication": "bf16"}])
def test_what_sharding_does_not_do_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises((ConfigError, ValueError), match=r"contradicts finetune|DDP's"):
        make_run(shard="always", **settings)
