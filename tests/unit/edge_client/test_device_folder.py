"""What a device keeps on disk, and that one process at a time does."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

import edge_client.device_folder as state_module
from edge_client.device_folder import DeviceFolder, lock_device_folder
from fedcore.errors import DataError, DeviceError
from fedcore.files import write_atomic


def content(value: int = 1) -> RecordDict:
    return RecordDict(
        {
            "arrays": ArrayRecord({"model": Array(np.full(4, value, np.float32))}),
            "metrics": MetricRecord({"num-examples": value}),
            "config": ConfigRecord({"raw": b"\0\1"}),
        }
    )


def test_state_and_replies_come_back_as_they_were(tmp_path: Path) -> None:
    with lock_device_folder(tmp_path / "device") as folder:
        assert list(folder.state("run")) == []
        state = content(2)
        assert folder.reply("key", state) is None
        folder.store_reply("run", state, "key", content(3))
    with lock_device_folder(tmp_path / "device") as folder:
        state = folder.state("run")
        assert {name: state[name] for name in content(2)} == dict(content(2))
        assert folder.reply("key", state) == content(3)
        assert list(folder.state("other run")) == []


def test_what_is_kept_is_for_its_owner_alone(tmp_path: Path) -> None:
    with lock_device_folder(tmp_path / "device") as folder:
        folder.store_reply("run", content(), "key", content())
    files = [path for path in (tmp_path / "device").rglob("*") if path.is_file()]
    assert len(files) == 2
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}


def test_only_the_newest_replies_are_kept(tmp_path: Path) -> None:
    with lock_device_folder(tmp_path) as folder:
        state = RecordDict()
        for number in range(10):
            folder.store_reply("run", state, str(number), content(number))
        assert [folder.reply(str(number), state) is not None for number in range(10)] == [
            *[False] * 6,
            *[True] * 4,
        ]


def test_a_file_that_is_no_record_is_said_so(tmp_path: Path) -> None:
    with lock_device_folder(tmp_path) as folder:
        folder.store_reply("run", content(), "key", content())
        (tmp_path / "state" / "run.state").write_bytes(b"\xff\xff garbage")
        with pytest.raises(DataError, match="does not contain the record"):
            folder.state("run")


def test_a_second_process_is_kept_out(tmp_path: Path) -> None:
    with (
        lock_device_folder(tmp_path / "device"),
        pytest.raises(DeviceError, match="another process"),
        lock_device_folder(tmp_path / "device"),
    ):
        pass
    with lock_device_folder(tmp_path / "device"):
        pass


class Died(Exception):
    pass


def test_a_reply_whose_cost_is_not_on_disk_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It dies between the two files: the instruction is followed again, and charged once."""
    with lock_device_folder(tmp_path) as folder:
        folder.store_reply("run", state := content(1), "before", content(3))
        write = state_module.write_atomic

        def dying(path: Path, data: bytes, *, mode: int) -> None:
            if path.suffix == ".state":
                raise Died
            write(path, data, mode=mode)

        monkeypatch.setattr(state_module, "write_atomic", dying)
        with pytest.raises(Died):
            folder.store_reply("run", state, "key", content(4))
    monkeypatch.undo()
    with lock_device_folder(tmp_path) as folder:
        state = folder.state("run")
        assert folder.reply("key", state) is None
        assert folder.reply("before", state) == content(3)
        folder.store_reply("run", state, "key", content(5))
        assert folder.reply("key", folder.state("run")) == content(5)


def flipped(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 0x10
    path.write_bytes(raw)


def as_folder(path: Path) -> None:
    path.unlink()
    (path / "below").mkdir(parents=True)


def as_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGES: tuple[Callable[[Path], object], ...] = (
    lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    flipped,
    as_folder,
    as_pipe,
)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_reply_is_put_aside_and_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], object]
) -> None:
    with lock_device_folder(tmp_path) as folder:
        folder.store_reply("run", RecordDict(), "key", content(3))
        for again in (4, 5):
            damage(tmp_path / "spool" / "key.reply")
            state = folder.state("run")
            with caplog.at_level(logging.WARNING, "fedcore.device"):
                caplog.clear()
                assert folder.reply("key", state) is None
            (record,) = caplog.records
            assert "key.reply: " in record.getMessage()
            assert "moved aside to key.damaged" in record.getMessage()
            assert {path.name for path in (tmp_path / "spool").iterdir()} == {"key.damaged"}
            folder.store_reply("run", state, "key", content(again))
            assert folder.reply("key", folder.state("run")) == content(again)


def test_a_reply_made_again_is_not_taken_for_the_one_that_was_paid_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It dies between the two files of a reply that was made again."""
    with lock_device_folder(tmp_path) as folder:
        folder.store_reply("run", state := RecordDict(), "key", content(3))
        with monkeypatch.context() as patch:
            patch.setattr(DeviceFolder, "keep_state", lambda *_: None)
            folder.store_reply("run", state, "key", content(4))
        assert (tmp_path / "spool" / "key.reply").exists()
        assert folder.reply("key", folder.state("run")) is None


def test_a_folder_knows_whose_it_is(tmp_path: Path) -> None:
    with lock_device_folder(tmp_path / "device") as folder:
        assert not folder.was_admitted(b"anna")
        folder.record_admission(b"anna")
        folder.store_reply("run", RecordDict(), "key", content())
        folder.record_admission(b"anna")
        assert folder.was_admitted(b"anna")
        with pytest.raises(DeviceError, match="holds the replies and the ledger of the identity"):
            folder.was_admitted(b"ben")
        with pytest.raises(DeviceError, match="Nothing was read; pass this device's own folder"):
            folder.belongs_to(b"ben", so="Nothing was read")
        assert folder.reply("key", folder.state("run")) is not None


def test_what_whose_folder_it_is_cannot_be_read_is_not_guessed(tmp_path: Path) -> None:
    with lock_device_folder(tmp_path / "device") as folder:
        (folder.path / "identity.json").write_text("{}")
        with pytest.raises(DeviceError, match="an unreadable identity"):
            folder.was_admitted(b"anna")


def test_a_folder_from_before_it_said_whose_it_is_is_this_keys(tmp_path: Path) -> None:
    with lock_device_folder(tmp_path / "device") as folder:
        folder.store_reply("run", content(2), "key", content(3))
        assert folder.was_admitted(b"anna")
        folder.record_admission(b"anna")
        assert folder.reply("key", folder.state("run")) == content(3)
        assert folder.was_admitted(b"anna")
        with pytest.raises(DeviceError, match="of the identity"):
            folder.was_admitted(b"ben")


def test_whose_replies_those_are_is_known_without_the_folders_note(tmp_path: Path) -> None:
    with lock_device_folder(tmp_path / "device") as folder:
        folder.record_admission(b"anna")
        folder.store_reply("run", content(2), "key", content(3))
        (folder.path / "identity.json").unlink()
        assert folder.was_admitted(b"anna")
        folder.record_admission(b"anna")
        assert folder.reply("key", folder.state("run")) == content(3)
        (folder.path / "identity.json").unlink()
        (folder.path / "spool" / "identity.json").write_text("{}")
        assert not folder.was_admitted(b"anna")
        folder.record_admission(b"anna")
        assert folder.reply("key", folder.state("run")) is None


def test_who_takes_a_folder_over_gets_what_was_spent_and_no_reply(tmp_path: Path) -> None:
    with lock_device_folder(tmp_path / "device") as folder:
        folder.record_admission(b"anna")
        folder.store_reply("run", content(2), "key", content(3))
        (folder.path / "identity.json").unlink()
        assert not folder.was_admitted(b"ben")
        folder.record_admission(b"ben")
        state = folder.state("run")
        assert state["metrics"] == content(2)["metrics"]
        assert folder.reply("key", state) is None
        assert folder.was_admitted(b"ben")


def test_what_a_device_keeps_is_for_its_own_user_alone(tmp_path: Path) -> None:
    (tmp_path / "device" / "spool").mkdir(parents=True, mode=0o755)  # of an earlier version
    with lock_device_folder(tmp_path / "device") as folder:
        folder.keep_state("run", RecordDict())
        for name in ("", "state", "spool"):
            assert stat.S_IMODE((folder.path / name).stat().st_mode) == (0o700 if name else 0o755)
    with lock_device_folder(tmp_path / "new") as folder:
        assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700


def test_a_folder_that_is_made_for_a_private_file_is_private(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a" / "secret", b"x", mode=0o600)
    write_atomic(tmp_path / "b" / "open", b"x")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "b").stat().st_mode) & 0o755 == 0o755


def test_a_reply_that_is_gone_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with lock_device_folder(tmp_path) as folder:
        state = RecordDict()
        folder.store_reply("run", state, "key", content())
        assert folder.reply("another", state) is None
        assert caplog.messages == []
        (tmp_path / "spool" / "key.reply").unlink()
        assert folder.reply("key", state) is None
    (line,) = caplog.messages
    assert "key.reply: this finished reply is gone" in line


@pytest.mark.timeout(20)
@pytest.mark.parametrize("what", ["loop", "pipe", "folder"])
def test_what_lies_among_the_replies_stops_no_round(tmp_path: Path, what: str) -> None:
    with lock_device_folder(tmp_path) as folder:
        state = RecordDict()
        folder.store_reply("run", state, "0", content())
        odd = tmp_path / "spool" / "odd.reply"
        {
            "loop": lambda: odd.symlink_to(odd.name),
            "pipe": lambda: os.mkfifo(odd),
            "folder": odd.mkdir,
        }[what]()
        for number in range(1, 8):
            folder.store_reply("run", state, str(number), content(number))
        assert not os.path.lexists(odd)
        assert folder.reply("7", state) == content(7)


def test_frozen_parameters_of_few_runs_are_kept_whatever_a_server_opens(tmp_path: Path) -> None:
    """Runs without a reply have no state by which anything else would remove them."""
    frozen = ArrayRecord({"frozen": Array(np.arange(9, dtype=np.uint8))})
    with lock_device_folder(tmp_path) as folder:
        for number in range(9):
            folder.keep_frozen(f"run-{number}", RecordDict({"frozen": frozen}))
            os.utime(tmp_path / "frozen" / f"run-{number}", ns=(number, number))
        folder.keep_frozen("run-0", RecordDict())  # nothing frozen: nothing changes
        kept = {path.name: len(list(path.iterdir())) for path in (tmp_path / "frozen").iterdir()}
        assert kept.keys() == {f"run-{number}" for number in range(5, 9)}
        assert set(kept.values()) == {3}  # the record, its array, and the one piece of it
        folder.keep_frozen("run-5", RecordDict({"frozen": frozen}))
        folder.drop_state("run-6")
        assert sorted(path.name for path in (tmp_path / "frozen").iterdir()) == [
            *("run-5", "run-7", "run-8")
        ]


def test_what_a_killed_process_left_goes_when_the_next_one_starts(tmp_path: Path) -> None:
    with lock_device_folder(tmp_path):
        pass
    (tmp_path / ".ledger.json.0a1b2c3d").touch()
    for folder in (tmp_path, tmp_path / "state", tmp_path / "spool"):
        (folder / ".bashrc.original").touch()
        (folder / "file").touch()
    with lock_device_folder(tmp_path):
        left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert left == {".bashrc.original", "file", "state", "state/file", "spool", "spool/file"}
