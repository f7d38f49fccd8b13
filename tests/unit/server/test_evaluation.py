"""One model over many clients: spread, interval, worst clients, and metrics that are undefined."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from scipy.stats import bootstrap

from fedcore.task.metrics import ACCURACY, RMSE, Metric
from server.evaluation import ClientScores, Evaluation, spread_of


def evaluation(
    clients: list[ClientScores], *metrics: Metric, known: int | None = None
) -> Evaluation:
    return Evaluation(
        model="model.onnx",
        sha256="ab" * 32,
        part="heldout",
        metrics=metrics or (ACCURACY,),
        clients=tuple(clients),
        failed={},
        known=known or len(clients),
    )


def test_examples_weigh_and_clients_spread() -> None:
    found = spread_of("accuracy", [(10, 1.0), (30, 0.5), (60, 0.5), (100, 0.0)], undefined=2)
    assert found.mean == pytest.approx(0.275)
    assert found.mean_of_clients == pytest.approx(0.5)
    assert (found.low, found.median, found.high) == (0.0, 0.5, 1.0)
    assert found.tenth == pytest.approx(0.15)
    assert found.deviation == pytest.approx(np.std([1.0, 0.5, 0.5, 0.0], ddof=1))
    assert (found.clients, found.examples, found.undefined) == (4, 200, 2)


def test_the_interval_is_that_of_clients_drawn_again() -> None:
    rng = np.random.default_rng(1)
    counts, values = rng.integers(20, 100, 60), rng.beta(8, 2, 60)
    found = spread_of("accuracy", list(zip(counts.tolist(), values.tolist(), strict=True)))
    drawn = bootstrap(
        (counts, values),
        lambda n, v, axis: (n * v).sum(axis) / n.sum(axis),
        paired=True,
        vectorized=True,
        rng=rng,
    )
    assert found.margin == pytest.approx(1.96 * drawn.standard_error, rel=0.1)


def test_a_single_client_has_no_interval_and_no_deviation() -> None:
    found = spread_of("accuracy", [(10, 0.5)])
    assert (found.margin, found.deviation, found.mean) == (None, None, 0.5)


def test_the_order_of_clients_does_not_show() -> None:
    rng = random.Random(2)
    measured = [(rng.randint(1, 500), rng.random()) for _ in range(50)]
    found = spread_of("accuracy", measured)
    rng.shuffle(measured)
    assert spread_of("accuracy", measured) == found


@pytest.mark.parametrize(("metric", "worst"), [(ACCURACY, "c"), (RMSE, "a")])
def test_the_worst_come_first_by_the_direction_of_the_metric(metric: Metric, worst: str) -> None:
    values = {"a": 0.9, "b": 0.8, "c": 0.1}
    found = evaluation([ClientScores(n, 5, {metric.name: v}) for n, v in values.items()], metric)
    assert found.worst(1)[0].client == worst
    assert len(found.worst(2)) == 2


def test_a_client_without_a_value_counts_for_its_other_metrics_alone() -> None:
    auc = Metric("auc", lambda outputs, targets: 0.0, higher_is_better=True, low=0.0, high=1.0)
    clients = [
        ClientScores("a", 10, {"accuracy": 0.5, "auc": 0.7}),
        ClientScores("b", 30, {"accuracy": 0.9}),
    ]
    found = evaluation(clients, ACCURACY, auc)
    of_auc, of_accuracy = found.spread("auc"), found.spread("accuracy")
    assert of_auc is not None
    assert of_accuracy is not None
    assert (of_auc.mean, of_auc.clients, of_auc.undefined) == (0.7, 1, 1)
    assert of_accuracy.mean == pytest.approx(0.8)
    assert "auc is undefined on the data of 1 client" in str(found)


def test_text_and_json_say_how_many_and_whose() -> None:
    clients = [ClientScores(f"c{n}", 10, {"accuracy": n / 20}) for n in range(15)]
    found = evaluation(clients, known=40)
    shown = str(found)
    assert "150 examples of 15 of 15 clients, drawn from 40" in shown
    assert "10 worst, the worst first" in shown
    assert "c10" not in shown.split("worst first")[1]
    told = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert (told["clients"], told["clients_known"], told["examples"]) == (15, 40, 150)
    assert told["by_client"][3] == {
        "client": "c3",
        "examples": 10,
        "metrics": {"accuracy": 0.15},
        "undefined": {},
    }
    assert told["metrics"]["accuracy"]["mean"] == pytest.approx(0.35)
    assert told["worst"][0] == "c0"
