"""Every byte that a private client sends, with one example in its data and without it.

A server reads more than weights: whether an answer comes, of which kind, how long it is, and what
an error says. None of that may depend on an example. Hostile instructions and data sets are drawn
from a fixed seed; the example in question is then replaced by one that cannot be read.

An update holds, and nothing else: record ``arrays`` with one array ``model``, float32, as many
numbers as the model has, all finite; record ``metrics`` with ``num-examples``, which is public, and
``epsilon``, which follows from it. An error holds a code and a text of the kind of the error alone.
"""

from __future__ import annotations

import logging
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import recorddict_to_proto
from torch import nn

from fedcore.config.run import RunConfig
from fedcore.errors import InvalidUpdate
from fedcore.flower.identity import assume_identity
from fedcore.privacy.accounting import Charge
from fedcore.privacy.ledger import Ledger, read_ledger, write_ledger
from fedcore.task.definition import Task
from fedcore.task.model import FullModel, build_model, preprocess_bytes
from fedcore.updates.messages import (
    ARRAYS,
    CONFIG,
    DECLINED,
    EPSILON,
    METRICS,
    MODEL,
    NUM_EXAMPLES,
    REFUSED,
    STATISTICS,
    instruction_config,
    weights_record,
)
from fedcore.updates.pack import layout_of, pack
from tests.adversarial.hostile_rows import CLASSES, COUNT, SECRET, WIDTH, data_sets
from tests.unit.fedcore.clients import device_app

PAIRS = int(os.environ.get("FEDCORE_HOSTILE_PAIRS", "500"))
"""How many instructions and data sets are drawn; 10,000 take some minutes."""
_HIDDEN = re.compile(r"client 'anna': [A-Za-z]+; the client's log has the details")


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    assume_identity(1)
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


# Clients, and what a server may ask of them.


@dataclass
class Site:
    """A client's app, whose data are put in before each message."""

    run: RunConfig
    model: FullModel
    app: ClientApp
    data: list[Any] = field(default_factory=list)

    def answer(self, examples: Any, asked: Message, ledger: Ledger) -> tuple[Message, Context]:
        self.data[:] = [examples]
        node = Context(1, 2, {"client": "anna"}, RecordDict(), {})
        write_ledger(node, ledger)
        return self.app(asked, node), node


def _dense() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 4), nn.ReLU(), nn.Linear(4, CLASSES))


def _dropout() -> nn.Module:
    return nn.Sequential(
        *(nn.Linear(WIDTH, 4), nn.LayerNorm(4), nn.Dropout(0.5), nn.Linear(4, CLASSES))
    )


class _Branching(nn.Module):
    """Allocates, raises and branches by what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, CLASSES)
        self.seen = 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        largest = float(x.detach().abs().max())
        if largest > 1e19:
            torch.zeros(int(min(largest, 1e18)))
        if largest > 1e3:
            raise ValueError(SECRET)
        if largest > 10:
            self.seen += largest
        return self.head(x + self.seen)  # type: ignore[no-any-return]


class _Allocating(nn.Module):
    """A preprocessing that asks for as much memory as a value says."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        largest = float(x.nan_to_num().abs().max())
        return x + torch.zeros(int(min(largest, 1e18)) if largest > 1e10 else 1)[:1]


def _site(
    model: Callable[[], nn.Module],
    before: Callable[[], nn.Module] | None = None,
    **changed: dict[str, Any],
) -> Site:
    values: dict[str, dict[str, Any]] = {
        "client": {"batch_size": COUNT, "learning_rate": 0.1, "device": "cpu"},
        "privacy": {"unit": "example", "target_delta": 1e-3, "noise_multiplier": 1.0},
        "federation": {"rounds": 3},
    }
    for section, more in changed.items():
        values[section] = values[section] | more
    run = RunConfig.model_validate({"name": "run", "task": "task.py", **values})
    data: list[Any] = []
    task = Task(
        name="tiny",
        kind="classification",
        model=model,
        clients=lambda folder: ["anna"],
        client_data=lambda client, folder: data[0],
        test_data=lambda folder: data[0],
        example_input=torch.zeros(WIDTH),
        preprocess=before,
    )
    app = device_app(task, run)
    return Site(run, build_model(task, run), app, data)


def sites() -> list[Site]:
    return [
        _site(_dense),
        _site(_dense, client={"learning_rate": 1e6, "epochs": 3}),
        _site(_dense, client={"optimizer": "adam", "learning_rate": 1e6, "weight_decay": 1e3}),
        _site(_dense, client={"momentum": 0.99, "epochs": 2}),
        _site(_dense, client={"batch_size": 2}, privacy={"clip_norm": 1e-6}),
        _site(_dense, privacy={"clip_norm": 1e6}, federation={"normalisation": "cloud"}),
        _site(_dropout, client={"epochs": 2}),
        _site(_dropout, federation={"normalisation": "cloud"}),
        _site(_Branching, client={"epochs": 2}),
        _site(_dense, _Allocating),
    ]


def _weights(model: FullModel, dice: random.Random) -> ArrayRecord:
    values = pack(model.model).copy()
    place = dice.randrange(len(values))
    match dice.randrange(12):
        case 0 | 1 | 2 | 3:
            pass
        case 4:
            values = (np.sign(values) * 1e6).astype(np.float32)
        case 5:
            values = (values * np.float32(10.0 ** dice.uniform(-40, 6))).astype(np.float32)
        case 6:
            values[:] = 0
        case 7:
            values[:] = dice.choice([1e6, -1e6, 1e-45])
        case 8:
            values[place] = dice.choice([float("nan"), float("inf"), 1e7, 3e36])
        case 9:
            values[place] = dice.choice([1e6, -1e6, 1e5])
        case 10:
            values = values[: dice.randrange(len(values))]
        case 11:
            odd = values.astype(dice.choice([np.float64, np.float16, np.int32]))
            return ArrayRecord({MODEL: Array(odd)})
    return weights_record(values)


def _statistics_sent(model: FullModel, dice: random.Random) -> bytes:
    raw = preprocess_bytes(model)
    if dice.random() < 0.05:
        return dice.choice([b"", b"no safetensors", raw[: len(raw) // 2], raw + b"0"])
    if not raw:
        return raw
    state = model.preprocess.state_dict()
    kept = {name: tensor.clone() for name, tensor in state.items()}
    hostile = [0.0, 1.0, 1e-40, 1e12, -1e12, 1e13, float("nan"), float("inf")]
    for tensor in state.values():
        if dice.random() < 0.5:
            tensor.view(-1)[dice.randrange(tensor.numel())] = dice.choice(hostile)
    raw = preprocess_bytes(model)
    model.preprocess.load_state_dict(kept)
    return raw


def instruction(site: Site, dice: random.Random) -> Message:
    layout = layout_of(site.model.model)
    config = instruction_config(layout, _statistics_sent(site.model, dice))
    config["server-round"] = dice.choice([1] * 10 + [2, 0, 10**7, -5, 10**9])
    if dice.random() < 0.3:
        config["proximal-mu"] = dice.choice([0.0, 1.0, 1e6, 1e7, -1.0, float("nan"), float("inf")])
    if dice.random() < 0.04:
        key = dice.choice(["layout", "server-round", "preprocess"])
        config[key] = dice.choice(["", "x", 1.5, b"x"])
    content = RecordDict({ARRAYS: _weights(site.model, dice), CONFIG: ConfigRecord(dict(config))})
    if dice.random() < 0.02:
        del content[dice.choice([ARRAYS, CONFIG])]
    kind = dice.choice(["train"] * 12 + ["evaluate", STATISTICS])
    return Message(content, 2, kind)


# What a server sees.


def form(reply: Message) -> tuple[Any, ...]:
    """All of a reply but the trained weights, of which their number and that they are finite."""
    if reply.has_error():
        return reply.error.code, reply.error.reason
    content = reply.content
    assert {name: set(record) for name, record in content.items()} == {
        ARRAYS: {MODEL},
        METRICS: {NUM_EXAMPLES, EPSILON},
    }
    array = content.array_records[ARRAYS][MODEL]
    values = array.numpy()
    assert values.dtype == np.float32
    assert np.isfinite(values).all()
    metrics = content.metric_records[METRICS]
    assert [type(metrics[name]) for name in (NUM_EXAMPLES, EPSILON)] == [int, float]
    blank = Array(array.dtype, array.shape, array.stype, bytes(len(array.data)))
    content[ARRAYS] = ArrayRecord({MODEL: blank})
    return "update", array.data[:128], recorddict_to_proto(content).SerializeToString()


def check_error(code: int, reason: str) -> None:
    assert SECRET not in reason
    assert code == DECLINED or REFUSED < code < REFUSED + 40
    assert _HIDDEN.fullmatch(reason), reason


def test_the_bytes_have_the_same_form_with_an_example_and_without() -> None:
    dice, seen = random.Random(12), Counter[str]()
    all_sites = sites()
    for number in range(PAIRS):
        site = dice.choice(all_sites)
        asked = instruction(site, dice)
        spent = Charge(1, 1.0, 1.0, dice.choice([0, 0, 0, 0, 0, 0, 1, 10_000]))
        replies = []
        for examples in data_sets(dice):
            reply, node = site.answer(examples, asked, Ledger((spent,)))
            replies.append((*form(reply), len(read_ledger(node).charges)))
        assert replies[0] == replies[1], number
        *found, charges = replies[0]
        if found[0] == "update":
            assert charges == 2  # spent before it left
            seen["update"] += 1
        else:
            check_error(*found)
            seen[str(found[0])] += 1
    # The draw reaches all kinds of answers, and mostly those that tell most.
    assert seen["update"] > PAIRS / 3
    assert {str(DECLINED), str(REFUSED + InvalidUpdate.exit_code)} <= seen.keys()


def test_a_loader_that_fails_says_nothing_of_why() -> None:
    site = _site(_dense)

    class Broken:
        def __len__(self) -> int:
            raise ValueError(SECRET)

    asked = instruction(site, random.Random(0))
    reply, node = site.answer(Broken(), asked, Ledger())
    check_error(reply.error.code, str(reply.error.reason))
    assert not read_ledger(node).charges


@pytest.mark.parametrize("kind", ["evaluate", STATISTICS])
def test_a_private_client_answers_no_other_question(kind: str) -> None:
    dice, site = random.Random(1), _site(_dense)
    asked = Message(instruction(site, dice).content, 2, kind)
    answers = set()
    for _ in range(20):
        for examples in data_sets(dice):
            reply, _ = site.answer(examples, asked, Ledger())
            answers.add((reply.error.code, reply.error.reason))
    assert len(answers) == 1
    check_error(*answers.pop())
