"""Journals of a small run, for tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict

from fedcore.updates.messages import ARRAYS, ENVELOPE, METRICS, weights_record
from fedcore.updates.pack import Vector
from fedcore.updates.piece_digests import cuts_of
from fedcore.updates.pieces import CutFile, CutFileArray
from server.live.journal.journal import Journal, create, reopen
from server.records import RoundRecord
from server.rounds.checkpointing.progress import Progress
from server.rounds.cohort import Cohort
from server.rounds.strategies.state import StrategyState

IDENTITY = {"run": {"name": "trial"}}
SMALL, LARGE = 10, 50_000  # elements: beside an entry, and in a file of its own


def vector(number: float, size: int = SMALL) -> Vector:
    return np.full(size, number, np.float32)


def progress(number: int, size: int = SMALL, **changes: object) -> Progress:
    made = Progress(
        round=number,
        over=False,
        weights=vector(number, size),
        best=vector(number, size),
        best_round=number,
        most_failed=1,
        strategy=StrategyState(
            {"strategy": "FedAvgM", "holds": [["m", {"array": 0}]]},
            (np.arange(size, dtype=np.float64) + number,),
        ),
        preprocess=b"state",
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def record(number: int, loss: float | None = 0.1) -> RoundRecord:
    return RoundRecord(
        round=number,
        rounds=9,
        seconds=1.5,
        cohort=3,
        updates=3,
        declined=0,
        failed=0,
        train_loss=loss,
        metrics={"accuracy": 1 / 3},
        judged_on="cloud",
        epsilon_max=None,
        bytes_up=1,
        bytes_down=2,
    )


def asked(node: int, kind: str = "train") -> Message:
    return Message(RecordDict(), node, kind)


def answer(message: Message, value: float, size: int = SMALL) -> Message:
    content = RecordDict(
        {
            ARRAYS: weights_record(vector(value, size)),
            METRICS: MetricRecord({"num-examples": 7, "train_loss": 0.1 + value}),
        }
    )
    return signed(Message(content, reply_to=message))


def filed(folder: Path, reply: Message) -> Message:
    """A reply whose weights came in a file, as those of a device do."""
    array = reply.content[ARRAYS]["model"]  # type: ignore[index]
    file = CutFile(folder)
    file.path.write_bytes(array.data)
    cuts = cuts_of(array)
    found = CutFileArray(array.dtype, tuple(array.shape), array.stype, file, cuts)
    reply.content[ARRAYS]["model"] = found  # type: ignore[index]
    return reply


def signed(reply: Message) -> Message:
    """A reply with what a server adds once it has verified the signature, which is none here."""
    reply.content[ENVELOPE] = ConfigRecord(
        {ENVELOPE: b"signed", "signer": bytes(32), "verified-at-s": 1e9}
    )
    return reply


@contextmanager
def opened(folder: Path) -> Iterator[Journal]:
    journal = reopen(folder)
    assert journal is not None
    with closing(journal):
        yield journal


def two_rounds(folder: Path, size: int = SMALL) -> None:
    """Two rounds that are over, and one in which a node has answered."""
    with closing(create(folder, IDENTITY)) as journal:
        journal.commit(progress(0, size), None)
        for number in (1, 2):
            journal.record_cohort("train", Cohort([4, 5, 6], dict.fromkeys([4, 5, 6], 1)))
            journal.accept(answer(asked(4), 0.5, size))
            journal.commit(progress(number, size), record(number))
            journal.sweep()
        journal.record_cohort("train", Cohort([4, 5, 6], dict.fromkeys([4, 5, 6], 1)))
        journal.accept(answer(asked(5), 0.25, size))


def weights_of(reply: Message | None) -> list[float]:
    assert reply is not None
    return np.unique(reply.content[ARRAYS]["model"].numpy()).tolist()  # type: ignore[index]
