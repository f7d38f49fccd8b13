"""What a client that protects its examples answers when it is asked to evaluate a model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from flwr.app import Message
from torch import nn

from edge_client.ledger.book import StoredCharge
from fedcore.config.owner import OwnerPolicy
from fedcore.errors import DiskFull
from fedcore.flower.identity import assume_identity
from fedcore.privacy.accounting import Charge, epsilon_of, part_of_split
from fedcore.privacy.evaluation_noise import evaluation_noise
from fedcore.privacy.ledger import Ledger, read_ledger
from fedcore.task.metrics import ACCURACY, Metric
from fedcore.task.statistics import Statistics
from fedcore.updates.messages import ARRAYS, DECLINED, METRICS, NUM_EXAMPLES
from fedcore.updates.replies import read_reply
from server.rounds.expected import evaluation_of
from tests.unit.fedcore.clients import (
    COUNT,
    PRIVATE,
    context,
    data,
    device_app,
    instruct,
    make_run,
    make_task,
    refused,
)

HELD_BACK = {"rounds": 3, "holdout": 0.25, "evaluate_cohort": 1}


@pytest.fixture(autouse=True)
def _identity() -> None:
    assume_identity(1)


def private_run(**privacy: Any) -> Any:
    return make_run(privacy=PRIVATE | privacy, federation=HELD_BACK)


def epsilon(charges: Sequence[Charge]) -> float:
    return epsilon_of(charges, target_delta=1e-3, accountant="prv")


def test_only_the_primary_metrics_noised_sums_leave_and_the_server_takes_them() -> None:
    task, run = make_task(metrics=(ACCURACY, Metric("loss", _loss, False))), private_run()
    reply = device_app(task, run)(instruct(task, run, kind="evaluate"), context())
    assert dict(reply.content.metric_records[METRICS]) == {NUM_EXAMPLES: COUNT // 4}
    (name,) = reply.content.array_records[ARRAYS]
    assert (name, len(reply.content)) == ("accuracy", 2)
    right, wrong = reply.content.array_records[ARRAYS]["accuracy"].numpy()
    assert right + wrong != COUNT // 4  # exact sums are this
    spec = evaluation_of(run, task.metrics, (3,))
    assert read_reply(reply, spec, where="anna").num_examples == COUNT // 4


def _loss(outputs: Any, targets: Any) -> float:
    return float(nn.functional.cross_entropy(outputs, targets))


def test_the_charge_is_kept_before_an_example_is_read_for_it_and_before_the_reply() -> None:
    events: list[str] = []

    class Watched(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return COUNT

        def __getitem__(self, row: int) -> Any:
            events.append("read")
            return data()[row]

    task, run = make_task(client_data=lambda client, folder: Watched()), private_run()
    node = context()

    def keep() -> None:
        (one,) = read_ledger(node).charges
        assert (one.sample_rate, one.steps, one.evaluates) == (1.0, 1, True)
        assert one.noise_multiplier == evaluation_noise(run)
        events.append("kept")

    app = device_app(task, run, keep=keep)
    assert not app(instruct(task, run, kind="evaluate"), node).has_error()
    # All rows are compared with those of earlier charges; only then held-out ones are evaluated.
    assert events == ["read"] * COUNT + ["kept"] + ["read"] * (COUNT // 4)


def test_without_room_for_the_charge_nothing_leaves() -> None:
    def full() -> None:
        raise DiskFull("no room")

    task, run = make_task(), private_run()
    said = refused(
        device_app(task, run, keep=full)(instruct(task, run, kind="evaluate"), context())
    )
    assert "DiskFull" in said


def test_evaluations_beyond_the_budget_are_declined_and_leave_training_alone() -> None:
    task, run, node = make_task(), private_run(evaluations=3), context()
    app = device_app(task, run)
    asked = [instruct(task, run, kind="evaluate", number=number) for number in range(4, 8)]
    replies = [app(one, node) for one in asked]
    assert [reply.has_error() for reply in replies] == [False, False, False, True]
    assert replies[3].error.code == DECLINED
    evaluated = epsilon(read_ledger(node).charges)
    assert 7.5 < evaluated <= 8
    trained = [app(instruct(task, run, number=number), node) for number in (1, 2, 3)]
    assert not any(reply.has_error() for reply in trained)
    assert 7.5 < epsilon(read_ledger(node).charges) <= 8


def test_what_an_example_cannot_have_been_in_does_not_count_for_it() -> None:
    train = Charge(1, 1.0, 0.1, 50, part_of_split("a" * 16, "train"))
    held = Charge(2, 2.0, 1.0, 1, part_of_split("a" * 16, "heldout"))
    apart = max(epsilon([train]), epsilon([held]))
    assert epsilon([train, held]) == epsilon([held, train]) == apart
    # Of another split, or of all examples, both may count for the same example.
    other = Charge(2, 2.0, 1.0, 1, part_of_split("b" * 16, "heldout"))
    whole = Charge(2, 2.0, 1.0, 1)
    assert epsilon([train, other]) == epsilon([train, whole]) > 1.05 * apart
    both = epsilon([train, held, whole])
    assert both == max(epsilon([train, whole]), epsilon([held, whole]))


def test_rows_that_have_moved_count_for_both_parts() -> None:
    """A window over a stream: what was held back last week may be trained on now."""
    rows = data()

    class Window(torch.utils.data.Dataset[Any]):
        start = 0

        def __len__(self) -> int:
            return COUNT

        def __getitem__(self, row: int) -> Any:
            return rows[(row + self.start) % COUNT]

    window, run = Window(), private_run(noise_multiplier=2.0, evaluation_noise_multiplier=2.0)
    task = make_task(client_data=lambda client, folder: window)
    app = device_app(task, run)

    def spent(*, moved: int) -> float:
        node, window.start = context(), 0
        assert not app(instruct(task, run), node).has_error()
        window.start = moved
        assert not app(instruct(task, run, kind="evaluate"), node).has_error()
        return epsilon(read_ledger(node).charges)

    assert spent(moved=1) > 1.1 * spent(moved=0)


@pytest.mark.parametrize("bad", ["metric", "model", "rows"])
def test_an_example_that_fails_changes_nothing_but_the_sums(bad: str) -> None:
    def sums(outputs: Any, targets: Any) -> Any:
        if bad == "metric" and int(targets[0]) == 1:
            raise SystemExit("one label")
        return ACCURACY.statistics.sums(outputs, targets)  # type: ignore[union-attr]

    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(6, 3))

        def forward(self, x: Any) -> Any:
            if bad == "model" and float(x.max()) > 1.05:
                raise MemoryError
            return x @ self.weight

    class Rows(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return COUNT

        def __getitem__(self, row: int) -> Any:
            if bad == "rows" and row % 2:
                raise OSError("a broken file")
            return data()[row]

    statistics = ACCURACY.statistics
    assert statistics is not None
    same = Statistics(sums, statistics.value, statistics.limits)
    metric = Metric("accuracy", same, True, 0.0, 1.0)
    task = make_task(model=Fails, client_data=lambda client, folder: Rows(), metrics=(metric,))
    run = private_run()
    reply: Message = device_app(task, run)(instruct(task, run, kind="evaluate"), context())
    assert not reply.has_error(), reply.error
    assert dict(reply.content.metric_records[METRICS]) == {NUM_EXAMPLES: COUNT // 4}


def test_the_owner_sees_evaluations_in_the_budget_over_all_runs() -> None:
    task, run, node = make_task(), private_run(evaluation_noise_multiplier=1.0), context()
    app = device_app(task, run, owner=OwnerPolicy(max_epsilon=3.0))
    said = refused(app(instruct(task, run, kind="evaluate"), node), DECLINED + 1)
    assert "OwnersBudgetExhausted" in said
    assert read_ledger(node) == Ledger()


def test_noise_follows_from_the_run_and_not_from_an_owners_budget() -> None:
    """The server knows how much noise there is, whatever owners allow."""
    task, run, node = make_task(), private_run(evaluations=1), context()
    owner = OwnerPolicy(max_epsilon=8.0, target_delta=1e-3)
    small = OwnerPolicy(max_epsilon=7.9, target_delta=1e-3)
    app = device_app(task, run, owner=owner)
    assert not app(instruct(task, run, kind="evaluate"), node).has_error()
    (one,) = read_ledger(node).charges
    assert one.noise_multiplier == evaluation_noise(run)
    assert math.isclose(epsilon([one]), 8.0, rel_tol=0.01)
    said = refused(
        device_app(task, run, owner=small)(instruct(task, run, kind="evaluate"), context()),
        DECLINED + 1,
    )
    assert "OwnersBudgetExhausted" in said


def test_a_model_that_keeps_state_while_it_evaluates_is_refused_before_a_charge() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 3)
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: Any) -> Any:
            self.seen += 1
            return self.linear(x) + self.seen

    task, run, node = make_task(model=Counts), private_run(), context()
    said = refused(device_app(task, run)(instruct(task, run, kind="evaluate"), node))
    assert "PrivacyError" in said
    assert read_ledger(node) == Ledger()


JUDGES = HELD_BACK | {"holdout": 0.5, "holdout_by": "clients", "evaluate_cohort": 2}


def test_a_judges_charges_are_for_all_examples_and_leave_room_for_no_training_elsewhere() -> None:
    """``anna`` judges here; in a run that holds back rows, or where she trains, all adds up."""
    task, node = make_task(), context("anna")
    noise = {"noise_multiplier": 2.0, "evaluation_noise_multiplier": 2.0}
    run = make_run(privacy=PRIVATE | noise, federation=JUDGES)
    reply = device_app(task, run)(instruct(task, run, kind="evaluate"), node)
    assert reply.content.metric_records[METRICS][NUM_EXAMPLES] == COUNT
    (held,) = read_ledger(node).charges
    assert held.evaluates
    kept = dataclasses.asdict(held) | {"target_delta": 1e-3, "data": "all"}
    assert StoredCharge(**kept).charge == held  # a device can keep it
    assert "never trains" not in refused(device_app(task, run)(instruct(task, run), node))
    assert read_ledger(node).charges == (held,)
    rows = HELD_BACK | {"holdout": 0.5}  # the same share, whose rows held back are half of hers
    for other in (rows, HELD_BACK, JUDGES | {"holdout": 0.1}, {"rounds": 3}):
        there, fresh = make_run(privacy=PRIVATE | noise, federation=other), context("anna")
        assert not device_app(task, there)(instruct(task, there), fresh).has_error()
        (trained,) = read_ledger(fresh).charges
        together = epsilon([held, trained])
        assert together > 1.2 * max(epsilon([held]), epsilon([trained])), other


def test_who_trains_beside_judges_charges_all_of_its_examples() -> None:
    task, run, node = make_task(), make_run(privacy=PRIVATE, federation=JUDGES), context("ben")
    assert not device_app(task, run)(instruct(task, run), node).has_error()
    assert [one.part for one in read_ledger(node).charges] == [""]
    refused(device_app(task, run)(instruct(task, run, kind="evaluate"), node))
    assert len(read_ledger(node).charges) == 1
