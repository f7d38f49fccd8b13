from __future__ import annotations

import argparse
import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedcore.config.run import RunConfig
from fedcore.crypto.kit import KIT
from fedcore.errors import ConfigError, PrivacyError
from server.live.commands import rollback
from server.live.journal.journal import create, reopen
from server.live.rollback import RolledBack, roll_back
from server.operator_log import AUDIT
from server.report.folder import JOURNAL_FOLDER, locked
from server.rounds.client_privacy.protection import ClientPlan, Protection
from tests.unit.server.live.journal.journals import IDENTITY, LARGE, progress, record

RUN = RunConfig.model_validate({"name": "trial", "task": "task.py"})


def begun(tmp_path: Path, *, rounds: int = 5, protected: bool = False) -> Path:
    (tmp_path / "identity").mkdir(mode=0o700)
    folder = tmp_path / "runs" / "trial" / JOURNAL_FOLDER
    folder.mkdir(parents=True)
    with closing(create(folder, IDENTITY)) as journal:
        for number in range(rounds + 1):
            now = progress(number, LARGE)
            if protected:
                now = replace(now, protection=Protection(ClientPlan(9, 3, 1.0, None), 1.0))
            journal.commit(now, record(number) if number else None)
    return folder


def back(tmp_path: Path, number: int) -> RolledBack:
    return roll_back(RUN, tmp_path / "runs", number, identity=tmp_path / "identity", by="uid 0")


def test_a_run_goes_on_after_the_round_before(tmp_path: Path) -> None:
    folder = begun(tmp_path)
    assert back(tmp_path, 4) == RolledBack(4, (5,))
    again = reopen(folder)
    assert again is not None
    with closing(again) as journal:
        assert journal.start is not None
        assert journal.start.progress.round == 4
        assert journal.start.progress.weights[0] == 4.0
        assert [one.round for one in journal.start.records] == [1, 2, 3, 4]
        assert journal.rounds_kept() == [4]
        journal.commit(progress(5, LARGE), record(5))
    (line,) = (tmp_path / "identity" / AUDIT).read_text().splitlines()
    assert json.loads(line) | {"at": "", "before": ""} == {
        "at": "",
        "before": "",
        "by": "uid 0",
        "action": "rollback",
        "outcome": "begun",
        "round": 4,
        "run": "trial",
    }


def test_an_earlier_round_is_not_kept_and_what_would_be_needed_is_said(tmp_path: Path) -> None:
    begun(tmp_path)
    with pytest.raises(ConfigError, match=r"of rounds 4 and 5 are.*restore .* from a backup"):
        back(tmp_path, 2)


def test_to_the_last_round_nothing_is_dropped(tmp_path: Path) -> None:
    begun(tmp_path)
    assert back(tmp_path, 5) == RolledBack(5, ())


def test_no_rollback_where_there_is_nothing_or_a_server_runs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no run"):
        back(tmp_path, 1)
    begun(tmp_path)
    with (
        locked(tmp_path / "runs" / "trial"),
        pytest.raises(ConfigError, match="a run of this name is in progress"),
    ):
        back(tmp_path, 4)


def test_a_run_that_is_over_is_left_alone(tmp_path: Path) -> None:
    folder = begun(tmp_path)
    again = reopen(folder)
    assert again is not None
    with closing(again):
        again.end()
    with pytest.raises(ConfigError, match="this run is complete"):
        back(tmp_path, 4)


def test_what_clients_privacy_has_cost_is_not_forgotten(tmp_path: Path) -> None:
    begun(tmp_path, protected=True)
    with pytest.raises(PrivacyError, match="a rollback would forget"):
        back(tmp_path, 4)


def test_the_verb_explains_itself() -> None:
    assert "rollback 7" in rollback.example


def test_a_run_that_is_named_by_set_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begun(tmp_path)
    (tmp_path / "identity" / KIT).write_text("{}")
    config = tmp_path / "run.toml"
    config.write_text('name = "other"\ntask = "task.py"\n')
    parser = argparse.ArgumentParser()
    rollback.arguments(parser)
    words = ["4", str(config), "--set", "name=trial", "--runs", str(tmp_path / "runs")]
    options = parser.parse_args([*words, "--identity", str(tmp_path / "identity")])
    assert rollback.run(options) == 0
    assert capsys.readouterr().out.startswith("trial: continues after round 4")


def test_what_was_damaged_and_mended_first_is_said(tmp_path: Path) -> None:
    folder = begun(tmp_path)
    with closing(create(tmp_path / "probe", IDENTITY)) as probe:
        probe.commit(progress(5, LARGE), None)
    (newest,) = (
        path.name for path in (tmp_path / "probe" / "values").iterdir() if is_of(path, 5.0)
    )
    (folder / "values" / newest).write_bytes(b"")
    done = back(tmp_path, 4)
    assert done.dropped == ()
    assert "continues after round 4" in done.mended


def is_of(path: Path, value: float) -> bool:
    return bool((np.frombuffer(path.read_bytes(), np.float32) == value).all())
