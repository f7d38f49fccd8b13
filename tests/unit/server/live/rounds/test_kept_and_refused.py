"""A journal that holds what would not be accepted today: dropped, said, and asked for again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Message, MessageType, RecordDict

from fedcore.config.run import RunConfig
from fedcore.flower.grid import InProcessGrid
from fedcore.flower.identity import assume_identity
from fedcore.seeds import Simulated
from fedcore.task.metrics import ACCURACY
from fedcore.updates.messages import ARRAYS, MODEL, Update, update_content
from fedcore.updates.pack import unpack
from server.live.journal.journal import Journal, create, reopen
from server.live.rounds.journaled import JournalCheckpointer, JournalGrid
from server.rounds.cohort import Cohort
from server.rounds.federation import Federation
from server.rounds.loop import Federated, run_rounds
from server.rounds.strategies.flower import make_strategy
from tests.unit.server.live.journal.journals import signed

NODES = (10, 11, 12, 13)
BAD = {
    "not finite": Update(np.array([1, np.nan, 1], np.float32), 1, {"train_loss": 0.5}),
    "a loss of 1e300": Update(np.ones(3, np.float32), 1, {"train_loss": 1e300}),
    "a metric that nobody asked for": Update(np.ones(3, np.float32), 1, {"forged": 1.0}),
    "another model": Update(np.ones(4, np.float32), 1, {"train_loss": 0.5}),
}


@pytest.fixture(autouse=True)
def _identity() -> None:
    assume_identity(1)


def honest(message: Message) -> Message:
    weights = message.content.array_records[ARRAYS][MODEL].numpy()
    node = message.metadata.dst_node_id
    update = Update(weights + np.float32(node / 100), 1, {"train_loss": 0.5})
    return signed(Message(update_content(update), reply_to=message))


class Site:
    """Rounds of one process over a journal."""

    def __init__(self, journal: Journal) -> None:
        self.asked: list[int] = []
        self.notes: list[str] = []
        self._journal = journal

    def run(self) -> Federated:
        from torch import nn

        from fedcore.task.model import FullModel

        module = nn.Linear(2, 1)
        unpack(np.zeros(3, np.float32), module)
        run = RunConfig.model_validate(
            {"name": "run", "task": "t.py", "federation": {"rounds": 1, "quorum": 1.0}}
        )
        checkpointer = JournalCheckpointer(
            self._journal,
            report=lambda record: None,
            deadline_s=5.0,
        )

        def handle(message: Message) -> Message:
            self.asked.append(message.metadata.dst_node_id)
            return honest(message)

        federation = Federation(
            run=run,
            grid=JournalGrid(InProcessGrid(1, NODES, handle), self._journal, admit=set, quorum=1.0),
            chosen=make_strategy("FedAvg", {}, cohort=len(NODES), size=3),
            cohort=len(NODES),
            metrics=(ACCURACY,),
            randomness=Simulated(0),
            evaluate_on_cloud=None,
            on_round=lambda record: None,
            on_note=self.notes.append,
            checkpointer=checkpointer,
            start=self._journal.start,
            live=True,
        )
        return run_rounds(federation, FullModel(nn.Identity(), module))


@pytest.fixture
def expected(tmp_path: Path) -> Iterator[bytes]:
    (tmp_path / "plain").mkdir()
    with closing(create(tmp_path / "plain", {})) as journal:
        yield Site(journal).run().weights.tobytes()


@pytest.mark.parametrize("name", BAD)
def test_what_an_earlier_version_kept_is_checked_again(
    tmp_path: Path, expected: bytes, name: str
) -> None:
    folder = tmp_path / "journal"
    folder.mkdir()
    with closing(create(folder, {})) as journal:
        journal.record_cohort("train", Cohort(NODES, dict.fromkeys(NODES, 1)))
        for node in NODES[:3]:
            asked = Message(RecordDict(), node, MessageType.TRAIN)
            update = Update(np.full(3, node / 100, np.float32), 1, {"train_loss": 0.5})
            bad = node == 11
            content = update_content(BAD[name] if bad else update)
            journal.accept(signed(Message(content, reply_to=asked)))
    again = reopen(folder)
    assert again is not None
    with closing(again):
        site = Site(again)
        done = site.run()
    assert sorted(site.asked) == [11, 13], "10 and 12 are not asked again"
    assert done.weights.tobytes() == expected
    assert any(
        note.startswith(
            "Dropped from the journal, where an earlier process had stored it: update from"
        )
        and "node 11" in note
        for note in site.notes
    )
