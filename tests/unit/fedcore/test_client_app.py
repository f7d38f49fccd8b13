from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset

from fedcore.client_app import client_app
from fedcore.config import RunConfig
from fedcore.flower.identity import assume_identity
from fedcore.model import build_model, preprocess_bytes
from fedcore.owner import OPEN_POLICY, OwnerPolicy
from fedcore.privacy.ledger import NO_OTHER_RUNS, read_ledger
from fedcore.seeds import Simulated, SystemEntropy, torch_rng
from fedcore.task import Task
from fedcore.updates.messages import (
    ARRAYS,
    CONFIG,
    DECLINED,
    EPSILON,
    METRICS,
    NUM_EXAMPLES,
    REFUSED,
    STATISTICS,
    TRAIN_LOSS,
    Update,
    instruction_config,
    read_update,
    weights_record,
)
from fedcore.updates.pack import Vector, layout_of, pack

COUNT = 40
PRIVATE = {"unit": "example", "target_delta": 1e-3, "max_epsilon": 8.0}


@pytest.fixture(autouse=True)
def _identity() -> None:
    assume_identity(1)


def data(client: str = "anna") -> Any:
    rng = torch_rng(0, client)
    targets = torch.randint(3, (COUNT,), generator=rng)
    inputs = nn.functional.one_hot(targets, 6) + 0.1 * torch.randn(COUNT, 6, generator=rng)
    return TensorDataset(inputs, targets)


def make_task(**changed: Any) -> Task:
    values: dict[str, Any] = {
        "name": "tiny",
        "kind": "classification",
        "model": lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)),
        "clients": lambda folder: ["anna", "ben"],
        "client_data": lambda client, folder: data(client),
        "test_data": lambda folder: data("test"),
        "example_input": torch.zeros(6),
    }
    return Task(**values | changed)


def make_run(**changed: Any) -> RunConfig:
    values = {"name": "run", "task": "task.py", "federation": {"rounds": 3}}
    if "privacy" in changed:  # with every example in every step, noise is found at once
        values |= {"client": {"batch_size": COUNT}}
    return RunConfig.model_validate(values | changed)


def context(name: str = "anna") -> Context:
    return Context(
        run_id=1, node_id=2, node_config={"client": name}, state=RecordDict(), run_config={}
    )


def instruct(
    task: Task, run: RunConfig, *, number: int = 1, mu: float = 0.0, kind: str = "train"
) -> Message:
    model = build_model(task, run)
    config = instruction_config(layout_of(model.model), preprocess_bytes(model))
    config["server-round"] = number
    if mu:
        config["proximal-mu"] = mu
    return Message(RecordDict({ARRAYS: weights_record(pack(model.model)), CONFIG: config}), 2, kind)


def app_of(task: Task, run: RunConfig, owner: OwnerPolicy = OPEN_POLICY) -> ClientApp:
    return client_app(task, run, owner=owner, randomness=Simulated(run.seed))


def ask(
    task: Task,
    run: RunConfig,
    *,
    owner: OwnerPolicy = OPEN_POLICY,
    node: Context | None = None,
    **asked: Any,
) -> Message:
    return app_of(task, run, owner)(instruct(task, run, **asked), node or context())


def update_of(reply: Message, task: Task, run: RunConfig) -> Update:
    assert not reply.has_error(), reply.error
    return read_update(reply, layout_of(build_model(task, run).model))


def refused(reply: Message, code: int = REFUSED) -> str:
    assert reply.has_error()
    assert reply.error.code == code or (code == REFUSED and code < reply.error.code < code + 20)
    return str(reply.error.reason)


def trained(task: Task, run: RunConfig, **asked: Any) -> Vector:
    return update_of(ask(task, run, **asked), task, run).weights


def test_training_answers_with_better_weights_the_count_and_the_loss() -> None:
    task, run = make_task(), make_run(client={"epochs": 20, "batch_size": 8})
    update = update_of(ask(task, run), task, run)
    assert update.num_examples == COUNT
    assert set(update.metrics) == {TRAIN_LOSS}
    assert update.metrics[TRAIN_LOSS] < 0.5
    assert not np.array_equal(update.weights, pack(build_model(task, run).model))


def test_the_seed_the_round_and_the_client_fix_every_bit() -> None:
    task, run = make_task(), make_run(client={"batch_size": 4})
    base = trained(task, run).tobytes()
    assert trained(task, run).tobytes() == base
    assert trained(task, run, number=2).tobytes() != base
    assert trained(task, run, node=context("ben")).tobytes() != base


def test_dropout_is_drawn_from_the_seed_and_not_from_the_process() -> None:
    task = make_task(model=lambda: nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3)))
    state = torch.get_rng_state()
    one = trained(task, make_run())
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert trained(task, make_run()).tobytes() == one.tobytes()


def test_who_trains_first_changes_nothing_for_those_who_train_later() -> None:
    task = make_task(model=lambda: nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3)))
    run = make_run(privacy=PRIVATE)
    app = app_of(task, run)
    replies = [app(instruct(task, run), context()) for _ in range(2)]
    first, later = (update_of(reply, task, run).weights for reply in replies)
    assert first.tobytes() == later.tobytes()


def test_a_node_without_a_name_is_the_client_of_its_partition() -> None:
    task, run = make_task(), make_run()
    node = Context(1, 2, {"partition-id": 1}, RecordDict(), {})
    assert (
        trained(task, run, node=node).tobytes() == trained(task, run, node=context("ben")).tobytes()
    )


@pytest.mark.parametrize("config", [{}, {"partition-id": 2}, {"partition-id": -1}])
def test_a_node_that_is_no_client_is_refused(config: dict[str, Any]) -> None:
    node = Context(1, 7, config, RecordDict(), {})
    said = refused(ask(make_task(), make_run(), node=node))
    assert "node 7: partition-id = " in said
    assert "the task has 2 clients" in said


def test_the_proximal_term_keeps_the_update_near() -> None:
    task, run = make_task(), make_run(client={"epochs": 5})
    start = pack(build_model(task, run).model)
    free, near = trained(task, run), trained(task, run, mu=5.0)
    assert np.linalg.norm(near - start) < 0.5 * np.linalg.norm(free - start)


def test_what_is_held_back_is_never_trained_on_and_alone_judges() -> None:
    poisoned = data()
    federation = {"rounds": 1, "holdout": 0.25, "evaluate_cohort": 1}
    run = make_run(federation=federation, client={"batch_size": 1})
    seen: set[int] = set()

    class Spy(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return COUNT

        def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
            seen.add(row)
            return poisoned[row]  # type: ignore[no-any-return]

    task = make_task(client_data=lambda client, folder: Spy())
    update = update_of(ask(task, run), task, run)
    used = set(seen)
    assert len(used) == update.num_examples == 30
    seen.clear()
    reply = ask(task, run, kind="evaluate")
    assert reply.content.metric_records[METRICS][NUM_EXAMPLES] == 10
    assert len(seen) == 10
    assert not used & seen


def test_evaluation_scores_the_servers_weights() -> None:
    run = make_run(federation={"rounds": 1, "holdout": 0.5, "evaluate_cohort": 1})
    metrics = ask(make_task(), run, kind="evaluate").content.metric_records[METRICS]
    assert set(metrics) == {NUM_EXAMPLES, "accuracy"}
    assert 0 <= float(str(metrics["accuracy"])) <= 1


def test_evaluation_without_held_back_data_is_refused() -> None:
    said = refused(ask(make_task(), make_run(), kind="evaluate"))
    assert "client 'anna': InvalidUpdate: evaluation: this client holds no data back" in said


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
    assert f"client 'anna' has spent epsilon {spent[-1]:.2f} of 8" in said
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
    assert "of 1 at delta 1e-05" in refused(ask(task, fixed, owner=owner), DECLINED)


def test_an_owner_cannot_loosen_what_the_server_asks() -> None:
    task, run = make_task(), make_run(privacy=PRIVATE | {"noise_multiplier": 0.1})
    owner = OwnerPolicy(max_epsilon=1000.0, target_delta=0.5)
    assert "of 8 at delta 0.001" in refused(ask(task, run, owner=owner), DECLINED)


def failing_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    raise OSError("sensor unplugged")


def nan_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs.sum() * float("nan")


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
    assert f"{COUNT} examples had no finite gradient" in caplog.text


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
        reply = client_app(task, run, owner=OPEN_POLICY, randomness=SystemEntropy())(
            instruct(task, run), context()
        )
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
        app = client_app(task, run, owner=OPEN_POLICY, randomness=SystemEntropy())
        texts[bool(privacy)] = refused(app(instruct(task, run), context()))
    assert texts[True] == "client 'anna': DataError; its log says more"
    assert "patient 4711" in texts[False]
    assert "patient 4711" in caplog.text


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


def test_a_loss_that_turns_nan_sends_nothing() -> None:
    said = refused(ask(make_task(loss=nan_loss), make_run()))
    assert "client 'anna': TrainingDiverged: " in said
    assert "lower the learning rate" in said


def test_an_error_of_the_tasks_code_is_reported_with_the_clients_name() -> None:
    said = refused(ask(make_task(loss=failing_loss), make_run()))
    assert said == "client 'anna': the task raised OSError: sensor unplugged"


def test_weights_of_another_model_are_refused() -> None:
    run = make_run()
    sent = instruct(make_task(model=lambda: nn.Linear(6, 3)), run)
    said = refused(app_of(make_task(), run)(sent, context()))
    assert "TaskError: round 1: the server's weights have layout" in said
    assert "install the task that the server runs" in said


def test_weights_of_another_length_are_refused() -> None:
    task, run = make_task(), make_run()
    sent = instruct(task, run)
    sent.content.array_records[ARRAYS] = weights_record(np.zeros(3, np.float32))
    assert "got shape (3,), expected" in refused(app_of(task, run)(sent, context()))


def test_a_message_of_something_else_is_refused() -> None:
    said = refused(app_of(make_task(), make_run())(Message(RecordDict(), 2, "train"), context()))
    assert "lacks what a fedcore server sends" in said


def test_a_client_without_data_says_so() -> None:
    task = make_task(client_data=lambda client, folder: Subset(data(), []))
    said = refused(ask(task, make_run()))
    assert "client 'anna': DataError: data of client 'anna': it holds no examples" in said


def test_data_that_cannot_be_read_is_named() -> None:
    def load(client: str, folder: Any) -> Any:
        raise FileNotFoundError(f"no {client}.csv")

    said = refused(ask(make_task(client_data=load), make_run()))
    assert "reading it failed: FileNotFoundError: no anna.csv" in said


def test_batch_norm_under_privacy_is_refused_before_the_ledger_is_charged() -> None:
    task = make_task(model=lambda: nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3)))
    node = context()
    said = refused(ask(task, make_run(privacy=PRIVATE), node=node))
    assert "UnsupportedLayer: model: example-level privacy cannot take 0 (BatchNorm1d)" in said
    assert read_ledger(node).charges == ()


def test_more_memory_than_the_owner_allows_is_refused_before_the_ledger_is_charged() -> None:
    node = context()
    owner = OwnerPolicy(max_memory_bytes=100)
    said = refused(ask(make_task(), make_run(privacy=PRIVATE), owner=owner, node=node))
    assert "InsufficientMemory: training needs at least" in said
    assert read_ledger(node).charges == ()


def test_the_owner_may_limit_threads() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        trained(make_task(), make_run(), owner=OwnerPolicy(max_threads=2))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_the_owners_folder_is_where_data_is_read(tmp_path: Any) -> None:
    seen: list[Any] = []

    def load(client: str, folder: Any) -> Any:
        seen.append(folder)
        return data(client)

    trained(make_task(client_data=load), make_run(), owner=OwnerPolicy(data=str(tmp_path)))
    assert seen == [tmp_path]


def test_real_devices_draw_noise_that_no_seed_repeats() -> None:
    task, run = make_task(), make_run(privacy=PRIVATE)
    app = client_app(task, run, owner=OPEN_POLICY, randomness=SystemEntropy(), others=NO_OTHER_RUNS)
    one, other = (
        update_of(app(instruct(task, run), context()), task, run).weights for _ in range(2)
    )
    assert not np.array_equal(one, other)


def test_statistics_are_sums_behind_the_tasks_preprocessing() -> None:
    class Halve(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / 2

    task = make_task(preprocess=Halve)
    reply = app_of(task, make_run())(Message(RecordDict(), 2, STATISTICS), context())
    arrays = reply.content.array_records[ARRAYS]
    inputs = data().tensors[0].double() / 2
    assert np.allclose(arrays["sum"].numpy(), inputs.sum(0), rtol=1e-7)
    assert np.allclose(arrays["squares"].numpy(), inputs.square().sum(0), rtol=1e-6)
    assert reply.content.metric_records[METRICS][NUM_EXAMPLES] == COUNT
