from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest

from fedcore.errors import ConfigError
from server.commands.serve_command import serve
from server.delivery.bucket_copy import copied_to_bucket
from server.release.bucket import Bucket
from server.release.channels import end_trial
from server.release.draft import CanaryAim
from server.release.publish import publish
from server.release.push import TIMESTAMP
from tests.unit.server.release.conftest import NOW, Publisher, make_draft

TO = "memory://copy-of-tests/releases"


@pytest.fixture
def timestamp() -> Iterator[Callable[[], bytes]]:
    files = fsspec.filesystem("memory")
    yield lambda: bytes(files.cat_file(f"/copy-of-tests/releases/{TIMESTAMP}"))
    files.rm("/copy-of-tests", recursive=True)


def until(holds: Callable[[], bool]) -> None:
    end_s = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end_s
        time.sleep(0.01)


def test_a_trial_that_ends_reaches_the_bucket_when_it_answers_again(
    publisher: Publisher,
    timestamp: Callable[[], bytes],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    places: dict[str, Any] = {"repository": publisher.repository, "keys": publisher.keys}
    publisher.publish(b"one")
    aimed = replace(make_draft(b"two"), canary=CanaryAim(percent=100.0))
    publish(aimed, **places, created=NOW)
    put, failing = Bucket._put, True

    def sometimes(bucket: Bucket, *arguments: Any) -> None:
        if failing:
            raise ConnectionResetError("cut")
        put(bucket, *arguments)

    with caplog.at_level(logging.INFO), copied_to_bucket(**places, to=TO, look_s=0.01):
        before = timestamp()
        assert before == publisher.metadata("timestamp.json")
        monkeypatch.setattr(Bucket, "_put", sometimes)
        end_trial("digits", "it is worse", **places, now=NOW)
        until(lambda: "tried again" in caplog.text)
        assert timestamp() == before
        failing = False
        until(lambda: timestamp() == publisher.metadata("timestamp.json") != before)


def test_a_bucket_without_the_folder_of_keys_is_refused() -> None:
    parser = argparse.ArgumentParser()
    serve.arguments(parser)
    options = parser.parse_args(["--repository", str(Path("r")), "--push", TO])
    with pytest.raises(ConfigError, match="--push needs --keys"):
        serve.run(options)
