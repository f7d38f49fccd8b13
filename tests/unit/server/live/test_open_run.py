"""Whether a run over devices begins, goes on, goes on after its rounds, or is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedcore.config.run import RunConfig
from fedcore.errors import ConfigError, DataError
from server.live.journal.head import HEAD, JOURNAL, RECORDS
from server.live.resume import STEPS, RunComplete, has_journal, open_run
from server.report.folder import JOURNAL_FOLDER
from server.rounds.checkpointing.progress import Progress
from server.rounds.strategies.state import StrategyState
from tests.unit.server.live.journal.journals import progress, record

RELEASE = {"release": {"repository": "releases", "keys": "keys"}}


def run_of(folder: Path, **more: Any) -> RunConfig:
    (folder / "task.py").write_text("task = 1")
    run = RunConfig.model_validate({"name": "orchard", "task": "task.py", **more})
    return run.model_copy(update={"base": folder})


def over(folder: Path, run: RunConfig) -> None:
    """Has the rounds of a run be over."""
    weights = np.zeros(3, np.float32)
    with open_run(run, folder / "runs", resume=False, fresh=True) as (_, journal):
        journal.commit(
            Progress(0, True, weights, weights, 0, 0, StrategyState(None, ()), b""), None
        )
        journal.end()


def opened(folder: Path, run: RunConfig, *, resume: bool) -> bool:
    """Whether its rounds are over; steps that were begun are still there then."""
    with open_run(run, folder / "runs", resume=resume, fresh=False) as (results, journal):
        assert (results / JOURNAL_FOLDER).is_dir()
        assert (results / STEPS).is_dir() == journal.ended
        return journal.ended


def begin_step(folder: Path) -> None:
    (folder / "runs" / "orchard" / STEPS).mkdir()


def complete(folder: Path) -> None:
    (folder / "runs" / "orchard" / "summary.json").write_text("{}")


def test_a_run_whose_rounds_are_over_goes_on_to_its_release(tmp_path: Path) -> None:
    run = run_of(tmp_path, **RELEASE)
    over(tmp_path, run)
    begin_step(tmp_path)
    with pytest.raises(ConfigError, match="continue with --resume, or start over with --fresh"):
        opened(tmp_path, run, resume=False)
    assert opened(tmp_path, run, resume=True)


def test_a_complete_run_is_not_resumed_and_may_be_run_again(tmp_path: Path) -> None:
    run = run_of(tmp_path, **RELEASE)
    over(tmp_path, run)
    complete(tmp_path)
    before = sorted((tmp_path / "runs" / "orchard").iterdir())
    with pytest.raises(
        RunComplete, match=r"its results are in summary\.json\. Nothing is left .*--fre"
    ):
        opened(tmp_path, run, resume=True)
    assert sorted((tmp_path / "runs" / "orchard").iterdir()) == before
    with pytest.raises(ConfigError, match=r"differs in seed \(0 then, 3 now\)\. .* with --fresh"):
        opened(tmp_path, run_of(tmp_path, **RELEASE, seed=3), resume=True)
    assert not opened(tmp_path, run, resume=False)
    assert not (tmp_path / "runs" / "orchard" / "summary.json").exists()


def test_a_run_without_a_release_is_complete_with_its_rounds(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    over(tmp_path, run)
    with pytest.raises(RunComplete, match=r"its model is in global\.safetensors"):
        opened(tmp_path, run, resume=True)
    begin_step(tmp_path)
    assert opened(tmp_path, run_of(tmp_path, **RELEASE), resume=True), "it may be released later"
    assert not opened(tmp_path, run, resume=False)


def test_what_comes_after_the_rounds_may_change_once_they_are_over(tmp_path: Path) -> None:
    over(tmp_path, run_of(tmp_path, **RELEASE))
    begin_step(tmp_path)
    lax = {"compression": {"max_accuracy_drop": 0.5}, "finetune": {"epochs": 3}}
    assert opened(tmp_path, run_of(tmp_path, **RELEASE, **lax), resume=True)
    for more in ({"seed": 3}, {"finetune": {"holdout": 0.5}}, {"federation": {"rounds": 11}}):
        with pytest.raises(ConfigError, match="was written by another run"):
            opened(tmp_path, run_of(tmp_path, **RELEASE, **more), resume=True)


def test_before_that_nothing_may_change(tmp_path: Path) -> None:
    run = run_of(tmp_path, **RELEASE)
    with open_run(run, tmp_path / "runs", resume=False, fresh=True):
        pass
    lax = run_of(tmp_path, **RELEASE, compression={"max_accuracy_drop": 0.5})
    with pytest.raises(ConfigError, match=r"compression\.max_accuracy_drop \(0\.01 then, 0\.5 now"):
        opened(tmp_path, lax, resume=True)
    assert not opened(tmp_path, run, resume=True)


def begun(folder: Path) -> RunConfig:
    """Has a run be interrupted after two rounds; gives it."""
    run = run_of(folder)
    with open_run(run, folder / "runs", resume=False, fresh=True) as (_, journal):
        journal.commit(progress(0), None)
        for number in (1, 2):
            journal.commit(progress(number), record(number))
    return run


LOSSES: dict[str, tuple[str, ...]] = {
    "moved aside": (JOURNAL,),
    "removed": (JOURNAL, f"{JOURNAL}-wal", f"{JOURNAL}-shm", f"{JOURNAL}.damaged"),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("copied", [True, False])
def test_a_run_whose_journal_is_gone_is_not_begun_again(
    tmp_path: Path, loss: str, copied: bool
) -> None:
    run = begun(tmp_path)
    folder = tmp_path / "runs" / "orchard" / JOURNAL_FOLDER
    (folder / JOURNAL).rename(folder / f"{JOURNAL}.damaged")
    for name in LOSSES[loss]:
        (folder / name).unlink(missing_ok=True)
    if not copied:
        (folder / HEAD).unlink()
        for resume in (True, False):
            with pytest.raises(DataError, match=r"is missing.* restore the folder .* --fresh"):
                opened(tmp_path, run, resume=resume)
        assert (folder / RECORDS).exists()
        return
    with pytest.raises(ConfigError, match=r"interrupted after round 2.* continue with --resume"):
        opened(tmp_path, run, resume=False)
    with open_run(run, tmp_path / "runs", resume=True, fresh=False) as (_, journal):
        assert journal.round == 2
        assert journal.start is not None
        assert journal.start.records == (record(1), record(2))


def test_where_nothing_was_begun_there_is_no_journal(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    assert not has_journal(run, tmp_path / "runs")
    folder = tmp_path / "runs" / "orchard" / JOURNAL_FOLDER
    folder.mkdir(parents=True)
    assert not has_journal(run, tmp_path / "runs")
    (folder.parent / "run.json").write_text("{}")
    (folder / JOURNAL).write_bytes(b"")  # it was killed before it wrote anything
    assert not opened(tmp_path, run, resume=True)


def test_a_folder_that_lost_its_mark_is_marked_again(tmp_path: Path) -> None:
    run = begun(tmp_path)
    mark = tmp_path / "runs" / "orchard" / "run.json"
    before = mark.read_bytes()
    mark.unlink()
    with open_run(run, tmp_path / "runs", resume=True, fresh=False) as (_, journal):
        assert journal.round == 2
        assert mark.read_bytes() == before
