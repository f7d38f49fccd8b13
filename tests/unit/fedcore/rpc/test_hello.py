"""The handshake: what fits, and what is said when something does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedcore.errors import DataError, DeviceError
from fedcore.rpc.hello import (
    PROTOCOL,
    Hello,
    check_hello,
    declared_name,
    hello_of,
    instance_of,
    next_request_header,
    next_request_s,
)

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
        (Hello("digits", "a" * 64, protocol=PROTOCOL + 1, app="1.4.2"), "install fedcore==1.4.2"),
        (Hello("digits", "a" * 64, app="1.5.0"), "install fedcore==1.4.2"),
        (Hello("digits", "b" * 64, app="1.4.2"), "copy the server's task file"),
        (Hello("letters", "a" * 64, app="1.4.2"), "copy the server's task file"),
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
    for name in ("x" * 65, "x" * 10_000, "", "a b", "\x1b[31m", "\ud800"):
        assert instance_of({"fedcore-instance": name}) == ""
    assert instance_of({"fedcore-instance": "a-B_9." * 10}) == "a-B_9." * 10


@pytest.mark.parametrize("text", ["", "x", "-1", "nan", "inf"])
def test_a_device_says_when_it_calls_again_or_says_nothing(text: str) -> None:
    assert next_request_s(next_request_header(1.25)) == 1.25
    assert next_request_s({"fedcore-again-s": text}) is None
    assert next_request_s({}) is None


def test_the_digest_is_that_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "task.py"
    path.write_text("task = 1\n")
    first = hello_of("digits", path)
    path.write_text("task = 2\n")
    assert hello_of("digits", path).task_digest != first.task_digest
    with pytest.raises(DataError):
        hello_of("digits", tmp_path / "none.py")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("task = Task(name='digits', kind='x')", "digits"),
        ("task = Task(name='two words')", None),
        ("task = Task(name='caf\u00e9')", None),
        ("task = Task(name=7)", None),
        ("import a\nraise SystemExit\ntask = fedcore.Task(kind='x', name='y')", "y"),
        ("NAME = 'z'\ntask = Task(name=NAME)", None),
        ("other = Task(name='digits')", None),
        ("task = make()", None),
        ("task = Task(name='a')\ntask = replace(task, name='b')", None),
        ("task = Task(name='a')\nif x:\n    from y import task", None),
        ("def f():\n    global task\ntask = Task(name='a')", None),
        ("task = (", None),
        ("", None),
        ("\0", None),
    ],
)
def test_a_name_is_read_without_running_the_file(
    tmp_path: Path, text: str, name: str | None
) -> None:
    path = tmp_path / "task.py"
    path.write_text(text)
    assert declared_name(path) == name


def test_a_task_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the task does not exist\. Nothing was run; give"):
        declared_name(tmp_path / "task.py")
