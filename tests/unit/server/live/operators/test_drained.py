from __future__ import annotations

import logging
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from fedcore.crypto.issue import make_request
from fedcore.crypto.keys import new_key
from fedcore.crypto.roster import load_server_identity
from fedcore.errors import DataError
from server.live.operators.drained import read_drained, unknown, warn_of_unknown, write_drained
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
