"""Whole replies that an enrolled device may make up: each is taken as it should be, or refused.

A reply is drawn record by record, near enough to an honest one that every check is reached: names
that no text holds, numbers out of every range, arrays announced as what they are not. Whatever
comes, no error but the typed refusal leaves the boundary, what is said of it can be printed, what
is taken can be hashed, kept and read back, and the round goes on with the honest clients beside it.
"""

from __future__ import annotations

import io
import math
import os
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedcore.config.run import RunConfig
from fedcore.errors import InvalidUpdate
from fedcore.flower.identity import assume_identity
from fedcore.task.metrics import ACCURACY, RMSE, Metric
from fedcore.updates.evaluation import UNDEFINED
from fedcore.updates.messages import ARRAYS, METRICS, MODEL, NUM_EXAMPLES, Update, update_content
from fedcore.updates.pack import Layout
from fedcore.updates.replies import Reply, ReplySpec, check_structure, read_reply
from fedcore.updates.seal import content_digest
from server.live.journal.journal import create
from server.live.rounds.journaled import JournalCheckpointer
from server.rounds.aggregation.norm_bound import NormBound
from server.rounds.checkpointing.checkpointer import NoCheckpoints
from server.rounds.expected import evaluation_spec, sums_spec, update_spec
from server.rounds.inbound import Intake, Tally, accepted
from tests.unit.server.live.journal.journals import signed
from tests.unit.server.rounds.aggregating import fold, hold

REPLIES = int(os.environ.get("FEDCORE_HOSTILE_REPLIES", "10000"))
"""How many replies are drawn; a million takes an hour or so."""
TOGETHER = 8  # replies of a round
SIZE = 5
LAYOUT = Layout(("weight",), ((SIZE,),))
BASE = np.zeros(SIZE, np.float32)
RUN = RunConfig.model_validate({"name": "run", "task": "task.py"})
PRIVATE = RunConfig.model_validate(
    {"name": "run", "task": "task.py", "privacy": {"unit": "both", "client": {"clip_norm": 1.0}}}
)
QUESTIONS = (
    update_spec(RUN, LAYOUT),
    update_spec(PRIVATE, LAYOUT),
    evaluation_spec([ACCURACY, RMSE, Metric("bias", lambda *_: 0.0, False)], (2,)),
    sums_spec((2, 3)),
)
MAX_SAID = 2000  # characters of a line of the log


@pytest.fixture(autouse=True)
def _identity() -> None:
    assume_identity(1)


NAMES = st.sampled_from(
    [
        *(ARRAYS, METRICS, MODEL, NUM_EXAMPLES, "train_loss", "epsilon", "accuracy", "rmse"),
        *(
            "sum",
            "squares",
            "envelope",
            "config",
            "unclipped",
            "",
            "a\ud800",
            "\x1b[2J\n",
            "\u202e",
        ),
        *("x" * 200, "a" * 100_000, "\0", "naïve"),
    ]
) | st.text(max_size=6)
FLOATS = st.floats(width=64) | st.sampled_from([1.7e308, -1.7e308, 1e300, math.nan, math.inf, 0.5])
INTEGERS = st.integers(-(2**63), 2**63 - 1) | st.integers(1, 100)
COUNTS = st.integers(1, 2**31 - 1) | INTEGERS | FLOATS | st.lists(st.integers(0, 3), max_size=2)
NUMBERS = FLOATS | INTEGERS | st.lists(FLOATS, min_size=1, max_size=3)
TYPES = st.sampled_from(["float32", "float64", "int64", "object", "a\ud800", "x" * 500, "", "\x1b"])
SHAPES = st.sampled_from([(SIZE,), (2, 3), (), (0,), (1,) * 5000, (2**40,), (-1,), (2**80,)])


def npy(values: np.ndarray[Any, Any], version: tuple[int, int] = (1, 0)) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, values, version=version, allow_pickle=False)
    return stream.getvalue()


def header(text: str) -> bytes:
    raw = text.encode()
    return b"\x93NUMPY\x02\x00" + len(raw).to_bytes(4, "little") + raw


BYTES = st.one_of(
    st.binary(max_size=300),
    st.lists(st.floats(width=32), min_size=SIZE, max_size=SIZE).map(
        lambda values: npy(np.array(values, np.float32))
    ),
    st.lists(st.floats(), min_size=6, max_size=6).map(
        lambda values: npy(np.array(values).reshape(2, 3))
    ),
    st.sampled_from(
        [
            npy(np.ones(SIZE, np.float32), (2, 0)),
            npy(np.ones(SIZE, ">f4")),
            npy(np.full(SIZE, 3e38, np.float32)),
            npy(np.ones((2, 3), order="F")),
            npy(np.ones(SIZE, np.float32))[:-1],
            npy(np.ones(SIZE, np.float32)) + b"more",
            header("{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,), }\n"),
            header("{'descr': '|V0', 'fortran_order': False, 'shape': (4611686018427387904,), }\n"),
            header("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }\n") + b"cos\nsystem\n",
            header("{'descr': '<f4', 'fortran_order': False, 'shape': (" + "9" * 4000 + ",), }\n"),
            header("-" * 9000 + "1"),
            header("[" * 5000),
        ]
    ),
)


@st.composite
def arrays(draw: st.DrawFn) -> Array:
    array = Array("float32", (SIZE,), "numpy.ndarray", draw(BYTES))
    if draw(st.integers(0, 3)) == 0:
        array.dtype = draw(TYPES)
    if draw(st.integers(0, 3)) == 0:
        array.shape = draw(SHAPES)
    if draw(st.integers(0, 7)) == 0:
        array.stype = draw(TYPES)
    return array


SETTINGS = st.binary(max_size=20) | st.text(max_size=5) | st.booleans() | NUMBERS
RECORDS = st.one_of(
    st.dictionaries(NAMES, NUMBERS, max_size=4),
    st.dictionaries(NAMES, arrays(), max_size=3),
    st.dictionaries(NAMES, SETTINGS, max_size=3),
)


def as_record(values: dict[str, Any]) -> Any:
    there = {name: value for name, value in values.items() if isinstance(value, Array)}
    if there:
        return ArrayRecord(there)
    if any(isinstance(value, bytes | str | bool) for value in values.values()):
        return ConfigRecord(values)
    return MetricRecord(values)


@st.composite
def contents(draw: st.DrawFn) -> RecordDict:
    """A reply: an honest one, of which some parts are made up."""
    asked = draw(st.sampled_from(QUESTIONS))
    metrics: dict[str, Any] = {NUM_EXAMPLES: 3}
    metrics |= dict.fromkeys(asked.metrics, 0.5)
    held: dict[str, Any] = {METRICS: metrics}
    forms = asked.forms(())
    if forms:
        held[ARRAYS] = {
            name: Array(np.full(form.shape, 0.5, form.dtype)) for name, form in forms.items()
        }
    if asked.every_metric and draw(st.booleans()):
        held[UNDEFINED] = draw(st.dictionaries(NAMES, SETTINGS, max_size=2))
    for _ in range(draw(st.integers(0, 3))):
        what = draw(st.integers(0, 6))
        if what == 0:
            metrics[NUM_EXAMPLES] = draw(COUNTS)
        elif what == 1:
            metrics[draw(NAMES)] = draw(NUMBERS)
        elif what == 2 and ARRAYS in held:
            held[ARRAYS][draw(st.just(MODEL) | NAMES)] = draw(arrays())
        elif what == 3:
            held[draw(NAMES)] = draw(RECORDS)
        elif what == 4:
            held.pop(draw(st.sampled_from([*held])), None)
        elif what == 5:
            metrics.update({f"m{place}": 1.0 for place in range(draw(st.integers(1, 400)))})
        elif metrics:
            metrics.pop(draw(st.sampled_from([*metrics])), None)
        if not held:
            break
    return RecordDict({name: as_record(values) for name, values in held.items()})


def reply_to(node: int, content: RecordDict | Error, kind: str = "train") -> Message:
    asked = Message(RecordDict(), node, "train")
    reply = Message(content, reply_to=asked)
    reply.metadata.__dict__["_message_type"] = kind
    return reply


KINDS = st.sampled_from(["train"] * 12 + ["evaluate", "query.statistics", "query.\x1b[31m", ""])
ERRORS = st.builds(
    Error,
    st.sampled_from([0, 1001, 1100, 1107, 2**62, -5]),
    st.none() | NAMES | st.just("\x1b]0;x\x07\nFAKE \u202e" + "A" * 10_000),
)


def can_be_printed(text: str) -> bool:
    return text.isprintable() and len(text) <= MAX_SAID and bool(text.encode())


@settings(
    max_examples=REPLIES // 2,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
)
@given(contents(), st.sampled_from(QUESTIONS), KINDS)
def test_a_reply_is_read_or_refused_in_words(
    content: RecordDict, asked: ReplySpec, kind: str
) -> None:
    reply = reply_to(4, content, asked.purpose if kind == "train" else kind)
    said, found = "", None
    try:
        check_structure(content, where="reply from client 'x'")
    except InvalidUpdate as error:
        said = str(error)
    else:
        content_digest(content)  # a signature can be looked at
    try:
        found = read_reply(reply, asked, where="update from client 'x'")
    except InvalidUpdate as error:
        assert can_be_printed(said or str(error))  # noqa: PT017 - either comes of an input
        return
    assert not said
    assert 0 < found.num_examples < 2**31
    assert found.metrics.keys() <= asked.metrics.keys()
    for name, value in found.metrics.items():
        assert asked.metrics[name].low <= value <= asked.metrics[name].high
    assert found.undefined.keys() <= asked.optional
    assert all(map(can_be_printed, found.undefined.values()))
    forms = asked.forms(found.undefined)
    assert found.arrays.keys() == forms.keys()
    for name, form in forms.items():
        values = found.values(name)
        assert (str(values.dtype), values.shape) == (form.dtype, form.shape)
        assert np.isfinite(values).all()
        assert np.concatenate([*found.parts(name)]).tobytes() == values.tobytes()
        if name in asked.sums:
            assert (values >= asked.sums[name].low).all()
            assert np.abs(values).sum() <= asked.sums[name].total * found.num_examples * 1.001


def honest(node: int) -> Message:
    update = Update(BASE + np.float32(0.1), 3, {"train_loss": 0.5})
    return reply_to(node, update_content(update))


@settings(
    max_examples=REPLIES // 2 // TOGETHER,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
)
@given(
    made_up=st.lists(st.tuples(contents() | ERRORS, KINDS), min_size=TOGETHER, max_size=TOGETHER),
    folds=st.booleans(),
    keeps=st.integers(0, 3),
)
def test_a_round_goes_on_whatever_some_of_its_devices_send(
    tmp_path_factory: pytest.TempPathFactory,
    made_up: list[tuple[RecordDict | Error, str]],
    folds: bool,
    keeps: int,
) -> None:
    replies = [reply_to(10 + node, *one) for node, one in enumerate(made_up)]
    replies += map(honest, range(1, 6))
    notes: list[str] = []
    tally, checkpointer = Tally(len(replies)), NoCheckpoints()
    intake = Intake(QUESTIONS[0], checkpointer=checkpointer, base=BASE, on_note=notes.append)
    if keeps:  # a journal takes most of the time
        taken = list(accepted(([one] for one in replies), intake, tally, first=len(replies)))
    else:
        taken = _journaled(tmp_path_factory.mktemp("journal"), replies, intake, tally)
    bound = NormBound(BASE, None)
    if folds:
        mean = fold(iter(taken), LAYOUT, tally, uniform=True, bound=bound).mean()
        assert np.isfinite(mean).all()
    else:
        hold(iter(taken), tally, uniform=True, bound=bound)
    assert {1, 2, 3, 4, 5} <= {reply.metadata.src_node_id for reply, _ in taken}
    assert tally.updates + tally.failed + tally.declined == len(replies)
    assert tally.train_loss is None or math.isfinite(tally.train_loss)
    assert all(map(can_be_printed, [*tally.reasons, *notes]))


def _journaled(
    folder: Path, replies: list[Message], intake: Intake, tally: Tally
) -> list[tuple[Message, Reply]]:
    """The replies that are taken, each of which the journal gives back as it was."""
    with closing(create(folder, {})) as journal:
        checkpointer = JournalCheckpointer(
            journal,
            report=lambda record: None,
            deadline_s=1.0,
        )
        intake = replace(intake, checkpointer=checkpointer)
        arriving = [one if one.has_error() else signed(one) for one in replies]
        taken = list(accepted([arriving], intake, tally, first=len(replies)))
        accepted_nodes = {reply.metadata.src_node_id for reply, _ in taken}
        for reply in replies:
            node = reply.metadata.src_node_id
            assert journal.holds("train", node) == (node in accepted_nodes)
        for reply, _ in taken:
            kept = journal.reply(Message(RecordDict(), reply.metadata.src_node_id, "train"))
            assert kept is not None
            assert content_digest(kept.content) == content_digest(reply.content)
    return taken
