"""FedDF: the global model comes closer to the clients' answers, and no target is read."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import fedcore
from fedcore.config.run import RunConfig
from fedcore.errors import ConfigError, RoundFailed
from fedcore.task.model import build_model
from fedcore.training.evaluate import outputs_of
from fedcore.updates.pack import Vector, pack, unpack
from server.cloud import CloudData, cloud_data_of
from server.rounds.strategies.feddf import Distillation, distiller_of
from server.rounds.strategies.flower import choose_strategy
from tests.unit.server.simulation.plain import data, task_of


def dense() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))


TASK = task_of(dense, {"anna": 30, "ben": 20})


def run_of(**sections: Any) -> RunConfig:
    values = {"name": "run", "task": "task.py", "federation": {"strategy": "FedDF", "rounds": 2}}
    return RunConfig.model_validate({**values, **sections})


def taught(cloud: CloudData, teachers: list[Vector], *, seed: int = 0) -> Vector:
    run = run_of()
    distil = distiller_of(TASK, run, build_model(TASK, run), cloud)
    assert distil is not None
    mean = np.mean(teachers, axis=0, dtype=np.float32)
    return distil(mean, teachers, Distillation(steps=150, learning_rate=1e-2), seed)


def test_the_average_learns_what_all_answer_together() -> None:
    cloud = CloudData(data("cloud", 60), data("heldout", 30))
    models = [build_model(TASK, run_of().model_copy(update={"seed": seed})) for seed in (1, 2, 3)]
    for model in models:
        for parameter in model.parameters():
            parameter.data *= 3
    teachers = [pack(model.model) for model in models]
    before = torch.get_rng_state()
    found = taught(cloud, teachers)
    assert torch.equal(torch.get_rng_state(), before)

    told = torch.stack([outputs_of(model, cloud.heldout)[0] for model in models]).mean(0)
    student, gaps = build_model(TASK, run_of()), []
    for weights in (np.mean(teachers, axis=0, dtype=np.float32), found):
        unpack(weights, student.model)
        answers = outputs_of(student, cloud.heldout)[0]
        gaps.append(float((answers.softmax(1) - told.softmax(1)).abs().mean()))
    assert gaps[1] < gaps[0] / 2

    inputs, targets = cloud.train.tensors  # type: ignore[attr-defined]
    others: Any = TensorDataset(inputs, (targets + 1) % 3)
    assert (taught(CloudData(others, cloud.heldout), teachers) == found).all()
    assert (taught(cloud, teachers, seed=1) != found).any()
    endless = np.full_like(teachers[0], 3e38)
    assert (taught(cloud, [*teachers, endless]) != found).any()  # it is in the average alone
    with pytest.raises(RoundFailed, match="no client's model gives finite outputs"):
        taught(cloud, [endless])


def test_a_run_distils_in_each_round() -> None:
    found = {}
    for strategy in ("FedAvg", "FedDF"):
        options = {"strategy_options": {"steps": 5}} if strategy == "FedDF" else {}
        result = fedcore.simulate(
            TASK,
            federation={"rounds": 2, "strategy": strategy, **options},
            finetune={"epochs": 0},
            compression={"candidates": ["fp32"], "timing_runs": 100},
            progress=False,
        )
        found[strategy] = pack(result.federated.model)
    assert (found["FedAvg"] != found["FedDF"]).any()
    assert np.abs(found["FedAvg"] - found["FedDF"]).max() < 0.1


def test_it_is_refused_where_it_cannot_work() -> None:
    for changed, said in (
        ({"privacy": {"unit": "client"}}, r"FedDF' contradicts privacy\.unit = 'client'"),
        ({"client": {"local": ("0.*",)}}, r"FedDF' contradicts client\.local"),
    ):
        with pytest.raises(ValueError, match=said):
            run_of(**changed)
    for options, said in (
        ({"step": 5}, r"strategy_options\.step: FedDF has no such option. It accepts: steps, "),
        ({"steps": 0}, r"strategy_options\.steps: FedDF got 0, expected a number from 1 "),
        ({"learning_rate": "fast"}, r"strategy_options\.learning_rate: FedDF got 'fast'"),
    ):
        run = run_of(federation={"strategy": "FedDF", "strategy_options": options})
        with pytest.raises(ConfigError, match=said):
            choose_strategy(run, cohort=2, size=0)
    without = fedcore.Task(
        name="alone",
        kind="classification",
        model=dense,
        clients=lambda folder: ["anna"],
        client_data=lambda client, folder: data(client, 30),
        example_input=torch.zeros(6),
    )
    with pytest.raises(ConfigError, match=r"task 'alone' has no cloud_data, by whose inputs"):
        fedcore.simulate(without, run_of(), runs=None)


def test_rounds_are_judged_by_data_that_do_not_teach() -> None:
    cloud = cloud_data_of(run_of(), TASK, None)
    assert cloud is not None
    assert cloud.of_rounds is not cloud.train
