"""Clients that hold back all of their data: who they are, and that they never train."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from flwr.app import Message, RecordDict

from fedcore.config.owner import OPEN_POLICY
from fedcore.config.run import FederationConfig
from fedcore.errors import DataError, InvalidUpdate
from fedcore.flower.identity import assume_identity
from fedcore.seeds import Simulated
from fedcore.task.definition import size_of
from fedcore.training.client import Client, local_data, training_data
from fedcore.training.parts import part_of
from fedcore.training.roles import evaluates, is_judge, judging_place
from fedcore.updates.messages import METRICS, NUM_EXAMPLES, STATISTICS, error_kind
from tests.unit.fedcore.clients import COUNT, ask, context, data, make_run, make_task, refused
from tests.unit.fedcore.clients import app_of as app_of_run

APART = {"rounds": 1, "evaluate_cohort": 2, "holdout": 0.5, "holdout_by": "clients"}
JUDGE, TRAINS = "anna", "ben"


@pytest.fixture(autouse=True)
def _identity() -> None:
    assume_identity(1)


def settings(holdout: float, by: str = "clients") -> FederationConfig:
    return FederationConfig.model_validate({"holdout": holdout, "holdout_by": by})


def test_who_judges_follows_from_the_name_and_the_share() -> None:
    assert judging_place(JUDGE) == pytest.approx(0.401, abs=1e-3)  # the same on every machine
    assert judging_place(TRAINS) == pytest.approx(0.745, abs=1e-3)
    assert is_judge(settings(0.5), JUDGE)
    assert not is_judge(settings(0.5), TRAINS)
    assert not is_judge(settings(0.4), JUDGE)


def test_of_many_clients_the_share_judges_and_a_larger_share_keeps_them() -> None:
    names = [f"site-{number}" for number in range(4000)]
    drawn = {share: {n for n in names if is_judge(settings(share), n)} for share in (0.1, 0.25)}
    for share, judges in drawn.items():
        deviation = (share * (1 - share) / len(names)) ** 0.5
        assert abs(len(judges) / len(names) - share) < 4 * deviation
    assert drawn[0.1] < drawn[0.25]


def test_by_rows_every_client_does_both() -> None:
    assert not is_judge(settings(0.9, "rows"), JUDGE)
    assert evaluates(settings(0.9, "rows"), JUDGE)
    assert not evaluates(settings(0.0, "rows"), JUDGE)
    assert [evaluates(settings(0.5), name) for name in (JUDGE, TRAINS)] == [True, False]


def client_of(**task: Any) -> Client:
    run = make_run(federation=APART)
    return Client(make_task(**task), run, OPEN_POLICY, Simulated(run.seed))


def test_a_client_has_all_of_its_data_for_one_of_the_two() -> None:
    client = client_of()
    assert [size_of(part) for part in local_data(client, JUDGE)] == [0, COUNT]
    assert [size_of(part) for part in local_data(client, TRAINS)] == [COUNT, 0]
    assert size_of(part_of(client, JUDGE, "heldout")) == COUNT
    with pytest.raises(DataError, match=r"'ben' holds no data back.*ask clients that do"):
        part_of(client, TRAINS, "heldout")


def unread(name: str, folder: Any) -> Any:
    if name == JUDGE:
        raise AssertionError("data of a judge were read to train on them")
    return data(name)


def test_who_judges_refuses_to_train_before_its_data_are_read() -> None:
    client = client_of(client_data=unread)
    with pytest.raises(InvalidUpdate, match=r"'anna' holds back all of its data .*never trains"):
        training_data(client, JUDGE)
    task, run = client.task, client.run
    reply = ask(task, run, node=context(JUDGE))
    said = refused(reply)
    assert "client 'anna': InvalidUpdate: " in said
    assert error_kind(reply.error.code) is not AssertionError
    assert not ask(task, run, node=context(TRAINS)).has_error()


def test_who_judges_gives_no_sums_of_its_inputs() -> None:
    client = client_of(client_data=unread)
    app = app_of_run(client.task, client.run)
    said = refused(app(Message(RecordDict(), 2, STATISTICS), context(JUDGE)))
    assert "never trains" in said
    assert not app(Message(RecordDict(), 2, STATISTICS), context(TRAINS)).has_error()


def test_who_judges_evaluates_on_all_of_its_data_and_others_do_not() -> None:
    task, run = make_task(), make_run(federation=APART)
    reply = ask(task, run, kind="evaluate", node=context(JUDGE))
    assert reply.content.metric_records[METRICS][NUM_EXAMPLES] == COUNT
    said = refused(ask(task, run, kind="evaluate", node=context(TRAINS)))
    assert "no held-out data: it trains, and other clients evaluate" in said


def test_the_places_are_spread_evenly() -> None:
    places = np.sort([judging_place(str(number)) for number in range(3000)])
    assert 0 <= places[0] < places[-1] < 1
    # Kolmogorov and Smirnov's distance: above 1.95 over the root of the number once in a thousand.
    assert np.abs(places - np.arange(3000) / 3000).max() < 1.95 / 3000**0.5
