from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_client.inference import tuning
from edge_client.inference.engine import Engine
from edge_client.inference.session import CPU, SessionSettings, open_session
from edge_client.inference.tuning import TunedSettings, remember, remembered, tuned_session
from fedcore.artifacts.manifest import Manifest

DIGEST = "a" * 64


def measured(**changed: Any) -> TunedSettings:
    values = {"machine": tuning.machine_name(), "threads": 1, "spinning": False}
    values |= {"parallel": False, "provider": CPU, "p50_us": 8.0}
    return TunedSettings(**{**values, **changed})


def test_what_was_measured_is_remembered_by_machine_and_model(tmp_path: Path) -> None:
    assert remembered(tmp_path / "t", DIGEST) is None
    remember(tmp_path / "t", DIGEST, measured())
    assert remembered(tmp_path / "t", DIGEST) == measured()
    assert remembered(tmp_path / "t", "b" * 64) is None
    for other in (
        {"machine": "another"},
        {"threads": 256},  # more than there are cores
        {"provider": "EvilExecutionProvider"},
    ):
        remember(tmp_path / "t", DIGEST, measured(**other))
        assert remembered(tmp_path / "t", DIGEST) is None


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"[]", b"{}", b"x" * 9000, json.dumps({"threads": "1"}).encode()]
    + [json.dumps({**measured().model_dump(), key: 0}).encode() for key in ("threads", "more")],
)
def test_anything_else_is_as_if_nothing_were_there(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / f"{DIGEST}.json").write_bytes(raw)
    assert remembered(tmp_path, DIGEST) is None


def test_a_place_that_cannot_be_written_is_left(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    remember(tmp_path / "file", DIGEST, measured())
    assert (tmp_path / "file").read_text() == ""


def test_a_fast_model_is_not_tried_with_more(matmul: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "TRIAL_S", 0.1)
    session = open_session(matmul.onnx(1.0), SessionSettings())
    made: list[Any] = []

    def prepare(one: Any) -> Any:
        made.append(one)
        return lambda: one.run(None, {"x": np.eye(3, dtype=np.float32)})

    chosen, tuned = tuned_session(matmul.onnx(1.0), session, prepare)
    assert (chosen, made) == (session, [session])
    assert (tuned.settings, tuned.p50_us > 0) == (SessionSettings(), True)


def test_a_setting_that_is_faster_and_answers_rightly_is_chosen(
    matmul: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "TRIAL_S", 0.2)
    monkeypatch.setattr(tuning, "_cores", lambda: 4)
    monkeypatch.setattr(tuning, "_accelerated", lambda: ["CUDAExecutionProvider"])
    work_s = {1: 2e-3, 2: 1e-3, 4: 5e-4}

    def prepare(one: Any) -> Any:
        options = one.get_session_options()
        threads = options.intra_op_num_threads
        if threads == 4 and options.inter_op_num_threads == 1:
            raise ValueError("it does not answer as it should")
        return lambda: tuning.time.sleep(work_s[threads])

    raw = matmul.onnx(1.0)
    monkeypatch.setattr(tuning, "_candidates", lambda: [SessionSettings(2), SessionSettings(4)])
    _, tuned = tuned_session(raw, open_session(raw, SessionSettings()), prepare)
    assert tuned.settings == SessionSettings(2)
    assert tuned.refused == (f"{CPU}, 4: it does not answer as it should",)


def test_providers_of_this_machine_are_tried_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_cores", lambda: 2)
    available = [CPU, "AzureExecutionProvider", "CUDAExecutionProvider"]
    monkeypatch.setattr(tuning.onnxruntime, "get_available_providers", lambda: available)
    assert list(tuning._candidates()) == [
        SessionSettings(provider="CUDAExecutionProvider"),
        SessionSettings(2),
        SessionSettings(2, spinning=True),
        SessionSettings(2, parallel=True),
    ]


def test_an_engine_measures_once_and_then_remembers(
    manifest: Manifest, matmul: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m").write_bytes(matmul.onnx(1.0))
    monkeypatch.setattr(tuning, "TRIAL_S", 0.1)
    found = []
    for _ in range(2):
        engine = Engine(manifest, tmp_path / "m", matmul.golden(1.0), tuning=tmp_path / "tuning")
        engine.warm_up()
        found.append(engine.tuned)
        np.testing.assert_array_equal(
            engine.run({"x": np.eye(3, dtype=np.float32)})["y"][0], [1, 2]
        )
    assert found[0] is not None
    assert found[0] == found[1] == remembered(tmp_path / "tuning", manifest.onnx.sha256)
