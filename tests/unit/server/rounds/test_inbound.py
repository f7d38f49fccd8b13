"""What comes back from clients, where it lies in files: added up by pieces, or held once."""

from __future__ import annotations

import gc
import shutil
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Error, Message, RecordDict

from fedcore.config.run import RunConfig
from fedcore.errors import ResourceError
from fedcore.flower.identity import assume_identity
from fedcore.updates.messages import ARRAYS, MODEL, Update, update_content
from fedcore.updates.pack import Layout, Vector
from fedcore.updates.piece_digests import cuts_of
from fedcore.updates.pieces import CutFile, CutFileArray, FileArray
from server.live.journal.journal import create, reopen
from server.live.rounds.journaled import JournalCheckpointer
from server.rounds.aggregation.exact_mean import ExactMean
from server.rounds.cohort import Cohort
from server.rounds.expected import update_spec
from server.rounds.inbound import Intake, Tally, accepted
from tests.unit.server.live.journal.journals import signed
from tests.unit.server.rounds.aggregating import fold, hold

SIZE = 1_000_000
LAYOUT = Layout(("weight",), ((SIZE,),))
NODES = (4, 5, 6)
RUN = RunConfig.model_validate({"name": "run", "task": "task.py"})
INTAKE = Intake(update_spec(RUN, LAYOUT))
MB = 1_000_000


@pytest.fixture(autouse=True)
def _identity() -> None:
    assume_identity(1)


def weights(node: int) -> Vector:
    return np.random.default_rng(node).standard_normal(SIZE).astype(np.float32)


def asked(node: int) -> Message:
    return Message(RecordDict(), node, "train")


def reply(node: int, values: Vector | None = None) -> Message:
    """A reply whose weights are in a file, as a server makes them of what was spooled."""
    update = Update(weights(node) if values is None else values, node, {"train_loss": 0.5})
    message = signed(Message(update_content(update), reply_to=asked(node)))
    array = message.content[ARRAYS][MODEL]  # type: ignore[index]
    file = tempfile.TemporaryFile()  # noqa: SIM115 - the array closes it
    file.write(array.data)
    file.flush()
    message.content[ARRAYS][MODEL] = FileArray(  # type: ignore[index]
        array.dtype, array.shape, array.stype, file
    )
    return message


def risen_mb(base: int) -> float:
    return (tracemalloc.get_traced_memory()[1] - base) / MB


@pytest.fixture
def traced() -> Iterator[None]:
    gc.collect()
    tracemalloc.start()
    yield
    tracemalloc.stop()


def test_updates_in_files_are_added_up_by_pieces(traced: None) -> None:
    tally, replies = Tally(len(NODES)), [reply(node) for node in NODES]
    base = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    mean = fold(
        accepted(([one] for one in replies), INTAKE, tally, first=3), LAYOUT, tally, uniform=False
    )
    assert risen_mb(base) < 8 * SIZE / MB + 3, "more than the sum and some pieces were held"
    expected = np.average([weights(node) for node in NODES], axis=0, weights=NODES)
    assert np.abs(mean.mean() - expected).max() < 1e-6
    assert (tally.updates, tally.examples) == (3, sum(NODES))
    assert tally.bytes_up == 3 * (4 * SIZE + 128)


def test_an_update_in_a_file_that_is_not_finite_counts_as_failed() -> None:
    wrong = weights(5)
    wrong[-1] = np.inf
    tally = Tally(len(NODES))
    taken = accepted([[reply(4), reply(5, wrong)]], INTAKE, tally, first=3)
    mean = fold(taken, LAYOUT, tally, uniform=True)
    assert (mean.count, tally.updates, tally.failed) == (1, 1, 1)
    assert np.abs(mean.mean() - weights(4)).max() < 1e-6


def test_what_is_held_for_a_strategy_is_held_once_and_no_file_with_it(traced: None) -> None:
    replies = [reply(node) for node in reversed(NODES)]
    files = [message.content[ARRAYS][MODEL].file for message in replies]  # type: ignore[index]
    tally, base = Tally(len(NODES)), tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    held = hold(accepted(([one] for one in replies), INTAKE, tally, first=3), tally, uniform=False)
    gc.collect()
    assert risen_mb(base) < (len(NODES) + 1) * 4 * SIZE / MB
    assert all(file.closed for file in files)
    assert [message.metadata.src_node_id for message in held] == list(NODES)
    for message, node in zip(held, NODES, strict=True):
        array = message.content[ARRAYS][MODEL]  # type: ignore[index]
        assert array.numpy().tobytes() == weights(node).tobytes()


def test_a_reply_weighs_what_is_recorded_whatever_it_reports() -> None:
    intake, tally = replace(INTAKE, weights={4: 9, 5: 7}), Tally(2)
    (_, first), (_, second) = accepted([[reply(5), reply(4)]], intake, tally, first=2)
    assert (first.num_examples, second.num_examples) == (7, 9)
    ((_, own),) = accepted([[reply(5)]], INTAKE, tally, first=1)
    assert own.num_examples == 5


def test_a_journal_keeps_an_update_that_is_in_a_file_by_pieces(
    tmp_path: Path, traced: None
) -> None:
    with closing(create(tmp_path, {})) as journal:
        journal.record_cohort("train", Cohort(NODES, dict.fromkeys(NODES, 1)))
        message = reply(4)
        base = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        journal.accept(message)
        assert risen_mb(base) < 1.5
    again = reopen(tmp_path)
    assert again is not None
    with closing(again) as journal:
        base = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        kept = journal.reply(asked(4))
        assert kept is not None
        assert risen_mb(base) < 1.5
        array = kept.content[ARRAYS][MODEL]  # type: ignore[index]
        assert array.numpy().tobytes() == weights(4).tobytes()


def test_what_a_client_says_of_its_failure_is_one_line_of_words() -> None:
    said = "bad\n2026-01-01T00:00:00Z INFO device d2: forged\x1b[31m" + "x" * 10_000
    tally = Tally(1)
    refusal = Message(Error(1100, said), reply_to=asked(4))
    assert list(accepted([[refusal]], INTAKE, tally, first=1)) == []
    (reason,) = tally.reasons
    assert reason.startswith("bad 2026-01-01T00:00:00Z INFO device d2: forged")
    assert reason.isprintable()
    assert len(reason) <= 2000


def test_an_update_that_is_lost_after_it_was_kept_is_this_machines_fault(tmp_path: Path) -> None:
    with closing(create(tmp_path, {})) as journal:
        checkpointer = JournalCheckpointer(
            journal,
            report=lambda record: None,
            deadline_s=1.0,
        )
        tally = Tally(1)
        taken = list(
            accepted([[reply(4)]], replace(INTAKE, checkpointer=checkpointer), tally, first=1)
        )
        for path in (tmp_path / "values").iterdir():
            path.unlink()
        with pytest.raises(ResourceError, match=r"cannot read .*continue with --resume"):
            fold(taken, LAYOUT, tally, uniform=True)
        assert tally.updates == 0


def test_updates_that_wait_in_the_journal_take_no_descriptors(tmp_path: Path) -> None:
    def descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    with closing(create(tmp_path, {})) as journal:
        checkpointer = JournalCheckpointer(
            journal,
            report=lambda record: None,
            deadline_s=1.0,
        )
        before, tally = descriptors(), Tally(5)
        replies = ([reply(node)] for node in range(4, 9))
        taken = list(accepted(replies, replace(INTAKE, checkpointer=checkpointer), tally, first=5))
        assert descriptors() == before
        mean = fold(taken, LAYOUT, tally, uniform=True)
    assert (
        np.abs(mean.mean() - np.mean([weights(node) for node in range(4, 9)], axis=0)).max() < 1e-6
    )


def test_an_update_that_was_linked_outlives_the_folder_that_it_came_in(tmp_path: Path) -> None:
    """A server that was killed empties that folder when it starts again."""
    spool = tmp_path / "incoming"
    spool.mkdir()
    message = reply(4)
    array = message.content[ARRAYS][MODEL]  # type: ignore[index]
    joined, cuts = CutFile(spool), cuts_of(array)
    joined.path.write_bytes(array.data)
    message.content[ARRAYS][MODEL] = CutFileArray(  # type: ignore[index]
        array.dtype, array.shape, array.stype, joined, cuts
    )
    journal = create(tmp_path / "journal", {})
    journal.record_cohort("train", Cohort(NODES, dict.fromkeys(NODES, 1)))
    (kept,) = journal.accept(message)
    shutil.rmtree(spool)
    again = reopen(tmp_path / "journal")  # as another process finds it
    assert again is not None
    with closing(again), closing(journal):
        found = again.reply(asked(4))
        assert found is not None
        for each in (kept, found):
            array = each.content[ARRAYS][MODEL]  # type: ignore[index]
            assert array.numpy().tobytes() == weights(4).tobytes()


def test_a_large_sum_has_its_memory_before_anything_is_added(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    order, touch, add = list[str](), ExactMean.touch, ExactMean.add_parts

    def touching(mean: ExactMean) -> None:
        time.sleep(0.1)  # the first update is there sooner
        touch(mean)
        order.append("touched")

    def adding(mean: ExactMean, *given: Any, **more: Any) -> None:
        add(mean, *given, **more)
        order.append("added")

    monkeypatch.setattr(ExactMean, "touch", touching)
    monkeypatch.setattr(ExactMean, "add_parts", adding)
    tally = Tally(2)
    fold(accepted([[reply(4), reply(5)]], INTAKE, tally, first=2), LAYOUT, tally, uniform=True)
    assert order == ["touched", "added", "added"]


def test_memory_is_left_in_peace_once_a_round_is_over() -> None:
    mean = fold([], LAYOUT, Tally(0), uniform=True)
    mean.add(np.ones(SIZE, np.float32), 1)
    assert mean.mean().tobytes() == np.ones(SIZE, np.float32).tobytes()
