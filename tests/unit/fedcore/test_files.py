from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedcore.errors import ConfigError, DataError, DiskFull, ResourceError
from fedcore.files import (
    check_file,
    check_folder,
    check_picture,
    disk_errors,
    lock_file,
    name_exists,
    open_regular,
    read_bytes,
    read_if_exists,
    remove,
    remove_unfinished,
    sha256_hex,
    write_atomic,
    write_json,
)


def test_a_file_is_written_with_its_folders(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    write_atomic(path, b"bytes")
    assert path.read_bytes() == b"bytes"
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_what_a_killed_writer_left_is_removed_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        patch.setattr(Path, "unlink", lambda *_, **__: None)
        with pytest.raises(SystemExit):
            write_atomic(tmp_path / "state.json", b"half")
    assert len(list(tmp_path.iterdir())) == 1
    others = (".lock", ".env.production", "a.b.abcdefgh", ".state.json.ABCDEFGH", ".x.abcdefghi")
    for name in others:
        (tmp_path / name).touch()
    (tmp_path / ".folder.abcdefgh").mkdir()
    (tmp_path / ".link.abcdefgh").symlink_to(tmp_path / ".lock")
    remove_unfinished(tmp_path)
    kept = {*others, ".folder.abcdefgh", ".link.abcdefgh"}
    assert {each.name for each in tmp_path.iterdir()} == kept


def test_only_named_files_or_abandoned_ones_go_where_others_may_write(tmp_path: Path) -> None:
    mine, theirs = tmp_path / ".state.json.abcdefgh", tmp_path / ".bashrc.original"
    for path in (mine, theirs):
        path.touch()
    remove_unfinished(tmp_path, "state.json", idle_s=60.0)
    assert mine.exists()
    for path in (mine, theirs):
        os.utime(path, (time.time() - 61.0,) * 2)
    remove_unfinished(tmp_path, "state.json", idle_s=60.0)
    assert [path.name for path in tmp_path.iterdir()] == [theirs.name]
    remove_unfinished(tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("mode", [0o600, 0o644])
def test_the_mode_is_the_one_asked_for(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    path.chmod(0o666)
    write_atomic(path, b"new", mode=mode)
    assert stat.S_IMODE(path.stat().st_mode) == mode


@pytest.mark.parametrize("fails", ["fsync", "chmod", "replace"])
def test_a_crash_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def crash(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, fails, crash)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_the_bytes_are_on_disk_before_they_take_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor: int) -> None:
        order.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "bytes")
        fsync(descriptor)

    def noted_replace(source: str, target: str) -> None:
        order.append("name")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    write_atomic(tmp_path / "file", b"bytes")
    assert order == ["bytes", "name", "folder"]


def test_a_real_limit_on_file_size_is_a_full_disk(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    code = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "from fedcore.errors import DiskFull\n"
        "from fedcore.files import write_atomic\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try:\n"
        "    write_atomic(Path(sys.argv[1]), bytes(100_000))\n"
        "except DiskFull as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-B", "-c", code, str(path)], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.startswith(f"{path}: the disk has no room for this file"), done.stderr
    assert "No partial file was left" in done.stdout
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_in_any_library_is_disk_full(code: int) -> None:
    with pytest.raises(DiskFull, match="runs/x: the disk has no room"), disk_errors(Path("runs/x")):
        raise OSError(code, os.strerror(code))


def test_another_failure_of_the_system_is_not_called_a_full_disk() -> None:
    with pytest.raises(OSError, match="Input/output error"), disk_errors(Path("x")):
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_file_in_the_way_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder").write_text("a file")
    with pytest.raises(ResourceError, match=r"folder/file: cannot write this file"):
        write_atomic(tmp_path / "folder" / "file", b"bytes")


def test_a_folder_in_the_way_of_a_file_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    with pytest.raises(ResourceError, match="cannot write this file"):
        write_atomic(tmp_path / "file", b"bytes")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_json_ends_with_a_line_and_refuses_nan(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": [1, 2.5, None]})
    assert path.read_text() == '{\n  "a": [\n    1,\n    2.5,\n    null\n  ]\n}\n'
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("nan")})
    assert "null" in path.read_text()


def test_reading_up_to_the_limit_and_no_further(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_bytes(path, max_bytes=5, what="a test") == b"12345"
    with pytest.raises(DataError, match="a test has 5 bytes, more than the 4 allowed"):
        read_bytes(path, max_bytes=4, what="a test")


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none: a test does not exist\.$"):
        read_bytes(tmp_path / "none", max_bytes=5, what="a test")
    for place in (tmp_path / "none", tmp_path):
        with pytest.raises(DataError, match=r"\. Make one\.$"):
            read_bytes(place, max_bytes=5, what="a test", otherwise="Make one.")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="a test does not exist"):
        read_bytes(tmp_path / "file" / "below", max_bytes=5, what="a test")
    with pytest.raises(
        DataError, match="cannot read a test: it is a folder or another kind of file"
    ):
        read_bytes(tmp_path, max_bytes=5, what="a test")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="another kind of file"):
        read_bytes(tmp_path / "pipe", max_bytes=5, what="a test")


def test_a_file_whose_size_is_not_what_the_system_said_is_refused() -> None:
    with pytest.raises(DataError, match="changed while it was being read"):
        read_bytes(Path("/proc/self/status"), max_bytes=1 << 20, what="a test")


def test_a_digest_is_the_published_one() -> None:
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"  # FIPS 180-4 example
    assert sha256_hex(b"") == empty


def test_where_a_result_goes_is_looked_at_without_a_trace(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    check_file(tmp_path / "file", option="--out")
    check_file(tmp_path / "new" / "deep" / "file", option="--out")
    check_folder(tmp_path / "new" / "deep", option="--report")
    check_folder(tmp_path, option="--report")
    check_picture(tmp_path / "new" / "one.PDF", option="--plot")
    for refused, said in (
        (lambda: check_file(tmp_path, option="--out"), "--out .*: expected a file to write"),
        (lambda: check_file(tmp_path / "file" / "x", option="--out"), "--out .*file is a file"),
        (lambda: check_folder(tmp_path / "file", option="--report"), "--report .*file is a file"),
        (lambda: check_folder(Path("/proc/x"), option="--report"), "cannot write into /proc"),
    ):
        with pytest.raises(ResourceError, match=said):
            refused()
    with pytest.raises(ConfigError, match=r"--plot .*\.png, \.pdf or \.svg"):
        check_picture(tmp_path / "one.gif", option="--plot")
    assert sorted(tmp_path.rglob("*")) == before


def _in_place(path: Path, what: str) -> None:
    path.unlink(missing_ok=True)
    if what == "folder":
        path.mkdir()
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "loop":
        path.symlink_to(path.name)
    else:
        path.symlink_to("nowhere")


@pytest.mark.timeout(20)
@pytest.mark.parametrize("what", ["folder", "pipe", "loop", "broken"])
def test_what_is_no_file_is_neither_read_nor_waited_for(tmp_path: Path, what: str) -> None:
    path = tmp_path / "file"
    _in_place(path, what)
    for read in (read_bytes, read_if_exists):
        with pytest.raises(DataError, match=r"^/.*/file: (cannot read it|it is a broken).* So\.$"):
            read(path, max_bytes=10, what="it", otherwise="So.")
    if what in ("folder", "pipe"):
        for flags in (os.O_RDONLY, os.O_RDWR | os.O_CREAT, os.O_WRONLY | os.O_APPEND):
            with pytest.raises(DataError, match="another kind of file"):
                open_regular(path, flags, what="it")
    assert name_exists(path)
    remove(path)
    assert not name_exists(path)
    assert read_if_exists(path, max_bytes=10, what="it") is None


@pytest.mark.timeout(20)
@pytest.mark.parametrize("what", ["folder", "pipe", "loop"])
def test_a_lock_that_is_no_file_is_refused(tmp_path: Path, what: str) -> None:
    path = tmp_path / ".lock"
    _in_place(path, what)
    with pytest.raises((DataError, ResourceError)), lock_file(path):
        pytest.fail("it was held")
    remove(path)
    with lock_file(path), pytest.raises(ConfigError), lock_file(path, ConfigError("busy")):
        pytest.fail("it was held twice")
    with lock_file(path, ConfigError("busy")):
        assert path.is_file()


def test_an_absence_is_told_from_what_cannot_be_looked_at(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    assert not name_exists(tmp_path / "file" / "inside")
    assert name_exists(tmp_path / "loop" / "inside")
