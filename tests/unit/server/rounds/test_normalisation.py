from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Context, Error, Message, MetricRecord, RecordDict
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, TensorDataset

from fedcore.client_app import client_app
from fedcore.config.owner import OPEN_POLICY
from fedcore.config.run import RunConfig
from fedcore.errors import ConfigError, DataError, RoundFailed
from fedcore.flower.grid import InProcessGrid
from fedcore.flower.identity import assume_identity
from fedcore.seeds import Simulated, torch_rng
from fedcore.task.definition import Task
from fedcore.task.model import FullModel, Standardise, build_model, standardise_of
from fedcore.training.roles import is_judge
from fedcore.updates.messages import ARRAYS, METRICS, NUM_EXAMPLES
from server.cloud import CloudData
from server.rounds.normalisation import normalise
from server.rounds.peers import NumberedPeers
from server.rounds.roles import Roles

CLIENTS = ["anna", "ben", "carl"]
Handler = Callable[[Message], Message]


class Halve(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 2


def data(client: str) -> Any:
    """Features of very different scales; the third is the same for everyone."""
    rng = torch_rng(0, client)
    count = 30 + 20 * CLIENTS.index(client)
    scale, shift = torch.tensor([1.0, 1000.0, 0.0, 0.01]), torch.tensor([0.0, -5000.0, 7.0, 3.0])
    inputs = scale * (torch.randn(count, 4, generator=rng) + CLIENTS.index(client)) + shift
    return TensorDataset(inputs, torch.zeros(count, dtype=torch.long))


TASK = Task(
    name="tiny",
    kind="classification",
    model=lambda: nn.Linear(4, 2),
    preprocess=Halve,
    clients=lambda folder: CLIENTS,
    client_data=lambda client, folder: data(client),
    test_data=lambda folder: data("anna"),
    example_input=torch.zeros(4),
)
POOLED: Any = ConcatDataset([data(client) for client in CLIENTS])
CLOUD = CloudData(POOLED, POOLED)


def make_run(normalisation: str, **more: Any) -> RunConfig:
    federation = {"normalisation": normalisation} | more
    return RunConfig.model_validate({"name": "run", "task": "x", "federation": federation})


def clients(run: RunConfig) -> Handler:
    app = client_app(TASK, run, owner=OPEN_POLICY, randomness=Simulated(0))

    def handle(message: Message) -> Message:
        node = message.metadata.dst_node_id
        config = {"client": CLIENTS[node - 10]}
        return app(message, Context(1, node, config, RecordDict(), {}))

    return handle


def fitted(
    run: RunConfig,
    *,
    cloud: CloudData | None = None,
    handle: Handler | None = None,
    nodes: Sequence[int] = (10, 11, 12),
    notes: list[str] | None = None,
) -> FullModel:
    assume_identity(1)
    model = build_model(TASK, run)
    grid = InProcessGrid(1, nodes, handle or clients(run))
    normalise(
        run,
        model,
        grid,
        cloud,
        NumberedPeers(),
        Roles(run.federation, lambda node: CLIENTS[node - 10]),
        notes.append if notes is not None else print,
    )
    return model


def pooled() -> Tensor:
    return torch.cat([data(client).tensors[0] for client in CLIENTS]) / 2


def test_sums_over_clients_give_what_the_pooled_data_gives() -> None:
    part = standardise_of(fitted(make_run("federated")))
    values = pooled().double()
    deviation = values.std(0, correction=0)
    deviation[2] = 1.0  # a constant is shifted, not blown up
    assert torch.allclose(part.mean.double(), values.mean(0), rtol=1e-6, atol=1e-6)
    assert torch.allclose(part.deviation.double(), deviation, rtol=1e-6, atol=1e-6)


def test_the_cloud_gives_the_same_from_the_same_data() -> None:
    federated = standardise_of(fitted(make_run("federated")))
    cloud = standardise_of(fitted(make_run("cloud"), cloud=CLOUD))
    assert torch.allclose(federated.mean, cloud.mean, rtol=1e-6)
    assert torch.allclose(federated.deviation, cloud.deviation, rtol=1e-6)


@pytest.mark.parametrize("normalisation", ["federated", "cloud"])
def test_inputs_come_out_with_mean_zero_and_deviation_one(normalisation: str) -> None:
    model = fitted(make_run(normalisation), cloud=CLOUD)
    values = model.preprocess(2 * pooled()).double()
    assert values.mean(0).abs().max() < 1e-3
    assert (values.std(0, correction=0) - torch.tensor([1, 1, 0, 1])).abs().max() < 1e-3


def test_by_default_the_tasks_own_preprocessing_stands_alone() -> None:
    def nobody(message: Message) -> Message:
        raise AssertionError("no client is asked")

    model = fitted(make_run("task"), handle=nobody)
    assert not [m for m in model.modules() if isinstance(m, Standardise)]


def test_cloud_statistics_need_cloud_data() -> None:
    with pytest.raises(ConfigError, match="the task has no cloud_data"):
        fitted(make_run("cloud"))


def test_only_what_is_not_held_back_is_summed() -> None:
    run = make_run("federated", holdout=0.5, evaluate_cohort=1)
    whole, part = fitted(make_run("federated")), fitted(run)
    assert not torch.equal(standardise_of(whole).mean, standardise_of(part).mean)


def test_clients_that_hold_back_all_of_their_data_are_not_asked_for_sums() -> None:
    """Their sums would make the model's inputs know them."""
    run = make_run("federated", holdout=0.5, holdout_by="clients", evaluate_cohort=2)
    judges = [name for name in CLIENTS if is_judge(run.federation, name)]
    assert 0 < len(judges) < len(CLIENTS)
    asked: list[int] = []

    def watched(message: Message) -> Message:
        asked.append(message.metadata.dst_node_id)
        return clients(run)(message)

    part = standardise_of(fitted(run, handle=watched))
    assert asked == [10 + place for place, name in enumerate(CLIENTS) if name not in judges]
    rows = [data(name).tensors[0] for name in CLIENTS if name not in judges]
    assert torch.allclose(part.mean.double(), (torch.cat(rows) / 2).double().mean(0), rtol=1e-6)


def answer(total: Any, squares: Any, count: Any = 10) -> Handler:
    def handle(message: Message) -> Message:
        arrays = ArrayRecord({"sum": Array(total), "squares": Array(squares)})
        record = RecordDict({ARRAYS: arrays, METRICS: MetricRecord({NUM_EXAMPLES: count})})
        return Message(record, reply_to=message)

    return handle


def failing(message: Message) -> Message:
    return Message(Error(1002, "client 'ben': no data"), reply_to=message)


GOOD = np.full(4, 5.0)
BAD: dict[str, Handler] = {
    "an error": failing,
    "nothing": lambda message: Message(RecordDict(), reply_to=message),
    "NaN": answer(np.array([1, np.nan, 1, 1]), GOOD),
    "another shape": answer(np.zeros(5), GOOD),
    "a number": answer(np.array(1.0), GOOD),
    "another dtype": answer(GOOD.astype(np.float32), GOOD),
    "negative examples": answer(GOOD, GOOD, -10),
    "bytes that are no array": lambda message: Message(
        RecordDict(
            {
                ARRAYS: ArrayRecord(
                    {
                        name: Array("float64", (4,), "numpy.ndarray", b"?")
                        for name in ("sum", "squares")
                    }
                ),
                METRICS: MetricRecord({NUM_EXAMPLES: 10}),
            }
        ),
        reply_to=message,
    ),
}


def one_bad(bad: Handler, good: Handler) -> Handler:
    return lambda message: (bad if message.metadata.dst_node_id == 11 else good)(message)


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
def test_sums_that_cannot_be_used_are_left_out(bad: Handler) -> None:
    run = make_run("federated", quorum=0.6)
    model = fitted(run, handle=one_bad(bad, answer(np.full(4, 20.0), np.full(4, 50.0))))
    part = standardise_of(model)
    assert part.mean.tolist() == [2.0] * 4
    assert part.deviation.tolist() == [1.0] * 4  # 5 - 2**2


def test_too_few_answers_end_the_run_with_a_reason() -> None:
    run = make_run("federated", quorum=0.8)
    with pytest.raises(
        RoundFailed, match=r"2 of 3 clients sent usable sums.*First: client 'ben': no"
    ):
        fitted(run, handle=one_bad(failing, answer(GOOD, GOOD)))


def test_squares_that_rounding_took_below_the_mean_do_not_make_nan() -> None:
    model = fitted(make_run("federated"), handle=answer(np.full(4, 10.0), np.full(4, 10.0 - 1e-14)))
    assert standardise_of(model).deviation.tolist() == [1.0] * 4


def likely(node: int) -> Handler:
    """Sums of 100 examples around ``node`` / 10, of deviation one."""
    mean = np.full(4, node / 10)
    return answer(100 * mean, 100 * (1 + mean**2), 100)


def with_liar(liar: Handler, count: int) -> Handler:
    def handle(message: Message) -> Message:
        node = message.metadata.dst_node_id
        return (liar if node == 10 + count - 1 else likely(node))(message)

    return handle


LIARS: dict[str, Handler] = {
    "1e300": answer(np.full(4, 1e300), np.full(4, 1e300), 100),
    "infinite after adding": answer(np.full(4, 1.7e308), np.full(4, 1.7e308), 2**31 - 1),
    "negative squares": answer(np.zeros(4), np.full(4, -5.0), 100),
    "sums larger than squares allow": answer(np.full(4, 1e6), np.full(4, 1.0), 100),
    "one row of 1e20": answer(np.full(4, 1e20), np.full(4, 1e40), 100),
}


@pytest.mark.parametrize("name", LIARS)
def test_sums_that_no_inputs_have_are_refused(name: str) -> None:
    nodes = range(10, 14)
    run = make_run("federated", quorum=0.7)
    part = standardise_of(fitted(run, handle=with_liar(LIARS[name], 4), nodes=nodes))
    assert torch.allclose(part.mean, torch.tensor(1.1))
    assert part.deviation.isfinite().all()


def test_whose_sums_were_not_used_is_said() -> None:
    notes: list[str] = []
    run = make_run("federated", quorum=0.7)
    handle = with_liar(LIARS["one row of 1e20"], 4)
    fitted(run, handle=handle, nodes=range(10, 14), notes=notes)
    assert len(notes) == 1
    assert (
        "without 1 of 4 clients, whose sums could not be used. First: sums from node 13" in notes[0]
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e20])
def test_the_cloud_is_blamed_for_its_own_data(value: float) -> None:
    inputs = torch.randn(40, 4, generator=torch_rng(0))
    inputs[17, 2] = value
    spoilt: Any = TensorDataset(inputs, torch.zeros(40, dtype=torch.long))
    with pytest.raises(DataError, match="example 17 of the cloud's training data"):
        fitted(make_run("cloud"), cloud=CloudData(spoilt, spoilt))


@pytest.mark.parametrize("value", [-999_999.0, 1e6, 1e11])
def test_one_whose_inputs_are_far_from_all_others_is_left_out_and_named(value: float) -> None:
    """One row of a hundred with a value that stands for "missing"."""
    notes: list[str] = []
    liar = answer(np.full(4, 50 + value), np.full(4, 100 + value**2), 100)
    run = make_run("federated", quorum=0.7)
    model = fitted(run, handle=with_liar(liar, 10), nodes=range(10, 20), notes=notes)
    part = standardise_of(model)
    assert part.mean.abs().max() < 2
    assert part.deviation.max() < 2
    assert len(notes) == 1
    assert "excludes the inputs of node 19" in notes[0]


def test_clients_of_different_kinds_are_all_counted() -> None:
    notes: list[str] = []
    fitted(make_run("federated"), notes=notes)
    assert notes == []


def test_one_who_claims_most_of_the_examples_does_not_decide_alone() -> None:
    notes: list[str] = []
    count = 2**31 - 1
    liar = answer(np.full(4, 20.0 * count), np.full(4, 500.0 * count), count)
    run = make_run("federated", quorum=0.7)
    model = fitted(run, handle=with_liar(liar, 10), nodes=range(10, 20), notes=notes)
    assert standardise_of(model).mean.abs().max() < 2
    assert "excludes the inputs of node 19" in notes[0]


def test_one_who_has_most_of_the_examples_and_is_like_the_others_counts_in_full() -> None:
    notes: list[str] = []
    large = answer(np.full(4, 1.5e6), np.full(4, 1e6 * (1 + 1.5**2)), 10**6)
    model = fitted(
        make_run("federated"), handle=with_liar(large, 10), nodes=range(10, 20), notes=notes
    )
    assert notes == []
    assert torch.allclose(standardise_of(model).mean, torch.tensor(1.5), atol=1e-3)
