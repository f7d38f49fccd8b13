from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge_client.delivery import store
from edge_client.delivery.store import Record
from fedcore.artifacts.manifest import Manifest, manifest_bytes
from fedcore.errors import ConfigError, DataError, DeviceError, DigestMismatch
from fedcore.files import sha256_hex

Install = Callable[[int], Record]


@pytest.fixture
def install(tmp_path: Path, manifest: Manifest, matmul: Any) -> Install:
    """Installs the tiny model as some version."""

    def install(version: int) -> Record:
        raw = manifest_bytes(manifest.model_copy(update={"version": version}))
        onnx, golden = tmp_path / "onnx", tmp_path / "golden"
        onnx.write_bytes(matmul.onnx(1.0))
        golden.write_bytes(matmul.golden(1.0))
        record = Record(version=version, manifest_sha256=sha256_hex(raw))
        try:
            before = store.serving(tmp_path / "store", "digits").record
        except (DeviceError, DigestMismatch):
            before = None
        with store.staged(tmp_path / "store", "digits", raw, onnx, golden) as folder:
            store.activate(tmp_path / "store", "digits", folder, record, before)
        return record

    return install


def versions(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "models" / "digits").iterdir() if path.is_dir())


def test_what_is_installed_serves_whole(tmp_path: Path, install: Install, matmul: Any) -> None:
    record = install(1)
    found = store.serving(tmp_path / "store", "digits")
    assert found.record == record
    assert found.damage is None
    assert (found.path.read_bytes(), found.golden) == (matmul.onnx(1.0), matmul.golden(1.0))
    assert store.models(tmp_path / "store") == ["digits"]


def test_the_version_before_is_kept_and_older_ones_go(tmp_path: Path, install: Install) -> None:
    for version in (1, 2, 5, 6):
        install(version)
    assert versions(tmp_path / "store") == ["5", "6"]
    assert store.read(tmp_path / "store", "digits", "previous").manifest.version == 5
    assert store.serving(tmp_path / "store", "digits").manifest.version == 6


@pytest.mark.parametrize("name", ["model.onnx", "golden.safetensors", "manifest.json"])
def test_one_byte_changed_is_noticed_and_the_version_before_serves(
    tmp_path: Path, install: Install, name: str
) -> None:
    install(1)
    install(2)
    path = tmp_path / "store" / "models" / "digits" / "2" / name
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    with pytest.raises(DigestMismatch, match="has changed since"):
        store.read(tmp_path / "store", "digits", "active")
    found = store.serving(tmp_path / "store", "digits")
    assert found.manifest.version == 1
    assert found.damage is not None
    assert name in found.damage


@pytest.mark.parametrize("name", ["2/model.onnx", "2/manifest.json", "active"])
def test_a_file_that_is_lost_or_garbage_is_noticed(
    tmp_path: Path, install: Install, name: str
) -> None:
    install(1)
    install(2)
    path = tmp_path / "store" / "models" / "digits" / name
    for garbage in (b"", b"{", b"[]", b'{"version":1}', b"\x00" * 64):
        path.write_bytes(garbage)
        assert store.serving(tmp_path / "store", "digits").manifest.version == 1
    if name != "active":
        path.unlink()
        assert store.serving(tmp_path / "store", "digits").manifest.version == 1


def test_without_anything_whole_nothing_serves(tmp_path: Path, install: Install) -> None:
    install(1)
    (tmp_path / "store" / "models" / "digits" / "1" / "model.onnx").write_bytes(b"x")
    with pytest.raises(DigestMismatch, match="no intact earlier version"):
        store.serving(tmp_path / "store", "digits")
    install(2)
    (tmp_path / "store" / "models" / "digits" / "2" / "model.onnx").write_bytes(b"x")
    with pytest.raises(DigestMismatch, match="no intact earlier version"):
        store.serving(tmp_path / "store", "digits")


def test_a_damaged_version_does_not_become_the_one_before(tmp_path: Path, install: Install) -> None:
    install(1)
    install(2)
    (tmp_path / "store" / "models" / "digits" / "2" / "model.onnx").write_bytes(b"x")
    install(3)
    assert store.read(tmp_path / "store", "digits", "previous").manifest.version == 1
    assert versions(tmp_path / "store") == ["1", "3"]


def test_a_damaged_version_is_replaced_by_itself(tmp_path: Path, install: Install) -> None:
    install(1)
    install(2)
    (tmp_path / "store" / "models" / "digits" / "2" / "model.onnx").write_bytes(b"x")
    install(2)
    found = store.serving(tmp_path / "store", "digits")
    assert (found.manifest.version, found.damage) == (2, None)
    assert versions(tmp_path / "store") == ["1", "2"]


def test_what_is_staged_and_not_activated_leaves_nothing(tmp_path: Path, install: Install) -> None:
    install(1)
    before = sorted((tmp_path / "store").rglob("*"))
    (tmp_path / "onnx").write_bytes(b"x")
    (tmp_path / "golden").write_bytes(b"x")
    with (
        pytest.raises(KeyboardInterrupt),
        store.staged(tmp_path / "store", "digits", b"{}", tmp_path / "onnx", tmp_path / "golden"),
    ):
        raise KeyboardInterrupt
    assert sorted((tmp_path / "store").rglob("*")) == before


def test_nothing_installed_says_how_to_install(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="device update"):
        store.serving(tmp_path, "digits")
    assert store.models(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../x", "a/b", "", "A", ".", "x\n"])
def test_a_name_that_could_lead_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"^model "):
        store.serving(tmp_path, name)


def test_one_update_at_a_time(tmp_path: Path) -> None:
    with (
        store.locked(tmp_path),
        pytest.raises(DeviceError, match="another update"),
        store.locked(tmp_path),
    ):
        raise AssertionError("two updates hold the lock")
    with store.locked(tmp_path):
        pass


def test_a_slot_that_is_empty_is_an_error_of_data(tmp_path: Path, install: Install) -> None:
    install(1)
    with pytest.raises(DataError, match="does not exist"):
        store.read(tmp_path / "store", "digits", "previous")


def test_an_update_removes_what_a_killed_one_left_half_written(
    tmp_path: Path, install: Install
) -> None:
    install(1)
    folder = tmp_path / "store"
    names = ("models/digits/.active.abcdefgh", "trust/.clock.json.abcdefgh")
    tuned = "tuning/.x.json.abcdefgh"  # a server of the model may be writing it
    for name in (*names, tuned):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    with store.locked(folder):
        left = {str(path.relative_to(folder)) for path in folder.rglob(".*.abcdefgh")}
    assert left == {tuned}
    assert store.serving(folder, "digits").manifest.version == 1
