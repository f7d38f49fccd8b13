"""What clients that hold data back make of a model that came after the rounds."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Error, Message

import fedcore
from fedcore.config.owner import OPEN_POLICY
from fedcore.config.run import RunConfig
from fedcore.errors import ConfigError, RoundFailed
from fedcore.flower.grid import InProcessGrid
from fedcore.flower.identity import assume_identity
from fedcore.task.measured import Measured
from fedcore.task.metrics import ACCURACY, RMSE, Metric
from fedcore.task.model import FullModel, build_model
from fedcore.updates.pack import pack
from server.compression.export import export_onnx
from server.rounds.evaluation.judgement import Judgement, compared, drop_of, judgement
from server.rounds.evaluation.judging import clients_judge, judging_app
from server.rounds.evaluation.pooling import EvaluationAnswer
from server.simulation.evaluating import Unmeasured, VirtualClients
from server.simulation.judging import judge_in_simulation, measure_onnx_in_simulation
from tests.unit.fedcore.clients import COUNT, data, make_task

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


def answers(right: dict[str, float]) -> dict[str, EvaluationAnswer]:
    """Ten examples of each client, of which a share is decided right."""
    return {
        name: EvaluationAnswer(
            name, 10, Measured(10, {"accuracy": np.array([10 * share, 10 - 10 * share])})
        )
        for name, share in right.items()
    }


def test_a_file_that_no_client_measured_beside_the_other_may_be_any_worse() -> None:
    shares = {"anna": 0.9, "ben": 0.8, "carl": 0.7}
    base = answers(shares)
    assert drop_of(ACCURACY, base, answers({"dora": 0.9})) == math.inf
    assert drop_of(ACCURACY, base, {}) == math.inf
    assert drop_of(ACCURACY, base, base) == 0.0
    worse = answers({name: share - 0.1 for name, share in shares.items()} | {"dora": 1.0})
    assert drop_of(ACCURACY, base, worse) == pytest.approx(0.1)


def test_a_metric_of_sums_is_that_of_all_examples_and_not_the_clients_mean() -> None:
    """Two clients of very different size and error, by RMSE: the mean of values says 1 to 1.5."""

    def sums(errors: list[tuple[int, float]]) -> list[EvaluationAnswer]:
        return [
            EvaluationAnswer(str(place), n, Measured(n, {"rmse": np.array([n * e**2, n])}))
            for place, (n, e) in enumerate(errors)
        ]

    before, after = sums([(10, 1.0), (990, 1.0), (10, 1.0)]), sums([(10, 3.0), (990, 1.0), (10, 3)])
    found = compared(RMSE, list(zip(before, after, strict=True)))
    assert (found.clients, found.examples, found.before) == (3, 1010, 1.0)
    assert found.after == pytest.approx(math.sqrt((20 * 9 + 990) / 1010))
    assert found.margin > 0


def test_a_client_without_a_value_of_its_own_counts_for_the_metric_of_all() -> None:
    """One class alone has no AUC; with the other client's rows its histograms have one."""
    auc = fedcore.metrics.auc(2)
    of = [np.array([3.0, 1, 0, 0]), np.array([0.0, 0, 1, 3]), np.array([1.0, 1, 1, 2])]
    pairs = [
        (
            EvaluationAnswer(str(n), 4, one := Measured(4, {"auc": sums})),
            EvaluationAnswer("", 4, one),
        )
        for n, sums in enumerate(of)
    ]
    found = compared(auc, pairs)
    assert found.before == found.after == pytest.approx(auc.statistics.value_of(sum(of)))
    assert found.margin == 0.0


def test_few_worse_models_pass_in_spite_of_noise_on_the_sums() -> None:
    """At most 5 % by the interval, whose width covers the noise; 8 % leaves room for 600 draws."""
    rng, through, noise = np.random.default_rng(5), 0, 5.0

    def noised(right: int) -> EvaluationAnswer:
        sums = np.array([right, 40.0 - right]) + noise * rng.normal(size=2)
        return EvaluationAnswer("", 40, Measured(40, {"accuracy": sums}))

    for _ in range(600):
        pairs = [(noised(36), noised(36 - n % 2 * 4)) for n in range(20)]  # 0.05 worse in truth
        found = compared(ACCURACY, pairs)
        through += found.worsening(ACCURACY) <= 0.05
        assert found.margin > 0.02
    assert through / 600 < 0.08


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
        found = judge_in_simulation(VirtualClients(run, task, OPEN_POLICY), CLIENTS, notes.append)(
            before, after
        )
        assert notes == []
        return found

    found = judged()
    assert found == judged()
    assert found.clients == 4
    assert found.before != found.after
    assert (pack(before.model).tobytes(), pack(after.model).tobytes()) == held


def test_under_privacy_virtual_clients_charge_each_model_and_decline_beyond_their_budget() -> None:
    task, notes = make_task(), list[str]()
    values = {
        "name": "trial",
        "task": "task.py",
        "federation": {"rounds": 1, "evaluate_cohort": 4, "holdout": 0.3},
        "privacy": {"unit": "example", "target_delta": 1e-3, "evaluations": 3},
    }
    run = RunConfig.model_validate(values)
    virtual = VirtualClients(run, task, OPEN_POLICY)
    before, after = build_model(task, run).eval(), worse(build_model(task, run).eval())
    found = judge_in_simulation(virtual, CLIENTS, notes.append)(before, after)
    assert found.clients == 4
    assert math.isfinite(found.margin)
    asked = [name for name, ledger in virtual.ledgers.items() if len(ledger.charges) == 2]
    assert len(asked) == 4
    assert notes == []
    measured = list(virtual.measure(before, asked, "heldout"))
    assert not any(isinstance(one, Unmeasured) for one in measured)
    declined = list(virtual.measure(after, asked, "heldout"))
    assert all(
        isinstance(one, Unmeasured) and "has spent epsilon" in one.reason for one in declined
    )


def worse(model: FullModel) -> FullModel:
    with torch.no_grad():
        for parameter in model.model.parameters():
            parameter.mul_(-1.0)
    return model


APART = {"rounds": 1, "evaluate_cohort": 9, "holdout": 0.45, "holdout_by": "clients"}
JUDGES = {"client-3"} | {"client-6", "client-7"}  # by their names, of client-0 to client-7


@pytest.mark.parametrize("private", [False, True], ids=["plain", "private"])
def test_clients_that_hold_back_all_of_their_data_judge_alone(private: bool) -> None:
    """The fine-tuned model and each candidate are measured on clients that never trained."""
    names, read, notes = [f"client-{number}" for number in range(8)], set[str](), list[str]()

    def client_data(name: str, folder: Path | None) -> Any:
        read.add(name)
        return data(name)

    task = make_task(clients=lambda folder: names, client_data=client_data)
    privacy = {"unit": "example", "target_delta": 1e-3, "evaluations": 9} if private else {}
    run = RunConfig.model_validate(
        {"name": "trial", "task": "task.py", "federation": APART, "privacy": privacy}
    )
    virtual = VirtualClients(run, task, OPEN_POLICY)
    before, after = build_model(task, run).eval(), worse(build_model(task, run).eval())
    found = judge_in_simulation(virtual, names, notes.append)(before, after)
    assert (found.clients, found.examples) == (3, 3 * COUNT)
    onnx = export_onnx(before, torch.zeros(2, 6), labels=(), kind="classification")
    answers = measure_onnx_in_simulation(virtual, names, notes.append)(onnx)
    assert set(answers) == read == JUDGES
    assert notes == []
    if private:
        assert set(virtual.ledgers) == JUDGES
        assert all(one.evaluates for each in virtual.ledgers.values() for one in each.charges)


def test_a_server_that_knows_no_names_has_no_judges_that_never_train() -> None:
    run = RunConfig.model_validate({"name": "trial", "task": "task.py", "federation": APART})
    model = build_model(make_task(), run).eval()
    with pytest.raises(ConfigError, match="by number alone"):
        judging_app(make_task(), run, (model, model), on_note=print, on_end=print)


def test_of_devices_only_those_that_judge_are_waited_for() -> None:
    task, waits = make_task(), list[tuple[int, int]]()
    run = RunConfig.model_validate({"name": "trial", "task": "task.py", "federation": APART})
    model = build_model(task, run).eval()
    app = judging_app(
        task,
        run,
        (model, model),
        client_name=lambda node: f"client-{node}",
        wait=lambda connected, wanted: waits.append((connected(), wanted)),
        on_note=print,
        on_end=print,
    )
    grid = InProcessGrid(1, range(8), lambda message: Message(Error(7), reply_to=message))
    assume_identity(1)
    with pytest.raises(RoundFailed, match="none of 3 clients"):
        app(grid, None)  # type: ignore[arg-type]
    assert waits == [(3, 9)]
