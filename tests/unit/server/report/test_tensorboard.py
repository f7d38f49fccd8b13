from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fedcore.observability.events import (
    Noted,
    RoundFinished,
    StageFinished,
    StageStarted,
    TrainingAdvanced,
)
from server.records import RunRecord
from server.report.tensorboard import EVENTS_FILE, tensorboard_events

# Runs where files may hold 2000 bytes: the closest a test comes to a disk that fills up.
_FILLS_UP = """
import resource, signal, sys
from pathlib import Path
from fedcore.errors import DiskFull
from fedcore.observability.events import RoundFinished
from server.report.tensorboard import tensorboard_events
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
try:
    with tensorboard_events(Path(sys.argv[1])) as sink:
        for number in range(1, 200):
            sink(RoundFinished({"round": number, "metrics": {"accuracy": 0.5}}))
except DiskFull as error:
    print(number, error)
"""


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard itself reads from the folder."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_tensorboard_reads_what_was_written(tmp_path: Path, record: RunRecord) -> None:
    with tensorboard_events(tmp_path / "tensorboard") as sink:
        sink(StageStarted("rounds", 3))
        for each in record.rounds:
            sink(RoundFinished(asdict(each)))
        sink(TrainingAdvanced("round 5", 40, 90, 0.25, 0.125, 8.0, None, None, 7.0))
        sink(StageFinished("rounds", 1.5, ""))
        sink(Noted("a note"))
    read = scalars(tmp_path / "tensorboard")
    assert read["privacy/epsilon_max"] == [(1, 1.5), (2, 3.0), (3, 4.5)]
    assert read["bytes/up"] == [(1, 1000.0), (2, 1000.0), (3, 1000.0)]
    assert [step for step, _ in read["metrics/accuracy"]] == [1, 2, 3]
    assert math.isclose(read["metrics/accuracy"][2][1], 0.75, rel_tol=1e-6)
    assert read["seconds/rounds"] == [(0, 1.5)]
    group = "finetune/round_5/"
    trained = {tag: value for tag, value in read.items() if tag.startswith(group)}
    assert trained == {
        f"{group}loss": [(40, 0.25)],
        f"{group}learning_rate": [(40, 0.125)],
        f"{group}examples_per_s": [(40, 8.0)],
    }
    assert "train/loss" not in read  # the rounds have none


def test_a_round_can_be_watched_at_once_and_an_earlier_run_is_replaced(tmp_path: Path) -> None:
    for value in (0.25, 0.5):
        with tensorboard_events(tmp_path) as sink:
            sink(RoundFinished({"round": 1, "metrics": {"accuracy": value}}))
            assert scalars(tmp_path) == {"metrics/accuracy": [(1, value)]}
    assert [path.name for path in tmp_path.iterdir()] == [EVENTS_FILE]


def test_a_full_disk_is_said_in_the_round_and_leaves_whole_records(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _FILLS_UP, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    failed, message = done.stdout.split(" ", 1)
    assert "no room" in message
    assert str(tmp_path / EVENTS_FILE) in message
    steps = [step for step, _ in scalars(tmp_path)["metrics/accuracy"]]
    assert steps == list(range(1, int(failed)))
