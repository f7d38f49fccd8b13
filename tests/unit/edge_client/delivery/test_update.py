from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edge_client.delivery import store as installed
from edge_client.delivery.source import folder_source
from edge_client.delivery.update import UpdateResult, update
from fedcore.errors import ConfigError, DataError, DeviceError, ResourceError, TrustError


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


def run(
    publisher: Any, store: Path, *, root: bytes | None = None, model: str = "digits"
) -> UpdateResult:
    return update(
        folder_source(publisher.repository), store=store, model=model, root=root, threads=1
    )


def test_the_first_update_installs_and_pins_the_root(publisher: Any, store: Path) -> None:
    publisher.publish()
    done = run(publisher, store, root=publisher.root)
    assert done == UpdateResult("digits", 1, None, changed=True, golden_error=0.0)
    assert (store / "trust" / "pinned.root.json").read_bytes() == publisher.root
    assert list((store / "incoming").iterdir()) == []


def test_later_updates_need_no_root_and_keep_the_version_before(
    publisher: Any, store: Path
) -> None:
    publisher.publish()
    run(publisher, store, root=publisher.root)
    publisher.publish(2.0)
    done = run(publisher, store)
    assert (done.version, done.previous, done.changed) == (2, 1, True)
    assert installed.read(store, "digits", "previous").manifest.version == 1


def test_what_is_current_is_not_fetched_again(publisher: Any, store: Path) -> None:
    publisher.publish()
    run(publisher, store, root=publisher.root)
    (models,) = (publisher.repository / "targets").rglob("*.model.onnx")
    models.unlink()  # would be missed if it were asked for
    done = run(publisher, store, root=publisher.root)
    assert done == UpdateResult("digits", 1, None, changed=False, golden_error=None)


def test_a_damaged_version_is_fetched_again(publisher: Any, store: Path) -> None:
    publisher.publish()
    run(publisher, store, root=publisher.root)
    publisher.publish(2.0)
    run(publisher, store)
    (store / "models" / "digits" / "2" / "model.onnx").write_bytes(b"x")
    done = run(publisher, store)
    assert (done.version, done.previous, done.changed) == (2, 1, True)
    assert installed.serving(store, "digits").damage is None


@pytest.mark.parametrize("slot", ["active", "previous"])
def test_a_damaged_record_is_mended(publisher: Any, store: Path, slot: str) -> None:
    publisher.publish()
    run(publisher, store, root=publisher.root)
    publisher.publish(2.0)
    run(publisher, store)
    (store / "models" / "digits" / slot).write_bytes(b"{")
    done = run(publisher, store)
    assert done.version == 2
    assert installed.serving(store, "digits").manifest.version == 2
    publisher.publish(3.0)
    assert run(publisher, store).version == 3
    assert installed.read(store, "digits", "previous").manifest.version == 2


def test_one_store_holds_several_models(publisher: Any, store: Path) -> None:
    publisher.publish(1.0, model="one")
    publisher.publish(2.0, model="two")
    run(publisher, store, root=publisher.root, model="one")
    run(publisher, store, model="two")
    assert installed.models(store) == ["one", "two"]


def test_a_root_is_needed_once_and_another_is_refused(
    publisher: Any, store: Path, tmp_path: Path
) -> None:
    publisher.publish()
    with pytest.raises(ConfigError, match="--root"):
        run(publisher, store)
    for wrong in (
        b"garbage",
        b"{}",
        (publisher.repository / "metadata/1.targets.json").read_bytes(),
    ):
        with pytest.raises(TrustError, match="--root"):
            run(publisher, store, root=wrong)
    forged = publisher.root.replace(b'"version":1', b'"version":2')
    with pytest.raises(TrustError, match="--root"):
        run(publisher, store, root=forged)
    assert not (store / "trust" / "pinned.root.json").exists()
    run(publisher, store, root=publisher.root)
    with pytest.raises(TrustError, match="neither the one that this device has trusted"):
        run(publisher, store, root=publisher.root + b" ")


def test_a_model_that_was_never_released_is_named(publisher: Any, store: Path) -> None:
    publisher.publish()
    with pytest.raises(DataError, match="'other'"):
        run(publisher, store, root=publisher.root, model="other")
    with pytest.raises(ConfigError, match=r"^model "):
        run(publisher, store, root=publisher.root, model="../digits")


def test_a_second_update_at_once_is_refused(publisher: Any, store: Path) -> None:
    publisher.publish()
    run(publisher, store, root=publisher.root)
    with installed.locked(store), pytest.raises(DeviceError, match="another update"):
        run(publisher, store)


def test_a_store_that_cannot_be_made_is_an_error_of_ours(publisher: Any, tmp_path: Path) -> None:
    publisher.publish()
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ResourceError, match="cannot write this file"):
        run(publisher, tmp_path / "file" / "store", root=publisher.root)


def test_a_device_loads_neither_torch_nor_flower_nor_onnx() -> None:
    code = (
        "import sys, edge_client.commands\n"
        "found = {'torch', 'flwr', 'onnx', 'opacus', 'server'} & set(sys.modules)\n"
        "sys.exit(f'loaded: {found}' if found else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("what", ["active gone", "active a loop", "model gone"])
def test_an_update_over_a_damaged_version_says_what_was_damaged(
    publisher: Any, store: Path, what: str
) -> None:
    publisher.publish()
    run(publisher, store, root=publisher.root)
    active = store / "models" / "digits" / "active"
    harmed = store / "models" / "digits" / "1" / "model.onnx" if what == "model gone" else active
    harmed.unlink()
    if what == "active a loop":
        harmed.symlink_to(harmed.name)
    assert installed.models(store) == ["digits"]
    publisher.publish(2.0)
    done = run(publisher, store)
    assert done.version == 2
    assert harmed.name in (done.damage or "")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", [".lock", "trust/metadata/timestamp.json", "trust/clock.json"])
def test_a_pipe_in_the_store_is_refused_and_not_waited_for(
    publisher: Any, store: Path, name: str
) -> None:
    publisher.publish()
    run(publisher, store, root=publisher.root)
    (store / name).unlink()
    os.mkfifo(store / name)
    with pytest.raises(DataError, match="another kind of file"):
        run(publisher, store)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("what", ["pipe", "folder", "link"])
def test_what_lies_in_the_place_of_an_unfinished_fetch_is_removed(
    publisher: Any, store: Path, what: str, tmp_path: Path
) -> None:
    publisher.publish()
    run(publisher, store, root=publisher.root)
    publisher.publish(2.0)
    (model,) = (publisher.repository / "targets").rglob("2/*.model.onnx")
    part = store / "incoming" / "digits" / f"{model.name.partition('.')[0]}.part"
    part.parent.mkdir()
    (tmp_path / "other").write_bytes(b"not ours")
    {
        "pipe": lambda: os.mkfifo(part),
        "folder": part.mkdir,
        "link": lambda: part.symlink_to(tmp_path / "other"),
    }[what]()
    assert run(publisher, store).version == 2
    assert (tmp_path / "other").read_bytes() == b"not ours"


def test_no_more_than_one_version_is_left_unfinished(publisher: Any, store: Path) -> None:
    publisher.publish()
    run(publisher, store, root=publisher.root)
    (store / "incoming" / ("a" * 64 + ".part")).write_bytes(b"of a version before")
    for version in (2, 3, 4):  # a server that withholds one file of each version
        publisher.publish(float(version))
        (golden,) = (publisher.repository / "targets").rglob(f"{version}/*.golden.safetensors")
        golden.rename(golden.with_suffix(".withheld"))
        with pytest.raises(DataError, match="lacks this file"):
            run(publisher, store)
        left = [path for path in (store / "incoming").rglob("*") if path.is_file()]
        (model,) = (publisher.repository / "targets").rglob(f"{version}/*.model.onnx")
        whole = {path.name.partition(".")[0] for path in left if path.stat().st_size}
        assert whole == {model.name.partition(".")[0]}
    golden.with_suffix(".withheld").rename(golden)
    assert run(publisher, store).version == 4
    assert list((store / "incoming").iterdir()) == []
