from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedcore.errors import DataError
from fedcore.observability.events import Noted, RoundFinished
from fedcore.privacy.accounting import Charge
from fedcore.privacy.ledger import Ledger
from server.records import RoundRecord, VirtualRecord
from server.rounds.checkpointing.progress import Progress
from server.rounds.client_privacy.protection import ClientPlan, Protection, noise_of
from server.rounds.strategies.state import StrategyState
from server.simulation.checkpoint import Checkpoint, StoredEvent, read_checkpoint, write_checkpoint
from server.simulation.checkpointer import FAILED, FileCheckpointer
from server.simulation.virtual.nodes import FIRST_NODE_ID
from server.simulation.virtual.state import Choice, SimulationState

RECORD = RoundRecord(
    round=1,
    rounds=9,
    seconds=0.1,
    cohort=2,
    updates=2,
    declined=0,
    failed=0,
    train_loss=1 / 3,
    metrics={"accuracy": math.nan},
    judged_on="cloud",
    epsilon_max=1.1,
    bytes_up=10,
    bytes_down=20,
    virtual=VirtualRecord(2.5, 1, 2, 3, 4, 5, 6),
)
PROGRESS = Progress(
    round=1,
    over=False,
    weights=np.array([1.0, -0.0, 3e-39], np.float32),
    best=np.array([0.5, 0.25, 0.125], np.float32),
    best_round=1,
    most_failed=2,
    strategy=StrategyState({"strategy": "FedAvg", "holds": [["a", {"array": 0}]]}, (np.eye(2),)),
    preprocess=b"any bytes",
    protection=Protection(
        ClientPlan(9, 3, 1.1, 2), 0.1, ((4, 5, 6),), (np.array([1 / 3, -0.0, 1e300]),)
    ),
)
LEDGER = Ledger((Charge(1, 1.1, 0.1, 3), Charge(4, 0.7, 1 / 3, 9)))
CHECKPOINT = Checkpoint(
    identity={"run": {"seed": 1}},
    progress=PROGRESS,
    events=[Noted("a note"), RoundFinished(asdict(RECORD) | {"memory_bytes": 5})],
    state=SimulationState(
        {"anna": LEDGER}, Counter(anna=2, ben=1), 12.5, Choice("loop", 0.1, None, "so")
    ),
    elapsed_s=3.25,
)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    write_checkpoint(path, CHECKPOINT)
    read = read_checkpoint(path)
    assert read.state == CHECKPOINT.state
    assert read.identity == CHECKPOINT.identity
    assert read.elapsed_s == 3.25
    assert read.progress.weights.tobytes() == PROGRESS.weights.tobytes()
    assert read.progress.best.tobytes() == PROGRESS.best.tobytes()
    assert read.progress.preprocess == b"any bytes"
    assert np.array_equal(read.progress.strategy.arrays[0], np.eye(2))
    assert read.progress.protection == PROGRESS.protection
    assert noise_of(read.progress.protection)[0].tobytes() == (
        noise_of(PROGRESS.protection)[0].tobytes()
    )
    assert read.events[0] == Noted("a note")
    (record,) = read.start.records
    assert math.isnan(record.metrics["accuracy"])
    assert replace(record, metrics={}) == replace(RECORD, metrics={})
    assert [one.name for one in tmp_path.iterdir()] == ["checkpoint"]


def test_a_damaged_checkpoint_is_refused_whatever_byte_it_is(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    write_checkpoint(path, CHECKPOINT)
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(DataError, match=r"start the run over"):
            read_checkpoint(path)
    for length in (0, 7, 8, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"start the run over"):
            read_checkpoint(path)


def test_there_may_be_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_checkpoint(tmp_path / "checkpoint")


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


NODES = [FIRST_NODE_ID, FIRST_NODE_ID + 2]


def keeper(
    folder: Path,
    state: SimulationState,
    events: Sequence[StoredEvent],
    *,
    clock: Clock | None = None,
    stopping: bool = False,
) -> FileCheckpointer:
    return FileCheckpointer(
        folder,
        {},
        ["anna", "ben", "cleo d'A"],
        state=state,
        events=events,
        stopping=lambda: stopping,
        command="fedcore simulate run.toml",
        elapsed_s=7.0,
        clock=clock or Clock(),
    )


def rounds_kept(folder: Path) -> int:
    return read_checkpoint(folder / "checkpoint.safetensors").progress.round


def test_checkpoints_are_written_at_the_start_now_and_then_and_at_the_end(tmp_path: Path) -> None:
    clock = Clock()
    keeping = keeper(tmp_path, SimulationState(), [], clock=clock)
    keeping.commit(replace(PROGRESS, round=0), None)
    assert rounds_kept(tmp_path) == 0
    clock.now_s += 29
    keeping.commit(replace(PROGRESS, round=1), None)
    assert rounds_kept(tmp_path) == 0
    clock.now_s += 2
    keeping.commit(replace(PROGRESS, round=2), None)
    assert rounds_kept(tmp_path) == 2
    assert read_checkpoint(tmp_path / "checkpoint.safetensors").elapsed_s == 38.0
    keeping.commit(replace(PROGRESS, round=3, over=True), None)
    assert not keeping.stops_after(PROGRESS)
    assert rounds_kept(tmp_path) == 3


def test_who_is_asked_to_stop_writes_first(tmp_path: Path) -> None:
    keeping = keeper(tmp_path, SimulationState(), [], stopping=True)
    keeping.commit(PROGRESS, None)
    assert keeping.stops_after(PROGRESS)
    assert rounds_kept(tmp_path) == 1


def test_a_round_that_fails_leaves_what_was_before_it(tmp_path: Path) -> None:
    state = SimulationState({"anna": Ledger()}, Counter(anna=1), 5.0, locals={"anna": b"head"})
    events: list[StoredEvent] = [Noted("before")]
    keeping = keeper(tmp_path, state, events)
    keeping.commit(PROGRESS, None)
    keeping.begin(NODES)
    state.ledgers |= {"anna": LEDGER, "cleo d'A": LEDGER}
    state.locals |= {"anna": b"trained", "cleo d'A": b"new"}
    state.rounds.update(["anna", "cleo d'A"])
    state.clock_s = 9.0
    events.append(Noted("meanwhile"))
    keeping.fail(PROGRESS)
    read = read_checkpoint(tmp_path / "checkpoint.safetensors")
    before = SimulationState({"anna": Ledger()}, Counter(anna=1), 5.0, locals={"anna": b"head"})
    assert read.state == before
    assert read.events == [Noted("before")]
    assert set(state.ledgers) == {"anna", "cleo d'A"}  # only what is written is set back


@pytest.mark.parametrize(
    ("reason", "named"),
    [
        ("client 'anna': DataError: gone", "2:anna"),
        ('client "cleo d\'A": TaskError: no', "'2:cleo d'\"'\"'A'"),
        (f"update from node {NODES[1]}: it holds values", "'2:cleo d'\"'\"'A'"),
        ("error 5", "2:CLIENT"),
    ],
)
def test_failures_name_the_command_that_shows_them(reason: str, named: str, tmp_path: Path) -> None:
    keeping = keeper(tmp_path, SimulationState(), [])
    keeping.commit(PROGRESS, None)
    keeping.begin(NODES)
    assert keeping.advice(PROGRESS, [reason]) == [
        f"`fedcore simulate run.toml --replay {named}` shows the full error."
    ]
    kept = read_checkpoint(tmp_path / FAILED / "round-2.safetensors")
    assert kept.progress.round == 1


def test_of_failed_rounds_the_latest_few_are_kept(tmp_path: Path) -> None:
    keeping = keeper(tmp_path, SimulationState(), [])
    keeping.commit(PROGRESS, None)
    keeping.begin(NODES)
    for number in range(12):
        keeping.advice(replace(PROGRESS, round=number), ["client 'anna': no"])
    kept = {path.name for path in (tmp_path / FAILED).iterdir()}
    assert kept == {f"round-{number}.safetensors" for number in range(5, 13)}


@pytest.mark.parametrize(
    "kept",
    [
        np.arange(3, dtype=np.float16),
        np.array([[0.1, np.nan], [np.inf, -0.0]]),
        np.array([True, False]),
        np.array(7, np.uint8),
        np.array([-(2**62)]),
        np.zeros((0, 3), np.float32),
    ],
    ids=lambda kept: f"{kept.dtype}{kept.shape}",
)
def test_a_strategys_arrays_come_back_as_they_were(tmp_path: Path, kept: Any) -> None:
    strategy = StrategyState({"strategy": "AlgorithmStrategy", "holds": []}, (kept,))
    path = tmp_path / "checkpoint"
    write_checkpoint(path, replace(CHECKPOINT, progress=replace(PROGRESS, strategy=strategy)))
    (found,) = read_checkpoint(path).progress.strategy.arrays
    assert (found.dtype, found.shape, found.tobytes()) == (kept.dtype, kept.shape, kept.tobytes())
