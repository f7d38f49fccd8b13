"""Every strategy that Flower has goes on from a checkpoint as if nobody had interrupted it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from fedcore.config.run import RunConfig
from fedcore.flower.grid import InProcessGrid
from fedcore.flower.identity import assume_identity
from fedcore.observability.events import RoundFinished
from fedcore.seeds import Simulated, numpy_rng
from fedcore.task.definition import Task
from fedcore.task.model import build_model
from fedcore.updates.messages import ARRAYS, MODEL, Update, update_content
from server.live.journal.journal import create, reopen
from server.records import RoundRecord
from server.rounds.checkpointing.checkpointer import NoCheckpoints
from server.rounds.checkpointing.progress import Progress, Start
from server.rounds.cohort import Cohort
from server.rounds.federation import Federation
from server.rounds.loop import run_rounds
from server.rounds.strategies.flower import choose_strategy, strategy_names
from server.rounds.strategies.state import restore_strategy
from server.simulation.checkpoint import Checkpoint, Told, read_checkpoint, write_checkpoint
from server.simulation.virtual.state import SimulationState
from tests.contract.own_strategies import EXAMPLES

TREES = ["FedXgbBagging", "FedXgbCyclic"]
OURS = ["slow_momentum.py:SlowMomentum", "fedprox.py:Proximal"]
NETWORKS = OURS + [name for name in strategy_names() if name not in TREES]
OPTIONS: dict[str, dict[str, Any]] = {
    "QFedAvg": {"client_learning_rate": 0.1},
    "DifferentialPrivacyServerSideFixedClipping": {"noise_multiplier": 0.1, "clipping_norm": 1.0},
    "DifferentialPrivacyClientSideFixedClipping": {"noise_multiplier": 0.1, "clipping_norm": 1.0},
    "DifferentialPrivacyServerSideAdaptiveClipping": {
        "noise_multiplier": 0.1,
        "strategy": "FedAdam",
    },
    "DifferentialPrivacyClientSideAdaptiveClipping": {
        "noise_multiplier": 0.1,
        "strategy": "FedAvgM",
    },
    "FedAvgM": {"server_momentum": 0.9},
    "FedProx": {"proximal_mu": 0.1},
}


def answer(message: Message, *, bit: bool) -> Message:
    """An update that follows from the node, the round and the weights."""
    node = message.metadata.dst_node_id
    weights = message.content.array_records[ARRAYS][MODEL].numpy()
    number = int(str(message.content.config_records["config"]["server-round"]))
    step = numpy_rng(0, "update", node, number).standard_normal(weights.shape)
    metrics = {"train_loss": 0.5} | ({"norm_bit": float(node % 2)} if bit else {})
    update = Update((weights + 0.1 * step).astype(np.float32), 10 * node + number, metrics)
    return Message(update_content(update), reply_to=message)


class Watching(NoCheckpoints):
    """Remembers every progress that it is shown, and stops after one of them."""

    def __init__(self, last: int) -> None:
        self._last = last
        self.seen: list[Progress] = []
        self.told: list[Told] = []

    def wait_if_paused(self, progress: Progress) -> None:
        self.seen.append(progress)

    def stops_after(self, progress: Progress) -> bool:
        return progress.round >= self._last


def rounds(name: str, task: Task, checkpointer: Watching, start: Start | None = None) -> Progress:
    """Runs until ``checkpointer`` stops it; the last progress."""
    assume_identity(1)
    federated = {"rounds": 6, "strategy": name, "strategy_options": OPTIONS.get(name, {})}
    run = RunConfig.model_validate(
        {"name": "run", "task": "x", "federation": federated, "base": EXAMPLES}
    )
    chosen = choose_strategy(run, cohort=6, size=1)
    if start is not None:
        restore_strategy(chosen.strategy, start.progress.strategy)
    federation = Federation(
        run=run,
        grid=InProcessGrid(1, range(10, 16), partial(answer, bit="ClientSideAdaptive" in name)),
        chosen=chosen,
        cohort=6,
        metrics=task.metrics,
        randomness=Simulated(0),
        judge=None,
        on_round=lambda record: checkpointer.told.append(RoundFinished(asdict(record))),
        on_note=lambda note: None,
        checkpointer=checkpointer,
        start=start,
    )
    run_rounds(federation, build_model(task, run))
    return checkpointer.seen[-1]


def bits(progress: Progress) -> Iterator[object]:
    yield progress.round
    yield progress.weights.tobytes()
    yield progress.strategy.tree
    for array in progress.strategy.arrays:
        yield (array.dtype, array.shape, array.tobytes())


@pytest.mark.parametrize("name", NETWORKS)
def test_three_rounds_and_three_more_are_six(name: str, tiny: Task, tmp_path: Path) -> None:
    whole = rounds(name, tiny, Watching(6))
    half = Watching(3)
    progress = rounds(name, tiny, half)
    path = tmp_path / "checkpoint"
    write_checkpoint(path, Checkpoint({}, progress, half.told, SimulationState(), 0.0))
    start = read_checkpoint(path).start
    assert list(bits(start.progress)) == list(bits(progress))
    again = rounds(name, tiny, Watching(6), start)
    assert list(bits(again)) == list(bits(whole))
    assert not np.array_equal(whole.weights, progress.weights)


@pytest.mark.parametrize("name", [*OURS, "FedAdam"])
def test_a_journal_brings_back_what_a_strategy_remembers(
    name: str, tiny: Task, tmp_path: Path
) -> None:
    whole, half = rounds(name, tiny, Watching(6)), Watching(3)
    rounds(name, tiny, half)
    records = [told.values for told in half.told if isinstance(told, RoundFinished)]
    with closing(create(tmp_path, {})) as journal:
        journal.commit(half.seen[0], None)
        for progress, record in zip(half.seen[1:], records, strict=True):
            journal.ask("train", Cohort(range(10, 16), dict.fromkeys(range(10, 16), 1)))
            journal.commit(progress, RoundRecord(**record))
    journal = reopen(tmp_path)
    assert journal is not None
    with closing(journal):
        again = rounds(name, tiny, Watching(6), journal.start)
    assert list(bits(again)) == list(bits(whole))


@pytest.mark.parametrize("name", NETWORKS)
def test_what_was_remembered_does_not_change_with_later_rounds(
    name: str, tiny: Task, tmp_path: Path
) -> None:
    long, short = Watching(4), Watching(2)
    rounds(name, tiny, long)
    rounds(name, tiny, short)
    assert list(bits(long.seen[2])) == list(bits(short.seen[2]))
