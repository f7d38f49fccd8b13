"""What `finetune.auto` tries and chooses, with a clock that the test drives."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedcore.config.finetune import Finetune
from fedcore.config.run import RunConfig
from fedcore.errors import DataError, TrainingError
from server.finetune import auto
from server.finetune.auto import AutoChoice, Trial, choose, search
from server.finetune.timing import Timed

Rate = Callable[[Finetune], float]


class Machine:
    """Times settings by a formula; an attempt takes two seconds."""

    def __init__(self, rate: Rate, *, free_bytes: float = float("inf")) -> None:
        self.rate, self.free_bytes, self.now_s = rate, free_bytes, 0.0

    def time(self, settings: Finetune, *, window_s: float, limit_s: float) -> Timed:
        self.now_s += 2.0
        rate = self.rate(settings)
        peak = 1000 // (settings.accumulate_steps * (2 if settings.activation_checkpointing else 1))
        fits = peak <= self.free_bytes
        return Timed(settings.processes, 10, int(10 * rate), 10.0, (1.0,), peak, fits)

    def search(self, mixes: bool = False, **given: Any) -> AutoChoice:
        found = Finetune.model_validate({"auto": True, "batch_size": 8, **given})
        return search(
            found,
            self,
            processes_to_try=[2, 4],
            mixes=mixes,
            note=lambda text: None,
            clock=lambda: self.now_s,
        )


def by(**gains: float) -> Rate:
    """Examples a second: 100 times the gain of each setting that is not the default."""

    def rate(settings: Finetune) -> float:
        found = 100.0
        for name, gain in gains.items():
            if getattr(settings, name) != getattr(Finetune(), name):
                found *= gain
        return found

    return rate


def tried(choice: AutoChoice) -> set[str]:
    return {name for trial in choice.trials for name in trial.settings}


def test_what_makes_a_step_faster_is_kept_and_what_does_not_is_dropped() -> None:
    found = Machine(by(processes=1.6, prefetch=0.8, fused=1.2, compile=1.04)).search()
    assert found.settings == {"processes": 2, "fused": True}  # 4 % are within the noise
    assert tried(found) == {"processes", "accumulate_steps", "prefetch", "fused", "compile"}
    assert str(found).startswith("finetune.auto tried 8 ways in 16.0 s, and chose processes = 2, ")
    assert "1.92 times as many as before" in str(found)
    marked = [line for line in found.table().splitlines() if line.startswith("*")]
    assert len(marked) == 1
    assert "processes = 2, fused = true" in marked[0]


def test_what_the_run_sets_stays_and_what_would_train_otherwise_is_not_tried() -> None:
    faster = by(processes=2.0, compile=2.0, prefetch=2.0, precision=2.0, accumulate_steps=2.0)
    found = Machine(faster).search(compile=False, processes=1)
    assert tried(found) == {"accumulate_steps", "prefetch", "fused"}
    mixed = Machine(faster).search(mixes=True)
    assert tried(mixed) == {"prefetch", "fused", "compile"}
    assert Machine(faster).search(auto_precision=True).settings["precision"] == "bf16"
    uneven = Machine(faster).search(batch_size=9)  # no share of a batch would be equal
    assert "processes" not in tried(uneven)


def test_the_time_is_bounded() -> None:
    machine = Machine(by(compile=9.0))
    found = machine.search(auto_s=5.0)
    assert len(found.trials) == 3
    assert found.settings == {}
    assert "kept the settings as they are" in str(found)


def test_a_failed_trial_is_a_line_of_the_table() -> None:
    def rate(settings: Finetune) -> float:
        if settings.compile:
            raise TrainingError("no C++ compiler\x1b[31m")
        return 100.0

    found = Machine(rate).search()
    assert found.trials[-1].problem == "no C++ compiler\\x1b[31m"
    assert found.settings == {}
    assert "no C++ compiler" in found.table().splitlines()[-1]


def test_where_nothing_can_be_timed_the_settings_stay() -> None:
    def rate(settings: Finetune) -> float:
        raise TrainingError("no step was completed in time")

    found = Machine(rate).search()
    assert found.settings == {}
    assert all(trial.problem for trial in found.trials)
    assert "as set" in found.table()


@pytest.mark.parametrize(
    ("free", "mixes", "chosen"),
    [
        (500, False, {"activation_checkpointing": True}),
        (300, False, {"activation_checkpointing": True, "accumulate_steps": 2}),
        (300, True, {}),  # dividing the batch would train another model
    ],
)
def test_short_memory_comes_before_speed(free: int, mixes: bool, chosen: dict[str, Any]) -> None:
    found = Machine(by(), free_bytes=free).search(mixes=mixes)
    assert found.settings == chosen
    assert found.trials[0].problem == "needs more memory than is free"


RUN = RunConfig(name="run", task="task.py", finetune=Finetune(auto=True))
CHOSEN = AutoChoice(
    {"prefetch": 2}, (Trial({}, 1.0, 10, 2.0), Trial({"prefetch": 2}, 2.0, 10, 2.0))
)


class _Cloud:
    train = range(40)


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """Each search, in place of one that starts processes."""
    made: list[RunConfig] = []

    def searched(settings: Finetune, processes: Any, **more: Any) -> AutoChoice:
        made.append(RUN)
        return CHOSEN

    monkeypatch.setattr(auto, "search", searched)
    monkeypatch.setattr(auto, "checkpoint_bytes", lambda model: b"weights")
    return made


def chose(run: RunConfig, kept: Path) -> AutoChoice:
    import torch

    model: Any = torch.nn.Linear(2, 2)
    cloud: Any = _Cloud()
    return choose(run, model, cloud, kept=kept, note=print)


def test_a_kept_choice_is_used_again_for_the_same_settings_and_data(
    chosen: list[RunConfig], tmp_path: Path
) -> None:
    kept = tmp_path / "new" / "finetune_auto.json"
    assert chose(RUN, kept) == chose(RUN, kept) == CHOSEN
    assert len(chosen) == 1
    other = RUN.model_copy(update={"finetune": Finetune(auto=True, epochs=3)})
    chose(other, kept)
    assert len(chosen) == 2
    assert CHOSEN.applied(RUN).finetune.prefetch == 2


@pytest.mark.parametrize("change", [{"trials": [{"settings": {}}]}, {"settings": {"epochs": "x"}},
                                    {"settings": {"prefetch": 7}}, {"trials": 3}])  # fmt: skip
def test_a_damaged_choice_is_refused(
    chosen: list[RunConfig], tmp_path: Path, change: dict[str, Any]
) -> None:
    kept = tmp_path / "finetune_auto.json"
    chose(RUN, kept)
    kept.write_text(json.dumps({**json.loads(kept.read_text()), **change}))
    with pytest.raises(DataError, match=r"finetune_auto\.json.*remove it"):
        chose(RUN, kept)
    kept.write_text("[")
    with pytest.raises(DataError, match="remove it"):
        chose(RUN, kept)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"auto": True, "nodes": 2, "rendezvous": "a:1"}, r"contradicts finetune\.nodes = 2"),
        ({"auto": True, "every": 3}, r"contradicts finetune\.every"),
        ({"auto_precision": True}, r"needs finetune\.auto"),
    ],
)
def test_what_contradicts_trials_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        RunConfig.model_validate({"name": "run", "task": "task.py", "finetune": settings})
