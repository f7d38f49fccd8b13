from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedcore
from edge_client.delivery.store import Installed, Record
from edge_client.delivery.update import UpdateResult
from edge_client.inference.process import ModelLimits
from edge_client.model import EdgeModel, open_model
from fedcore.errors import ConfigError, DataError, DeviceError, DigestMismatch, LimitExceeded
from fedcore.files import sha256_hex
from tests import hostile_models as hostile

RECORD = Record(version=1, manifest_sha256="a" * 64)
X = [[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]]
WEIGHT = np.arange(1, 7).reshape(3, 2).astype(np.float32)


def install(publisher: Any, store: Path) -> UpdateResult:
    root = publisher.keys / "root.json"
    return fedcore.update_model(
        store, "digits", repository=str(publisher.repository), root=root, threads=1
    )


@pytest.fixture
def store(publisher: Any, tmp_path: Path) -> Path:
    """A device's folder with version 1 of the model."""
    publisher.publish()
    install(publisher, tmp_path / "store")
    return tmp_path / "store"


def test_an_update_says_what_it_did_and_prints_nothing(
    publisher: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    publisher.publish()
    store, places = tmp_path / "new", {"repository": publisher.repository}
    with pytest.raises(ConfigError, match="root"):  # the first one needs it
        fedcore.update_model(store, "digits", **places)
    done = install(publisher, store)
    assert (done.version, done.previous, done.changed) == (1, None, True)
    assert not fedcore.update_model(store, "digits", **places).changed  # the root is pinned
    publisher.publish(2.0)
    done = fedcore.update_model(str(store), "digits", **places)
    assert (done.version, done.previous, done.golden_error) == (2, 1, 0.0)
    assert fedcore.open_model(store, "digits").version == 2
    assert capfd.readouterr() == ("", "")


def test_an_update_that_cannot_be_is_a_typed_error(
    publisher: Any, store: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="expected a release repository"):
        fedcore.update_model(store, "digits", repository=tmp_path / "none")
    with pytest.raises(DataError, match="a root"):
        fedcore.update_model(
            store, "digits", repository=publisher.repository, root=tmp_path / "none.json"
        )
    with pytest.raises(ConfigError):
        fedcore.update_model(store, "No good", repository=publisher.repository)
    assert fedcore.open_model(store, "digits").version == 1


def test_an_installed_model_answers_one_input_or_a_batch(store: Path) -> None:
    model = fedcore.open_model(store, "digits")
    assert (model.name, model.version, model.labels) == ("digits", 1, ("no", "yes"))
    assert model.damage is None
    np.testing.assert_array_equal(model.predict(X), np.array(X, np.float32) @ WEIGHT)
    np.testing.assert_array_equal(model.predict(np.array(X)), model.predict(X))
    one = model.predict(X[1])
    assert one.shape == (2,)
    np.testing.assert_array_equal(one, model.predict(X)[1])
    assert model.predict([[1, 2, 3]]).shape == (1, 2)
    assert model.predict_labels(X) == ["yes", "yes"]
    assert model.predict_labels(np.array([-1.0, 0, 0])) == "no"
    assert "EdgeModel(" in repr(model)


@pytest.mark.parametrize(
    ("x", "said"),
    [
        ([1.0, 2.0], r"expected one of shape \[3\] or a batch of shape \[B, \*\[3\]\].*got shape"),
        (5, "got shape"),
        ([], "got shape"),
        (np.zeros((0, 3)), "got shape"),
        (np.zeros((2, 3, 1)), "got shape"),
        ([[1, 2, 3], [1]], "input: expected"),
        ([1.0, 2.0, float("nan")], "finite and of type float32"),
        ([1e39, 0, 0], "finite"),
        (["1", "2", "3"], "text among the numbers"),
        (["x" * 5_000_000, *[0] * 200_000], "text among the numbers"),
        ([10**400, 2, 3], "a whole number that float64 cannot hold"),
        ([None, 1, 2], "finite"),
    ],
)
def test_anything_else_is_refused(store: Path, x: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        open_model(store, "digits").predict(x)


def test_what_cannot_be_opened_says_why(store: Path, tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="no version of model 'letters' is installed"):
        open_model(str(store), "letters")
    with pytest.raises(ConfigError, match=r"^model '\.\./x': expected 1 to 64"):
        open_model(store, "../x")
    (store / "models/digits/1/model.onnx").write_bytes(b"x")
    with pytest.raises(DigestMismatch, match="it has changed since it was installed"):
        open_model(store, "digits")


def test_a_version_stays_open_and_one_that_was_replaced_says_so(
    publisher: Any, store: Path
) -> None:
    first = open_model(store, "digits")
    publisher.publish(2.0)
    install(publisher, store)
    second = open_model(store, "digits")
    assert (first.version, second.version) == (1, 2)
    np.testing.assert_array_equal(2 * first.predict(X), second.predict(X))
    late = open_model(store, "digits")
    publisher.publish(3.0)
    install(publisher, store)
    publisher.publish(4.0)
    install(publisher, store)  # the device keeps the version before alone
    np.testing.assert_array_equal(2 * first.predict(X), second.predict(X))  # they are loaded
    with pytest.raises(DeviceError, match="an update may have replaced it"):
        late.predict(X)


def test_a_damaged_version_leaves_the_one_before(publisher: Any, store: Path) -> None:
    publisher.publish(2.0)
    install(publisher, store)
    (store / "models/digits/2/model.onnx").write_bytes(b"x")
    model = open_model(store, "digits")
    assert model.version == 1
    assert model.damage is not None


def test_a_model_keeps_to_its_limits(manifest: Any, tmp_path: Path) -> None:
    raw = hostile.endless_loop()
    path = tmp_path / "model.onnx"
    path.write_bytes(raw)
    entry = manifest.onnx.model_copy(update={"sha256": sha256_hex(raw), "length": len(raw)})
    installed = Installed(manifest.model_copy(update={"onnx": entry}), RECORD, path, b"")
    model = EdgeModel(installed, limits=ModelLimits(seconds=1.0))
    with pytest.raises(LimitExceeded, match=r"ModelLimits\.seconds"):
        model.predict(X)


def test_labels_are_a_classifiers(manifest: Any, tmp_path: Path) -> None:
    rows = manifest.model_copy(update={"kind": "regression"})
    model = EdgeModel(Installed(rows, RECORD, tmp_path / "model.onnx", b""))
    with pytest.raises(DeviceError, match=r"its kind is regression.*predict\(\) gives its outputs"):
        model.predict_labels(X)
