"""What a client answers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, Message, RecordDict
from torch import Tensor, nn
from torch.utils.data import Subset

from fedcore.config.owner import OwnerPolicy
from fedcore.flower.identity import assume_identity
from fedcore.task.model import build_model
from fedcore.updates.messages import (
    ARRAYS,
    METRICS,
    NUM_EXAMPLES,
    STATISTICS,
    TRAIN_LOSS,
    weights_record,
)
from fedcore.updates.pack import pack
from tests.unit.fedcore.clients import (
    COUNT,
    app_of,
    ask,
    context,
    data,
    failing_loss,
    instruct,
    make_run,
    make_task,
    nan_loss,
    refused,
    trained,
    update_of,
)


@pytest.fixture(autouse=True)
def _identity() -> None:
    assume_identity(1)


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
    assert "the task has only 2 clients" in said


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
    reply = ask(make_task(), run, kind="evaluate").content
    assert dict(reply.metric_records[METRICS]) == {NUM_EXAMPLES: 20}
    right, wrong = reply.array_records[ARRAYS]["accuracy"].numpy()
    assert right + wrong == 20


def test_evaluation_without_held_back_data_is_refused() -> None:
    said = refused(ask(make_task(), make_run(), kind="evaluate"))
    assert "client 'anna': InvalidUpdate: evaluation: this client has no held-out data" in said


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
    assert "not a valid message of a fedcore server" in said


def test_a_client_without_data_says_so() -> None:
    task = make_task(client_data=lambda client, folder: Subset(data(), []))
    said = refused(ask(task, make_run()))
    assert "client 'anna': DataError: data of client 'anna': got no examples" in said


def test_data_that_cannot_be_read_is_named() -> None:
    def load(client: str, folder: Any) -> Any:
        raise FileNotFoundError(f"no {client}.csv")

    said = refused(ask(make_task(client_data=load), make_run()))
    assert "reading it failed: FileNotFoundError: no anna.csv" in said


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
