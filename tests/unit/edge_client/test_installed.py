"""A device's models in calls: what serves, and how fast it answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import fedcore
from fedcore.errors import ConfigError, DeviceError


def test_models_are_listed_and_timed(publisher: Any, tmp_path: Path) -> None:
    store = tmp_path / "store"
    assert fedcore.list_models(store) == []
    with pytest.raises(DeviceError, match="no version"):
        fedcore.time_model(store, "digits")
    publisher.publish()
    places = {"repository": publisher.repository, "root": publisher.keys / "root.json"}
    fedcore.update_model(store, "digits", **places)
    (one,) = fedcore.list_models(store)
    assert (one.model, one.version, one.damage) == ("digits", 1, None)
    timing = fedcore.time_model(store, "digits", runs=50)
    assert (timing.version, timing.runs, timing.threads) == (1, 50, 1)
    assert 0 < timing.p50_us <= timing.p99_us
    with pytest.raises(ConfigError, match="runs = 0"):
        fedcore.time_model(store, "digits", runs=0)
    (file,) = store.rglob("model.onnx")
    file.write_bytes(file.read_bytes()[:-1])
    (broken,) = fedcore.list_models(store)
    assert broken.version is None
    assert "has changed since it was installed" in (broken.damage or "")
