"""Whether the final test lets a model be published."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.data import TensorDataset

from fedcore.artifacts.manifest import TestStatement
from fedcore.config.run import ReleaseConfig, RunConfig
from fedcore.errors import DataError
from fedcore.task.definition import Task, size_of
from fedcore.task.metrics import ACCURACY, RMSE, Metric
from fedcore.training.batches import gather_all
from server.release.final_test import (
    drop_warning,
    no_test_note,
    read_final_test,
    reason_to_withhold,
    statement_of,
)
from tests.unit.fedcore.clients import COUNT, data, make_task


def statement(
    federated: float | None, released: float | None, *, examples: int = 1000
) -> TestStatement:
    return TestStatement(
        metric="accuracy", examples=examples, federated=federated, released=released
    )


def run_of(repository: str | None = "there", **release: float) -> RunConfig:
    keys = "keys" if repository else None
    return RunConfig(
        name="r", task="t", release=ReleaseConfig(repository=repository, keys=keys, **release)
    )


@pytest.mark.parametrize(
    ("metric", "before", "after", "examples", "held"),
    [
        (ACCURACY, 0.90, 0.90, 1000, False),
        (ACCURACY, 0.90, 0.95, 1000, False),
        (ACCURACY, 0.90, 0.89, 1000, False),  # as much as is allowed
        (ACCURACY, 0.90, 0.8899, 1000, True),
        (ACCURACY, 0.90, 0.89, 10, False),
        (ACCURACY, 0.90, 0.80, 10, False),  # one example of ten
        (ACCURACY, 0.90, 0.70, 10, True),
        (RMSE, 10.0, 10.1, 1000, False),
        (RMSE, 10.0, 10.2, 1000, True),
        (ACCURACY, 0.90, None, 1000, True),
        (ACCURACY, None, 0.5, 1000, False),
        (ACCURACY, None, None, 1000, False),
    ],
)
def test_what_is_worse_by_more_than_is_allowed_isreason_to_withhold(
    metric: Metric, before: float | None, after: float | None, examples: int, held: bool
) -> None:
    said = reason_to_withhold(run_of(), metric, statement(before, after, examples=examples))
    assert bool(said) is held
    if held:
        assert "release.max_test_drop = 0.01" in said
    assert not reason_to_withhold(run_of(None), metric, statement(before, after, examples=examples))
    assert not reason_to_withhold(run_of(max_test_drop=1e9), metric, statement(before, 0.0))


def test_any_drop_is_told_with_what_follows_from_it() -> None:
    run = run_of()
    assert drop_warning(run, ACCURACY, statement(0.9, 0.9)) == ""
    assert drop_warning(run, ACCURACY, statement(0.9, 0.91)) == ""
    assert drop_warning(run, RMSE, statement(10.0, 9.0)) == ""
    said = drop_warning(run, ACCURACY, statement(0.9, 0.895))
    assert said.startswith("WARNING: ")
    assert "accuracy 0.9 before, 0.895 after, over 1000 examples: 0.005 worse" in said
    assert "which release.max_test_drop allows" in said
    assert "so it is not published" in drop_warning(run, ACCURACY, statement(0.9, 0.8))
    assert "no number after" in drop_warning(run, ACCURACY, statement(0.9, None))


def with_tests(**tests: object) -> Task:
    return make_task(test_data=None, **tests)


def test_the_clients_test_data_are_the_final_test_where_the_server_has_none() -> None:
    sizes = {"anna": 3, "ben": 0, "carl": 5}

    def client_test(client: str, folder: Path | None) -> TensorDataset:
        return TensorDataset(*(column[: sizes[client]] for column in data(client).tensors))

    run, task = run_of(None), with_tests(client_test=client_test)
    test = read_final_test(run, task, None, list(sizes))
    assert test is not None
    assert test.pooled
    assert {name: size_of(each) for name, each in test.clients.items()} == {"anna": 3, "carl": 5}
    inputs, targets = gather_all(test.examples)
    assert torch.equal(inputs, torch.cat([data("anna")[:3][0], data("carl")[:5][0]]))
    assert len(targets) == 8
    scores = {"accuracy": {"federated": 0.75, "released": 0.5}}
    made = statement_of(task, scores, test)
    assert (made.clients, made.examples, made.drop) == (2, 8, 0.25)

    both = read_final_test(run, make_task(client_test=client_test), None, list(sizes))
    assert both is not None
    assert (size_of(both.examples), both.pooled, len(both.clients)) == (COUNT, False, 2)
    assert statement_of(task, scores, both).clients is None

    assert read_final_test(run, task, None) is None  # devices keep theirs
    assert read_final_test(run, with_tests(), None, list(sizes)) is None
    with pytest.raises(DataError, match=r"no examples for any of 1 client"):
        read_final_test(run, task, None, ["ben"])


def test_under_privacy_no_exact_result_on_clients_data_gets_out() -> None:
    task = with_tests(client_test=lambda client, folder: data(client))
    private = {"unit": "example", "target_delta": 1e-3}
    run = RunConfig.model_validate({"name": "r", "task": "t", "privacy": private})
    assert read_final_test(run, task, None, ["anna"]) is None
    assert "privacy.unit = 'example' does not let out" in no_test_note(run, task)
    assert "has no test_data." in no_test_note(run_of(None), with_tests())
