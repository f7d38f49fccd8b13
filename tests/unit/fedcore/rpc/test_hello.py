"""The handshake: what fits, and what is said when something does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedcore.errors import DataError, DeviceError
from fedcore.rpc.hello import Hello, check_hello, hello_of, instance_of

HELLO = Hello(task="digits", task_digest="a" * 64, app="1.4.2")


def test_a_side_like_ours_is_let_in() -> None:
    headers = HELLO.headers("i-1")
    check_hello(headers, HELLO)
    assert instance_of(headers) == "i-1"


def test_a_later_patch_is_let_in() -> None:
    check_hello(Hello("digits", "a" * 64, app="1.4.9").headers("i"), HELLO)


@pytest.mark.parametrize(
    ("theirs", "told"),
    [
        (Hello("digits", "a" * 64, protocol=2, app="1.4.2"), "install fedcore==1.4.2"),
        (Hello("digits", "a" * 64, app="1.5.0"), "install fedcore==1.4.2"),
        (Hello("digits", "b" * 64, app="1.4.2"), "put the server's task file"),
        (Hello("letters", "a" * 64, app="1.4.2"), "put the server's task file"),
    ],
)
def test_what_does_not_fit_is_told_what_to_install(theirs: Hello, told: str) -> None:
    with pytest.raises(DeviceError, match=told):
        check_hello(theirs.headers("i"), HELLO)


def test_silence_does_not_fit() -> None:
    with pytest.raises(DeviceError, match="protocol none"):
        check_hello({}, HELLO)


def test_what_a_peer_says_is_not_repeated_at_length() -> None:
    loud = {"fedcore-protocol": "9" * 10_000}
    with pytest.raises(DeviceError) as caught:
        check_hello(loud, HELLO)
    assert len(str(caught.value)) < 300
    assert len(instance_of({"fedcore-instance": "x" * 10_000})) == 64


def test_the_digest_is_that_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "task.py"
    path.write_text("task = 1\n")
    first = hello_of("digits", path)
    path.write_text("task = 2\n")
    assert hello_of("digits", path).task_digest != first.task_digest
    with pytest.raises(DataError):
        hello_of("digits", tmp_path / "none.py")
