"""Federated averaging of all of a model's state as a plain loop of torch, and fedcore's own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from fedcore.client_app import client_app
from fedcore.config.owner import OPEN_POLICY
from fedcore.config.run import RunConfig
from fedcore.seeds import Simulated, torch_rng
from fedcore.task.definition import Task
from fedcore.task.model import build_model
from fedcore.training.mods import client_mods
from server.rounds.app import Listener, Outcome, server_app
from server.simulation.engine import simulate

FEATURES, CLASSES, BATCH = 6, 3, 16
State = Mapping[str, Tensor]
Train = Callable[[nn.Module, Tensor, Tensor, torch.Generator, RunConfig], None]


def data(name: str, count: int) -> Any:
    """Examples of one client; the classes can be told apart."""
    rng = torch_rng(0, name)
    inputs = torch.randn(count, FEATURES, generator=rng) * 2 + 1
    return TensorDataset(inputs, inputs[:, :CLASSES].argmax(dim=1))


def task_of(model: Callable[[], nn.Module], sizes: Mapping[str, int]) -> Task:
    return Task(
        name="plain",
        kind="classification",
        model=model,
        clients=lambda folder: list(sizes),
        client_data=lambda client, folder: data(client, sizes[client]),
        cloud_data=lambda folder: data("cloud", 40),
        test_data=lambda folder: data("test", 100),
        example_input=torch.zeros(FEATURES),
    )


def run_of(**federation: Any) -> RunConfig:
    values = {
        "name": "run",
        "task": "task.py",
        "seed": 1,
        "federation": {"rounds": 3} | federation,
        "client": {"batch_size": BATCH, "epochs": 2},
    }
    return RunConfig.model_validate(values)


def federated(task: Task, run: RunConfig) -> Outcome:
    """Runs the rounds by the apps of a deployment."""
    outcomes: list[Outcome] = []
    randomness = Simulated(run.seed)
    listener = Listener(lambda note: None, lambda record: None, outcomes.append)
    server = server_app(task, run, cloud=None, randomness=randomness, listener=listener)
    mods = client_mods(run.federation.strategy)
    client = client_app(task, run, owner=OPEN_POLICY, randomness=randomness, mods=mods)
    simulate(server, client, task.clients(None))
    return outcomes[0]


def plain_training(
    model: nn.Module, inputs: Tensor, targets: Tensor, rng: torch.Generator, run: RunConfig
) -> None:
    """Trains by SGD on shuffled batches; a last one of a single row joins the one before."""
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=run.client.learning_rate
    )
    model.train()
    for _ in range(run.client.epochs):
        batches = list(torch.split(torch.randperm(len(inputs), generator=rng), BATCH))
        if len(batches) > 1 and len(batches[-1]) == 1:
            last = batches.pop()
            batches[-1] = torch.cat([batches[-1], last])
        for rows in batches:
            optimizer.zero_grad()
            functional.cross_entropy(model(inputs[rows]), targets[rows]).backward()
            optimizer.step()


def plain_rounds(
    task: Task, run: RunConfig, train: Train = plain_training, start: nn.Module | None = None
) -> State:
    """Averages the whole state dict over clients, weighted by their examples, exactly."""
    model = build_model(task, run).model if start is None else copy.deepcopy(start)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for number in range(1, run.federation.rounds + 1):
        trained, sizes = [], []
        for name in task.clients(None):
            model.load_state_dict(state)
            inputs, targets = task.client_data(name, None).tensors  # type: ignore[attr-defined]
            train(model, inputs, targets, torch_rng(run.seed, "order", number, name), run)
            trained.append({key: one.clone() for key, one in model.state_dict().items()})
            sizes.append(len(inputs))
        state = {key: mean([one[key] for one in trained], sizes) for key in state}
    return state


def mean(tensors: list[Tensor], weights: list[int]) -> Tensor:
    """The weighted mean in exact arithmetic; of integers, the nearest, a half to even."""
    first, total = tensors[0], sum(weights)
    sums = [
        sum(weight * Fraction(value) for weight, value in zip(weights, values, strict=True)) / total
        for values in zip(*(tensor.flatten().tolist() for tensor in tensors), strict=True)
    ]
    if first.dtype == torch.bool:
        values: list[Any] = [one > Fraction(1, 2) for one in sums]
    elif first.is_floating_point():
        values = [float(np.float32(float(one))) for one in sums]
    else:
        values = [round(np.float32(float(one))) for one in sums]
    return torch.tensor(values, dtype=first.dtype).view(first.shape)


def assert_equal(found: nn.Module, expected: State) -> None:
    """Each tensor of a model's state has the expected bits."""
    state = found.state_dict()
    assert state.keys() == expected.keys()
    unequal = [name for name in state if not torch.equal(state[name], expected[name])]
    assert not unequal, {name: (state[name], expected[name]) for name in unequal}
