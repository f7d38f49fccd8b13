from __future__ import annotations

import argparse
import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edge_client.commands import device
from edge_client.delivery import store
from fedcore.errors import ConfigError, DataError, DeviceError, LimitExceeded
from fedcore.files import sha256_hex
from tests import hostile_models as hostile


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    device.arguments(parser)
    return device.run(parser.parse_args(arguments))


@pytest.fixture
def at(publisher: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The arguments that name a store in which version 1 is installed."""
    publisher.publish()
    at = ["--store", str(tmp_path / "store"), "--model", "digits"]
    assert update(publisher, at, "--root", str(publisher.keys / "root.json")) == 0
    assert "version 1 is active; self-test passed" in capsys.readouterr().out
    return at


def update(publisher: Any, at: list[str], *more: str) -> int:
    return run("update", "--repository", str(publisher.repository), *at, *more)


def test_update_says_what_it_did(
    publisher: Any, at: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    update(publisher, at)
    assert capsys.readouterr().out == "digits: version 1 is already current\n"
    publisher.publish(2.0)
    update(publisher, at, "--json")
    assert json.loads(capsys.readouterr().out) == {
        "model": "digits",
        "version": 2,
        "previous": 1,
        "changed": True,
        "golden_error": 0.0,
        "clock": None,
        "damage": None,
        "held": None,
    }


def test_infer_answers_with_labels(
    at: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.json").write_text("[[1, 0, 0], [-1, 0, 0]]")
    run("infer", *at, "--input", str(tmp_path / "x.json"))
    assert capsys.readouterr().out == "yes\nno\n"
    run("infer", *at, "--input", str(tmp_path / "x.json"), "--threads", "2", "--json")
    assert json.loads(capsys.readouterr().out) == {
        "model": "digits",
        "version": 1,
        "outputs": [[1, 2], [-1, -2]],
        "labels": ["yes", "no"],
    }


def test_infer_reads_standard_input(
    at: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"[[1, 0, 0]]")))
    run("infer", *at, "--input", "-")
    assert capsys.readouterr().out == "yes\n"


def test_a_fallback_is_said_aloud(
    publisher: Any, at: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publisher.publish(2.0)
    update(publisher, at)
    (tmp_path / "store" / "models" / "digits" / "2" / "model.onnx").write_bytes(b"x")
    (tmp_path / "x.json").write_text("[[1, 0, 0]]")
    capsys.readouterr()
    assert run("infer", *at, "--input", str(tmp_path / "x.json")) == 0
    shown = capsys.readouterr()
    assert shown.out == "yes\n"
    assert "warning: version 1 serves instead of the active one" in shown.err
    assert run("status", *at[:2]) == 0
    assert "the active version cannot be served" in capsys.readouterr().out
    (tmp_path / "store" / "models" / "digits" / "1" / "model.onnx").write_bytes(b"x")
    assert run("status", *at[:2]) == 10
    assert "no version can be served" in capsys.readouterr().out


def test_status_lists_what_serves(
    at: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("status", *at[:2], "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["model"], row["version"], row["damage"]) == ("digits", 1, None)
    assert row["epsilon"] == 7.5
    assert run("status", "--store", str(tmp_path / "empty")) == 0
    assert "no model is installed" in capsys.readouterr().out


def test_bench_times_single_inferences(at: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    run("bench", *at, "--runs", "100", "--json")
    figures = json.loads(capsys.readouterr().out)
    assert 0 < figures["p50_us"] <= figures["p99_us"] < 1e6
    assert (figures["runs"], figures["threads"]) == (100, 1)
    run("bench", *at, "--runs", "10")
    assert "p99" in capsys.readouterr().out
    run("bench", *at, "--runs", "1")


def test_bench_runs_no_model_in_this_process(
    at: list[str], publisher: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = tmp_path / "store" / "models" / "digits" / "1"
    raw = hostile.endless_loop()
    version = store.read(tmp_path / "store", "digits", "active")
    entry = version.manifest.onnx.model_copy(update={"sha256": sha256_hex(raw), "length": len(raw)})
    (installed / "model.onnx").write_bytes(raw)
    bad = replace(
        version,
        manifest=version.manifest.model_copy(update={"onnx": entry}),
        path=installed / "model.onnx",
    )
    monkeypatch.setattr(store, "serving", lambda *_: bad)
    with pytest.raises(LimitExceeded, match="no answer within 1 s"):
        run("bench", *at, "--max-seconds", "1")


def test_bad_input_is_told_apart(at: list[str], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.json"):
        run("infer", *at, "--input", str(tmp_path / "none.json"))
    with pytest.raises(DeviceError, match="'other'"):
        run("infer", *at[:2], "--model", "other", "--input", "x")
    with pytest.raises(ConfigError, match=r"^model "):
        run("bench", *at[:2], "--model", "../x")
    with pytest.raises(DataError, match="--repository"):
        run("update", "--repository", str(tmp_path / "none"), *at)


@pytest.mark.parametrize("threads", ["0", "-1", "x", "1.5", "257", "9" * 5000])
def test_threads_are_a_whole_number(at: list[str], threads: str) -> None:
    with pytest.raises(ConfigError, match="--threads: expected a whole number from 1 to"):
        run("infer", *at, "--input", "-", "--threads", threads)


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "x", "1e9", "0.5"])
def test_the_limit_of_time_has_limits(at: list[str], seconds: str) -> None:
    with pytest.raises(ConfigError, match="--max-seconds: expected 1 to 86400 seconds"):
        run("infer", *at, "--input", "-", "--max-seconds", seconds)


@pytest.mark.parametrize("mib", ["0", "-1", "x", "1.5", "255", "9" * 5000])
def test_the_limit_of_memory_has_limits(at: list[str], mib: str) -> None:
    with pytest.raises(ConfigError, match="--max-memory-mib: expected 256 to 1048576 MiB"):
        run("infer", *at, "--input", "-", "--max-memory-mib", mib)
