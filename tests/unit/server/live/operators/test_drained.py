from __future__ import annotations

import logging
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from fedcore.config.run import RunConfig
from fedcore.crypto.issue import make_request
from fedcore.crypto.keys import new_key
from fedcore.crypto.roster import load_server_identity
from fedcore.errors import ConfigError, DataError
from server.live.operators.drained import (
    check_drain,
    read_drained,
    unknown,
    warn_of_unknown,
    write_drained,
)
from server.provision.issue import Act, initialise, provision_member, provision_server, revoke


def test_the_list_comes_back_as_it_was_written(tmp_path: Path) -> None:
    assert read_drained(tmp_path) == frozenset()
    write_drained(tmp_path, {"edge-2", "edge-1"})
    assert read_drained(tmp_path) == {"edge-1", "edge-2"}


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def a_loop(path: Path) -> None:
    path.symlink_to(path)


def deep(path: Path) -> None:
    path.write_text("[" * 200_000)


def no_names(path: Path) -> None:
    path.write_text("[1]")


@pytest.mark.parametrize("make", [a_pipe, a_loop, deep, no_names, Path.mkdir])
def test_a_list_that_cannot_be_read_is_not_taken_for_none(tmp_path: Path, make: Any) -> None:
    make(tmp_path / "drained.json")
    with pytest.raises(DataError, match=r"drained\.json: .*Nothing was started; remove"):
        read_drained(tmp_path)


def test_a_name_that_no_device_has_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    day = timedelta(days=1)
    act = Act(tmp_path / "authority", "anna", datetime.now(UTC).replace(microsecond=0))
    initialise(act, "orchard")
    provision_server(act, ["localhost"], port=9092, validity=day, again=False)
    for name in ("edge-1", "edge-2"):
        request = make_request(new_key(), name)
        provision_member(act, name, "device", request, where=name, validity=day, num_examples=None)
    roster = load_server_identity(act.folder / "server").roster()
    assert unknown({"edge-1", "edge-9"}, roster) == ["edge-9"]
    revoke(act, "edge-2")
    with caplog.at_level(logging.WARNING, "fedcore.server"):
        warn_of_unknown({"edge-1"}, roster)
        assert caplog.records == []
        warn_of_unknown({"edge-1", "edge-2", "edge-9"}, roster)
    assert "edge-2, edge-9: drained, but no device in force has this name" in caplog.text


def test_a_device_is_drained_only_while_others_do_what_it_does() -> None:
    """Of edge-0 to edge-3, by their names, the first two judge and the others train."""
    names = [f"edge-{number}" for number in range(4)]
    federation = {"holdout": 0.5, "holdout_by": "clients", "evaluate_cohort": 2}
    run = RunConfig.model_validate({"name": "r", "task": "t.py", "federation": federation})
    check_drain(run, "edge-2", names, set(), cohort=1)
    with pytest.raises(ConfigError, match="1 device would be left, and each round of 'r' needs 2"):
        check_drain(run, "edge-2", names, set(), cohort=2)
    with pytest.raises(ConfigError, match="1 device would be left, and each round of 'r' needs 2"):
        check_drain(run, "edge-0", names, set(), cohort=1)
    with pytest.raises(ConfigError, match="0 devices would be left, and each round of 'r' needs 1"):
        check_drain(run, "edge-0", ["edge-0", "edge-2", "edge-3"], set(), cohort=1)
    plain = RunConfig.model_validate({"name": "r", "task": "t.py"})
    check_drain(plain, "edge-0", names, {"edge-1"}, cohort=2)
