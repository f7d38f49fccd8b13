"""What a client that protects its examples answers, and what it is charged."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedcore.client_app import DurableLedger, client_app
from fedcore.config.owner import OPEN_POLICY, OwnerPolicy
from fedcore.errors import DiskFull
from fedcore.flower.identity import assume_identity
from fedcore.observability.words import epsilon_text
from fedcore.privacy.accounting import Charge
from fedcore.privacy.ledger import NO_OTHER_RUNS, Ledger, OtherRuns, read_ledger, write_ledger
from fedcore.seeds import SystemEntropy
from fedcore.task.model import build_model
from fedcore.updates.messages import (
    ARRAYS,
    DECLINED,
    DECLINED_BY_OWNER,
    EPSILON,
    STATISTICS,
    weights_record,
)
from fedcore.updates.pack import pack
from tests.unit.fedcore.clients import (
    COUNT,
    PRIVATE,
    app_of,
    ask,
    context,
    data,
    device_app,
    failing_loss,
    instruct,
    make_run,
    make_task,
    nan_loss,
    refused,
    update_of,
)


@pytest.fixture(autouse=True)
def _identity() -> None:
    assume_identity(1)


def test_who_trains_first_changes_nothing_for_those_who_train_later() -> None:
    task = make_task(model=lambda: nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3)))
    run = make_run(privacy=PRIVATE)
    app = app_of(task, run)
    replies = [app(instruct(task, run), context()) for _ in range(2)]
    first, later = (update_of(reply, task, run).weights for reply in replies)
    assert first.tobytes() == later.tobytes()


@pytest.mark.parametrize("kind", ["evaluate", STATISTICS])
def test_under_privacy_nothing_but_updates_leaves(kind: str) -> None:
    said = refused(ask(make_task(), make_run(privacy=PRIVATE), kind=kind))
    assert "this client trains with example-level privacy and releases no" in said


def test_a_private_update_carries_epsilon_and_no_loss() -> None:
    task, run = make_task(), make_run(privacy=PRIVATE)
    update = update_of(ask(task, run), task, run)
    assert set(update.metrics) == {EPSILON}
    assert 0 < update.metrics[EPSILON] <= 8


def test_epsilon_adds_up_over_rounds_until_the_client_declines() -> None:
    privacy = PRIVATE | {"noise_multiplier": 1.0, "max_epsilon": 8.0}
    task, run, node = make_task(), make_run(privacy=privacy), context()
    spent = []
    for number in range(1, 30):
        reply = ask(task, run, node=node, number=number)
        if reply.has_error():
            break
        spent.append(update_of(reply, task, run).metrics[EPSILON])
    assert len(spent) >= 2
    assert spent == sorted(set(spent))
    assert spent[-1] <= 8
    said = refused(reply, DECLINED)
    assert f"client 'anna' has spent epsilon {epsilon_text(spent[-1])} of 8" in said
    assert len(read_ledger(node).charges) == len(spent)


def test_automatic_noise_lasts_for_every_round() -> None:
    task, run, node = make_task(), make_run(privacy=PRIVATE), context()
    replies = [ask(task, run, node=node, number=number) for number in (1, 2, 3, 4)]
    assert [reply.has_error() for reply in replies] == [False, False, False, True]
    assert replies[3].error.code == DECLINED


def test_the_owner_has_the_last_word_on_epsilon() -> None:
    task, run, node = make_task(), make_run(privacy=PRIVATE), context()
    owner = OwnerPolicy(max_epsilon=1.0, target_delta=1e-5)
    update = update_of(ask(task, run, owner=owner, node=node), task, run)
    assert update.metrics[EPSILON] <= 1.0
    noise = read_ledger(node).charges[0].noise_multiplier
    ask(task, run, node=(free := context()))
    assert noise > 2 * read_ledger(free).charges[0].noise_multiplier
    fixed = make_run(privacy=PRIVATE | {"noise_multiplier": 0.5})
    said = refused(ask(task, fixed, owner=owner), DECLINED_BY_OWNER)
    assert "of 1 that its owner allows at delta 1e-05" in said


@pytest.mark.parametrize(
    ("owner", "code", "kind"),
    [
        (OPEN_POLICY, DECLINED, "BudgetExhausted"),
        (OwnerPolicy(max_epsilon=7.5), DECLINED_BY_OWNER, "OwnersBudgetExhausted"),
    ],
)
def test_a_device_that_declines_says_so_by_a_code_and_keeps_its_figures(
    owner: OwnerPolicy, code: int, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    # What the owner allows over all runs is spent by others; the run's own budget by itself.
    spent = Charge(1, 0.3, 1.0, 10)
    others = OtherRuns((spent,), 1e-3) if owner.max_epsilon else NO_OTHER_RUNS
    task, run, node = make_task(), make_run(privacy=PRIVATE | {"noise_multiplier": 5.0}), context()
    if not owner.max_epsilon:
        write_ledger(node, Ledger((spent,)))
    app = client_app(
        task,
        run,
        owner=owner,
        randomness=SystemEntropy(),
        durable=DurableLedger(others, lambda: None),
    )
    said = refused(app(instruct(task, run), node), code)
    assert said == f"client 'anna': {kind}; the client's log has the details"
    assert "would raise that to" in caplog.text


def test_an_owner_cannot_loosen_what_the_server_asks() -> None:
    task, run = make_task(), make_run(privacy=PRIVATE | {"noise_multiplier": 0.1})
    owner = OwnerPolicy(max_epsilon=1000.0, target_delta=0.5)
    assert "of 8 at delta 0.001" in refused(ask(task, run, owner=owner), DECLINED)


class Interrupted(torch.utils.data.Dataset[Any]):
    """Data at whose first look the process is told to end."""

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        raise KeyboardInterrupt


def test_the_ledger_is_charged_before_training_begins() -> None:
    task = make_task(client_data=lambda client, folder: Interrupted())
    run, node = make_run(privacy=PRIVATE), context()
    with pytest.raises(KeyboardInterrupt):
        ask(task, run, node=node)
    assert [charge.round for charge in read_ledger(node).charges] == [1]
    assert json.loads(str(node.state.config_records["fedcore.ledger"]["charges"]))


@pytest.mark.parametrize("loss", [failing_loss, nan_loss])
def test_a_loss_that_fails_under_privacy_sends_noise_as_planned(
    loss: Any, caplog: pytest.LogCaptureFixture
) -> None:
    task, run, node = make_task(loss=loss), make_run(privacy=PRIVATE), context()
    update = update_of(ask(task, run, node=node), task, run)
    start = pack(build_model(task, run).model)
    assert np.isfinite(update.weights).all()
    assert (update.weights != start).mean() > 0.9
    assert set(update.metrics) == {EPSILON}
    assert update.num_examples == COUNT
    assert [charge.round for charge in read_ledger(node).charges] == [1]
    assert f"{COUNT} examples in its batches had no finite gradient" in caplog.text


@pytest.mark.parametrize("spoilt", ["nan", "label", "odd shape", "unreadable"])
def test_one_bad_example_answers_in_the_same_form_as_none(spoilt: str) -> None:
    class Spoilt(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return COUNT

        def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
            inputs, target = data()[row]
            if row != 7:
                return inputs, target
            if spoilt == "unreadable":
                raise ValueError("could not convert string to float: 'patient 4711'")
            if spoilt == "label":
                return inputs, torch.tensor(17)
            return (torch.zeros(9) if spoilt == "odd shape" else inputs * float("nan")), target

    run = make_run(privacy=PRIVATE)
    forms = []
    for load in (lambda client, folder: data(), lambda client, folder: Spoilt()):
        task = make_task(client_data=load)
        reply = device_app(task, run)(instruct(task, run), context())
        update = update_of(reply, task, run)
        assert np.isfinite(update.weights).all()
        forms.append((update.num_examples, update.metrics, len(update.weights)))
    assert forms[0] == forms[1]


def test_a_private_device_sends_the_kind_of_an_error_and_keeps_its_text(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def load(client: str, folder: Any) -> Any:
        raise ValueError("could not convert string to float: 'patient 4711'")

    task = make_task(client_data=load)
    texts = {}
    for privacy in ({}, PRIVATE):
        run = make_run(privacy=privacy) if privacy else make_run()
        app = device_app(task, run)
        texts[bool(privacy)] = refused(app(instruct(task, run), context()))
    assert texts[True] == "client 'anna': DataError; the client's log has the details"
    assert "patient 4711" in texts[False]
    assert "patient 4711" in caplog.text


def test_a_charge_is_on_disk_before_any_example_is_read() -> None:
    """Whatever an example makes of the process then, what it shows by that is charged."""
    happened: list[str] = []

    class Rows:
        def __len__(self) -> int:
            return COUNT

        def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
            happened.append("read")
            return data()[row]  # type: ignore[no-any-return]

    def keep() -> None:
        happened.append(f"{len(read_ledger(node).charges)} charged")

    task = make_task(client_data=lambda client, folder: Rows())
    run, node = make_run(privacy=PRIVATE), context()
    app = device_app(task, run, keep=keep)
    update_of(app(instruct(task, run), node), task, run)
    assert happened[:2] == ["1 charged", "read"]


def test_nothing_is_trained_when_the_charge_cannot_be_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def keep() -> None:
        raise DiskFull("no room")

    trained: list[object] = []
    monkeypatch.setattr("fedcore.training.client.train_private", lambda *a, **k: trained.append(a))
    task, run = make_task(), make_run(privacy=PRIVATE)
    app = device_app(task, run, keep=keep)
    assert (
        refused(app(instruct(task, run), context()))
        == "client 'anna': DiskFull; the client's log has the details"
    )
    assert trained == []


@pytest.mark.parametrize(
    ("value", "mu"), [(3e36, 0.0), (1.1e6, 0.0), (float("nan"), 0.0), (0.1, 1e9)]
)
def test_what_no_training_leads_to_is_refused_before_the_ledger_is_charged(
    value: float, mu: float
) -> None:
    task, run, node = make_task(), make_run(privacy=PRIVATE), context()
    sent = instruct(task, run, mu=mu)
    weights = pack(build_model(task, run).model)
    weights[3] = value
    sent.content.array_records[ARRAYS] = weights_record(weights)
    said = refused(app_of(task, run)(sent, node))
    assert "InvalidUpdate: round 1: " in said
    assert read_ledger(node).charges == ()


def test_a_client_that_declines_is_not_charged() -> None:
    node = context()
    tight = make_run(privacy=PRIVATE | {"noise_multiplier": 0.1})
    refused(ask(make_task(), tight, node=node), DECLINED)
    assert read_ledger(node).charges == ()


def test_batch_norm_under_privacy_is_refused_before_the_ledger_is_charged() -> None:
    task = make_task(model=lambda: nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3)))
    node = context()
    said = refused(ask(task, make_run(privacy=PRIVATE), node=node))
    assert "UnsupportedLayer: model: example-level privacy does not support 0 (BatchNorm1d)" in said
    assert read_ledger(node).charges == ()


def test_more_memory_than_the_owner_allows_is_refused_before_the_ledger_is_charged() -> None:
    node = context()
    owner = OwnerPolicy(max_memory_bytes=100)
    said = refused(ask(make_task(), make_run(privacy=PRIVATE), owner=owner, node=node))
    assert "InsufficientMemory: training needs at least" in said
    assert read_ledger(node).charges == ()


def test_real_devices_draw_noise_that_no_seed_repeats() -> None:
    task, run = make_task(), make_run(privacy=PRIVATE)
    app = device_app(task, run)
    one, other = (
        update_of(app(instruct(task, run), context()), task, run).weights for _ in range(2)
    )
    assert not np.array_equal(one, other)
