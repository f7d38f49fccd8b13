"""What clients that hold data back make of a model that came after the rounds."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

from fedcore.config.owner import OPEN_POLICY
from fedcore.config.run import RunConfig
from fedcore.task.metrics import ACCURACY, RMSE, Metric
from fedcore.task.model import FullModel, build_model
from fedcore.updates.pack import pack
from server.rounds.evaluation.judging import Judgement, clients_judge, drop_of, judgement
from server.simulation.judging import judge_in_simulation
from tests.unit.fedcore.clients import make_task

CLIENTS = tuple(f"client-{number}" for number in range(6))


def test_the_same_clients_are_compared_so_that_what_differs_between_them_does_not_count() -> None:
    apart = [(10, 0.2, 0.3), (10, 0.9, 1.0), (10, 0.5, 0.6)]
    found = judgement(apart)
    assert (found.clients, found.examples) == (3, 30)
    assert found.before == pytest.approx(0.16 / 0.3)
    assert found.after == pytest.approx(0.19 / 0.3)
    assert found.margin == pytest.approx(0.0, abs=1e-9)
    assert found.worsening(ACCURACY) == pytest.approx(-0.1)
    assert found.worsening(RMSE) == pytest.approx(0.1 / found.before)


def test_examples_weigh_and_the_order_of_answers_does_not_show() -> None:
    rng = random.Random(1)
    measured = [(rng.randint(1, 500), rng.random(), rng.random()) for _ in range(50)]
    found = judgement(measured)
    total = sum(examples for examples, _, _ in measured)
    assert found.before == pytest.approx(sum(n * one for n, one, _ in measured) / total)
    rng.shuffle(measured)
    assert judgement(measured) == found


@pytest.mark.parametrize("metric", [ACCURACY, RMSE])
def test_one_client_alone_says_nothing_of_the_others(metric: Metric) -> None:
    found = judgement([(100, 0.5, 0.9)])
    assert math.isinf(found.margin)
    assert found.worsening(metric) == math.inf


def test_of_models_that_are_a_limit_worse_few_are_let_through() -> None:
    """At most 5 % by the interval; 7 % leaves room for three standard errors of 2,000 draws."""
    rng = np.random.default_rng(3)
    through = 0
    for _ in range(2000):
        gaps = rng.normal(-0.02, 0.05, 8)
        measured = [(50, 0.7, 0.7 + gap) for gap in gaps]
        through += judgement(measured).worsening(ACCURACY) <= 0.02
    assert through / 2000 < 0.07


def test_a_file_that_no_client_measured_beside_the_other_may_be_any_worse() -> None:
    base = {"anna": (10, 0.9), "ben": (10, 0.8), "carl": (10, 0.7)}
    assert drop_of(ACCURACY, base, {"dora": (10, 0.9)}) == math.inf
    assert drop_of(ACCURACY, base, {}) == math.inf
    assert drop_of(ACCURACY, base, base) == 0.0
    worse = {name: (count, value - 0.1) for name, (count, value) in base.items()}
    assert drop_of(ACCURACY, base, worse | {"dora": (10, 1.0)}) == pytest.approx(0.1)


def test_clients_judge_where_they_hold_data_back_unless_the_cloud_is_asked() -> None:
    def asked(evaluate_cohort: int, **finetune: str) -> bool:
        values = {
            "name": "trial",
            "task": "task.py",
            "federation": {
                "rounds": 1,
                "evaluate_cohort": evaluate_cohort,
                "holdout": 0.3 if evaluate_cohort else 0.0,
            },
            "finetune": finetune,
        }
        return clients_judge(RunConfig.model_validate(values))

    assert asked(3)
    assert asked(3, judge="both")
    assert not asked(3, judge="cloud")
    assert not asked(0)
    with pytest.raises(ValueError, match="no client evaluates models on held-out data"):
        asked(0, judge="clients")


def test_virtual_clients_measure_both_models_and_the_same_again() -> None:
    task = make_task()
    values = {
        "name": "trial",
        "task": "task.py",
        "federation": {"rounds": 1, "evaluate_cohort": 4, "holdout": 0.3},
    }
    run = RunConfig.model_validate(values)
    before, after = build_model(task, run).eval(), worse(build_model(task, run).eval())
    held = pack(before.model).tobytes(), pack(after.model).tobytes()

    def judged() -> Judgement:
        notes: list[str] = []
        found = judge_in_simulation(run, task, OPEN_POLICY, CLIENTS, notes.append)(before, after)
        assert notes == []
        return found

    found = judged()
    assert found == judged()
    assert found.clients == 4
    assert found.before != found.after
    assert (pack(before.model).tobytes(), pack(after.model).tobytes()) == held


def worse(model: FullModel) -> FullModel:
    with torch.no_grad():
        for parameter in model.model.parameters():
            parameter.mul_(-1.0)
    return model
