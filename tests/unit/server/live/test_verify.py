"""Who sent the updates of a run is proved from its folder and the server's."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from fedcore.config.run import RunConfig
from fedcore.crypto.kit import KEY
from fedcore.errors import DataError
from server.live.journal.head import JOURNAL
from server.live.journal.journal import create, reopen
from server.live.verify import verify_run
from server.report.folder import JOURNAL_FOLDER
from tests.unit.server.live.journal.journals import progress, record
from tests.unit.server.provision.conftest import Desk

RUN = RunConfig.model_validate({"name": "trial", "task": "task.py"})


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "trial" / JOURNAL_FOLDER
    folder.mkdir(parents=True)
    with closing(create(folder, {"run": RUN.model_dump(mode="json")})) as journal:
        journal.commit(progress(0), None)
        journal.commit(progress(1), record(1))
    return folder.parent


def test_a_run_is_verified_long_after_certificates_expired_and_without_the_key(
    tmp_path: Path, results: Path
) -> None:
    desk = Desk(tmp_path / "authority")
    desk.act = replace(desk.act, now=datetime(2000, 1, 1, tzinfo=UTC))
    server = desk.begin().folder / "server"
    (server / KEY).unlink()
    before = sorted(server.iterdir())
    found = verify_run(results, server)
    assert (found.rounds, found.signatures) == (1, 0)
    assert [fault.what for fault in found.faults] == ["3 updates and 0 signatures"]
    assert sorted(server.iterdir()) == before


def test_a_journal_of_an_earlier_time_beside_a_later_copy_is_not_sound(
    tmp_path: Path, results: Path
) -> None:
    server = Desk(tmp_path / "authority").begin().folder / "server"
    folder = results / JOURNAL_FOLDER
    earlier = (folder / JOURNAL).read_bytes()
    with closing(reopen(folder) or pytest.fail("no journal")) as journal:
        journal.commit(progress(2), replace(record(2), updates=0))
    assert len(verify_run(results, server).faults) == 1, "round 1 has no signatures"
    (folder / JOURNAL).write_bytes(earlier)
    faults = [fault.what for fault in verify_run(results, server).faults]
    assert "the journal ends with round 1, and its copy with round 2" in faults


def test_without_a_member_list_nothing_is_verified(tmp_path: Path, results: Path) -> None:
    with pytest.raises(DataError, match="expected a server's identity"):
        verify_run(results, tmp_path)
