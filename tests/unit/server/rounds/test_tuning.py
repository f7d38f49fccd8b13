"""Fine-tuning between rounds: when it is due, what the next round starts from, and resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fedcore
from fedcore.config.run import RunConfig
from fedcore.errors import ConfigError
from fedcore.task.model import FullModel
from fedcore.updates.pack import pack, unpack
from server.rounds.tuning import RoundTuning
from tests.unit.server.rounds.stories import Story, adds, scores, zeros
from tests.unit.server.simulation.plain import data, task_of


def to(value: float, *, kept: bool = True) -> Any:
    """A tuner that sets all weights; its gate keeps the result or not."""

    def tune(model: FullModel, number: int) -> RoundTuning:
        found = zeros()
        unpack(np.full(3, value, np.float32), found.model)
        return RoundTuning(found if kept else model, kept, 0.5, 0.7)

    return tune


@pytest.mark.parametrize("strategy", ["FedAvg", "FedAvgM", "FedAdam"])
@pytest.mark.parametrize("kept", [True, False])
def test_the_next_round_starts_from_what_the_gate_keeps(strategy: str, kept: bool) -> None:
    options = {"FedAvgM": {"server_learning_rate": 0.5, "server_momentum": 0.1}}.get(strategy, {})
    sent: dict[int, float] = {}

    def answer(node: int, number: int, weights: Any) -> Any:
        sent[number] = float(weights[0])
        return adds()(node, number, weights)

    story = Story(
        answer,
        strategy=strategy,
        options=options,
        tuner=to(100.0, kept=kept),
        finetune={"every": 2},
        rounds=5,
    )
    found = story.run()
    assert [each.finetuned for each in story.records] == [None, kept, None, kept, None]
    assert (sent[3] == 100.0) == kept
    # A strategy that kept a copy of its own would go on from there.
    assert (abs(sent[4] - 100.0) < 3) == kept
    assert (sent[5] == 100.0) == kept
    assert sum("held-out cloud data 0.5 before, 0.7 after" in note for note in story.notes) == 2
    assert (abs(float(found.weights[0]) - 100) < 3) == kept  # nothing judges, so the last round


def test_a_stall_makes_it_due_and_the_best_model_is_that_of_its_round() -> None:
    judge = scores(0.5, 0.6, 0.6, 0.6, 0.6, 0.6, 0.7, 0.6)
    story = Story(adds(), judge=judge, tuner=to(100.0), finetune={"after_stall": 2}, rounds=8)
    found = story.run()
    after = [each.round for each in story.records if each.finetuned]
    assert after == [4, 6]  # two rounds after the best one, and two after it had been done
    assert found.best_round == 7
    assert found.weights[0] == 101.0


def run_of(**sections: Any) -> RunConfig:
    values = {
        "name": "run",
        "task": "task.py",
        "federation": {"rounds": 5},
        "client": {"batch_size": 8},
        "finetune": {"every": 2, "epochs": 2, "max_metric_drop": 1.0},
        "compression": {"candidates": ("fp32",), "timing_runs": 100},
    }
    return RunConfig.model_validate({**values, **sections})


def test_an_interrupted_run_gives_the_bits_of_an_uninterrupted_one(tmp_path: Path) -> None:
    task = task_of(lambda: nn.Linear(6, 3), {"anna": 30, "ben": 20})
    run = run_of()
    whole = fedcore.simulate(task, run, runs=None)
    assert [each.finetuned for each in whole.record.rounds] == [None, True, None, True, None]
    without = fedcore.simulate(task, run_of(finetune={"epochs": 2}), runs=None)
    assert (pack(whole.federated.model) != pack(without.federated.model)).any()

    def stop(event: Any) -> None:
        if getattr(event, "values", {}).get("round") == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fedcore.simulate(task, run, runs=tmp_path, progress=stop)
    resumed = fedcore.simulate(task, run, runs=tmp_path, resume=True)
    for one, other in ((whole.federated, resumed.federated), (whole.model, resumed.model)):
        assert (pack(one.model) == pack(other.model)).all()
    assert [each.finetuned for each in resumed.record.rounds] == [None, True, None, True, None]
    assert sum("the next round starts from it" in note for note in resumed.record.notes) == 2


def test_what_cannot_be_fine_tuned_between_rounds_is_refused() -> None:
    for changed, said in (
        ({"finetune": {"every": 2, "epochs": 0}}, r"need finetune\.epochs above 0"),
        (
            {"client": {"local": ("0.*",)}},
            r"finetune\.every and finetune\.after_stall contradict client\.local",
        ),
        (
            {"finetune": {"after_stall": 3}, "federation": {"patience": 3}},
            r"after_stall = 3 contradicts federation\.patience = 3",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            run_of(**changed)
    alone = task_of(lambda: nn.Linear(6, 3), {"anna": 30})
    without = fedcore.Task(
        name="alone",
        kind="classification",
        model=alone.model,
        clients=alone.clients,
        client_data=lambda client, folder: data(client, 30),
        example_input=torch.zeros(6),
    )
    with pytest.raises(ConfigError, match=r"task 'alone' has no cloud_data"):
        fedcore.simulate(without, run_of(), runs=None)


def test_a_private_run_says_that_its_guarantee_does_not_cover_the_cloud() -> None:
    task = task_of(lambda: nn.Linear(6, 3), {"anna": 30, "ben": 20})
    private = {"unit": "example", "noise_multiplier": 1.0, "target_delta": 1e-3}
    run = run_of(privacy=private, federation={"rounds": 2}, finetune={"every": 1, "epochs": 1})
    result = fedcore.simulate(task, run, runs=None)
    assert any("covers the clients' data alone" in note for note in result.record.notes)
    assert result.record.rounds[0].finetuned is not None
    assert result.record.epsilon is not None
