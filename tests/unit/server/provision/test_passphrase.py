from __future__ import annotations

import io
from pathlib import Path

import pytest

from fedcore.errors import ConfigError, DataError
from server.provision import passphrase


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(passphrase.VARIABLE, raising=False)


def answers(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    left = list(lines)
    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("getpass.getpass", lambda prompt: left.pop(0))


def test_a_file_comes_before_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert passphrase.configured(None) is None
    monkeypatch.setenv(passphrase.VARIABLE, "from the environment")
    assert passphrase.configured(None) == "from the environment"
    (tmp_path / "p").write_text("from the file \r\nand a second line\n")
    (tmp_path / "p").chmod(0o600)
    assert passphrase.configured(str(tmp_path / "p")) == "from the file "
    monkeypatch.setenv(passphrase.VARIABLE, "")
    assert passphrase.configured(None) is None


@pytest.mark.parametrize("raw", [b"", b"\n", b"\nsecond", b"\xff\xfe"])
def test_a_file_without_one_is_refused(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "p").write_bytes(raw)
    (tmp_path / "p").chmod(0o600)
    with pytest.raises(ConfigError, match="expected a passphrase in the first line"):
        passphrase.configured(str(tmp_path / "p"))


def test_a_file_must_be_there_and_small(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a passphrase does not exist"):
        passphrase.configured(str(tmp_path / "p"))
    (tmp_path / "p").write_bytes(b"x" * 5000)
    (tmp_path / "p").chmod(0o600)
    with pytest.raises(DataError, match="more than the 4096"):
        passphrase.configured(str(tmp_path / "p"))


def test_the_terminal_asks_once_or_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, "one", "two", "two", "three", "four")
    assert passphrase.configured("-") == "one"
    assert passphrase.configured("-", twice=True) == "two"
    with pytest.raises(ConfigError, match="the two passphrases differ"):
        passphrase.configured("-", twice=True)


def test_without_a_terminal_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("piped"))
    with pytest.raises(ConfigError, match=r"there is no terminal to ask for it.*--passphrase-file"):
        passphrase.configured("-")


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660, 0o700 | 0o001])
def test_a_file_that_others_may_read_is_refused(tmp_path: Path, mode: int) -> None:
    (tmp_path / "p").write_text("five random words are good\n")
    (tmp_path / "p").chmod(mode)
    with pytest.raises(ConfigError, match=f"has mode {mode:04o}, expected 0600"):
        passphrase.configured(str(tmp_path / "p"))
    (tmp_path / "p").chmod(0o400)
    assert passphrase.configured(str(tmp_path / "p"))
