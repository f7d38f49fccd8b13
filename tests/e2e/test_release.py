"""Releases and a device's store, in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from server.release.publish import publish
from tests.adversarial.conftest import World, initialised, matmul_draft
from tests.hostile_models import endless_loop

BIN = Path(sys.executable).with_name("fedcore")


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = initialised(tmp_path)
    world.publish(1.0)
    assert world.update().version == 1
    return world


def update(world: World, *more: str) -> list[str | Path]:
    place = ["--repository", world.repository, "--store", world.store, "--model", "digits"]
    return [BIN, "device", "update", *place, *more]


def answers(world: World, fresh_fedcore: Callable[..., Any]) -> list[list[float]]:
    place = ("--store", world.store, "--model", "digits", "--input", "-", "--json")
    done = fresh_fedcore("device", "infer", *place, cwd=world.folder, input="[[1, 0, 0]]")
    assert done.returncode == 0, done.stderr
    outputs: list[list[float]] = json.loads(done.stdout)["outputs"]
    return outputs


def children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in text.split()]


def ended(pid: int) -> bool:
    try:
        return "State:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True


def until(what: Callable[[], Any], seconds: float = 30.0) -> Any:
    ends = time.monotonic() + seconds
    while not (got := what()):
        assert time.monotonic() < ends, "it never came to that"
        time.sleep(0.02)
    return got


def publish_endless(world: World) -> None:
    draft = replace(matmul_draft(2.0), onnx=endless_loop())
    publish(draft, repository=world.repository, keys=world.keys, created=datetime.now(UTC))


def test_a_model_that_never_answers_is_refused_and_the_one_before_serves(
    world: World, fresh_fedcore: Callable[..., Any]
) -> None:
    publish_endless(world)
    done = fresh_fedcore(*update(world, "--max-seconds", "2")[1:], cwd=world.folder)
    assert done.returncode == 11, done.stderr
    assert "no answer within 2 s, this device's time limit" in done.stderr
    assert "Traceback" not in done.stderr
    assert answers(world, fresh_fedcore) == [[1.0, 2.0]]
    world.publish(3.0)  # the lock is free, and the next release is taken
    assert fresh_fedcore(*update(world)[1:], cwd=world.folder).returncode == 0
    assert answers(world, fresh_fedcore) == [[3.0, 6.0]]


@pytest.mark.parametrize("signal", ["SIGKILL", "SIGTERM", "SIGINT"])
def test_an_update_that_is_ended_leaves_no_process_and_no_lock(
    world: World, fresh_fedcore: Callable[..., Any], signal: str
) -> None:
    import signal as signals

    publish_endless(world)
    at_work = subprocess.Popen(update(world), stderr=subprocess.DEVNULL)
    try:
        (child,) = until(lambda: children(at_work.pid))
        # It computes: no handler of its own could run any more.
        until(lambda: int(Path(f"/proc/{child}/stat").read_text().split()[13]) > 30)
        busy = fresh_fedcore(*update(world)[1:], cwd=world.folder)
        assert busy.returncode == 11
        assert "another update of this store is in progress" in busy.stderr
        os.kill(at_work.pid, signals.Signals[signal])
        at_work.wait(timeout=10)
    finally:
        at_work.kill()
        at_work.wait()
    until(lambda: ended(child), seconds=5)
    assert answers(world, fresh_fedcore) == [[1.0, 2.0]]
    world.publish(3.0)
    assert fresh_fedcore(*update(world)[1:], cwd=world.folder).returncode == 0
    assert answers(world, fresh_fedcore) == [[3.0, 6.0]]


def test_keys_are_rotated_under_a_devices_store(
    tmp_path: Path, fresh_fedcore: Callable[..., Any]
) -> None:
    world = World(tmp_path)
    places = ("--repository", world.repository, "--keys", world.keys)

    def release(verb: str, *more: str) -> None:
        done = fresh_fedcore("release", verb, *places, *more, cwd=tmp_path)
        assert done.returncode == 0, done.stderr

    release("init", "--threshold", "root=2/3", "--threshold", "releases=2/2")
    first = (world.keys / "root.json").read_bytes()
    (tmp_path / "first.json").write_bytes(first)
    world.publish(1.0)
    assert fresh_fedcore(*update(world, "--root", "first.json")[1:], cwd=tmp_path).returncode == 0
    for factor in (2.0, 3.0):
        world.publish(factor)
    assert fresh_fedcore(*update(world)[1:], cwd=tmp_path).returncode == 0
    assert answers(world, fresh_fedcore) == [[3.0, 6.0]]

    # The device is off for all of these.
    release("rotate", "--role", "root", "--role", "online")
    release("rotate", "--role", "offline", "--threshold", "root=1/1")
    release("refresh", "--offline")
    release("rotate", "--last-good", "digits=2")
    for name in ("first.json", "keys/root.json"):
        done = fresh_fedcore(*update(world, "--root", name)[1:], cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert answers(world, fresh_fedcore) == [[2.0, 4.0]]
    world.publish(5.0)
    done = fresh_fedcore(*update(world, "--json")[1:], cwd=tmp_path)
    assert json.loads(done.stdout)["version"] == 3
    assert answers(world, fresh_fedcore) == [[5.0, 10.0]]
    looked_at = fresh_fedcore("doctor", "--store", world.store, cwd=tmp_path)
    assert "OK   store" in looked_at.stdout, looked_at.stdout + looked_at.stderr
