"""What a device keeps on disk, and that one process at a time does."""

from __future__ import annotations

from pathlib import Path

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from edge_client.node.state import own
from fedcore.errors import DataError, DeviceError


def content(value: int = 1) -> RecordDict:
    import numpy as np

    return RecordDict(
        {
            "arrays": ArrayRecord({"model": Array(np.full(4, value, np.float32))}),
            "metrics": MetricRecord({"num-examples": value}),
            "config": ConfigRecord({"raw": b"\0\1"}),
        }
    )


def test_state_and_replies_come_back_as_they_were(tmp_path: Path) -> None:
    with own(tmp_path / "device") as folder:
        assert list(folder.state("run")) == []
        assert folder.reply("key") is None
        folder.keep_state("run", content(2))
        folder.keep_reply("key", content(3))
    with own(tmp_path / "device") as folder:
        assert folder.state("run") == content(2)
        assert folder.reply("key") == content(3)
        assert list(folder.state("other run")) == []


def test_what_is_kept_is_for_its_owner_alone(tmp_path: Path) -> None:
    with own(tmp_path / "device") as folder:
        folder.keep_state("run", content())
        folder.keep_reply("key", content())
    files = [path for path in (tmp_path / "device").rglob("*") if path.is_file()]
    assert len(files) == 2
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}


def test_only_the_newest_replies_are_kept(tmp_path: Path) -> None:
    with own(tmp_path) as folder:
        for number in range(10):
            folder.keep_reply(str(number), content(number))
        assert [folder.reply(str(number)) is not None for number in range(10)] == [
            *[False] * 6,
            *[True] * 4,
        ]


def test_a_file_that_is_no_record_is_said_so(tmp_path: Path) -> None:
    with own(tmp_path) as folder:
        folder.keep_state("run", content())
        (tmp_path / "state" / "run.state").write_bytes(b"\xff\xff garbage")
        with pytest.raises(DataError, match="holds no record"):
            folder.state("run")


def test_a_second_process_is_kept_out(tmp_path: Path) -> None:
    with (
        own(tmp_path / "device"),
        pytest.raises(DeviceError, match="another process"),
        own(tmp_path / "device"),
    ):
        pass
    with own(tmp_path / "device"):
        pass
