"""What a device does with a release that is rightly signed and still not what was asked for.

Each case names the error, and each ends with the version before still answering.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from edge_client.delivery import store as installed
from edge_client.delivery.source import folder_source
from edge_client.delivery.update import update
from edge_client.inference.process import ModelLimits
from fedcore.artifacts.manifest import manifest_bytes, parse_manifest
from fedcore.errors import (
    ConfigError,
    DataError,
    DigestMismatch,
    FedcoreError,
    ReleaseError,
    RollbackRefused,
    SelfTestFailed,
    TrustError,
)
from fedcore.files import sha256_hex
from server.release.draft import Draft
from server.release.publish import publish, rollback
from tests import hostile_models as hostile


def test_an_older_version_under_newer_signatures(world: Any) -> None:
    first = (next((world.repository / "targets").rglob("1/*.manifest.json"))).read_bytes()
    world.publish(2.0)
    assert world.update().version == 2
    world.sign({"models/digits/release.json": first})
    with pytest.raises(RollbackRefused, match="version 1, older than version 2"):
        world.update()
    assert world.answers() == 2.0


def test_a_version_that_changed_after_it_was_published(world: Any) -> None:
    manifest = installed.serving(world.store, "digits").manifest
    other = manifest.model_copy(update={"created": "2030-01-01T00:00:00Z"})
    world.sign({"models/digits/release.json": manifest_bytes(other)})
    world.check_refused(DigestMismatch, "differs from the one installed")


def test_the_manifest_of_another_model(world: Any) -> None:
    other = world.publish(5.0, model="letters")
    world.sign({"models/digits/release.json": manifest_bytes(other)})
    world.check_refused(TrustError, "to model 'letters'")


@pytest.mark.parametrize(
    "path",
    [
        "models/letters/2/model.onnx",
        "models/digits/1/model.onnx",
        "models/digits/2/../../letters/1/model.onnx",
        "../../etc/passwd",
        "/etc/passwd",
        "models/digits/2/golden.safetensors",
        "",
    ],
)
def test_a_manifest_that_points_elsewhere(world: Any, path: str) -> None:
    manifest = world.publish(2.0)
    wrong = manifest.model_copy(
        update={"version": 2, "onnx": manifest.onnx.model_copy(update={"path": path})}
    )
    world.sign({"models/digits/release.json": manifest_bytes(wrong)})
    world.check_refused(TrustError, "lists .* expected")


def test_a_manifest_that_names_what_nobody_signed(world: Any) -> None:
    manifest = world.publish(2.0)
    raw = manifest_bytes(manifest).replace(b"models/digits/2/", b"models/digits/9/")
    newer = manifest_bytes(parse_manifest(raw).model_copy(update={"version": 9}))
    world.sign({"models/digits/release.json": newer})
    world.check_refused(TrustError, "it is not signed")


def test_a_manifest_and_metadata_that_disagree(world: Any) -> None:
    manifest = world.publish(2.0)
    entry = manifest.onnx.model_copy(update={"length": manifest.onnx.length + 1})
    wrong = manifest_bytes(manifest.model_copy(update={"onnx": entry}))
    world.sign({"models/digits/release.json": wrong})
    world.check_refused(DigestMismatch, "the manifest says")


@pytest.mark.parametrize("raw", [b"", b"{}", b"[]", b"{", b"\xff", b'{"format":2}', b"[" * 9999])
def test_garbage_for_a_manifest(world: Any, raw: bytes) -> None:
    world.sign({"models/digits/release.json": raw})
    world.check_refused(TrustError, "manifest")


def test_a_manifest_larger_than_any_is(world: Any) -> None:
    world.sign({"models/digits/release.json": b" " * (2 << 20)})
    world.check_refused(TrustError, "more than the")


def test_files_that_the_online_keys_may_not_sign(world: Any, new_world: Callable[..., Any]) -> None:
    bound = new_world(world.folder / "bound", models=["letters"])
    manifest = bound.publish(5.0, model="letters")
    raw = manifest_bytes(manifest.model_copy(update={"model": "digits"}))
    bound.sign({"models/digits/release.json": raw})
    with pytest.raises(DataError, match="no model of that name"):
        bound.update()
    with pytest.raises(ReleaseError, match="'digits'"):
        bound.publish(5.0)


def test_a_model_that_answers_otherwise_here(world: Any, draft: Callable[..., Draft]) -> None:
    wrong = replace(draft(2.0), golden=draft(3.0).golden)
    publish(wrong, repository=world.repository, keys=world.keys, created=datetime.now(UTC))
    world.check_refused(SelfTestFailed, "more than the 0.001 allowed")
    assert sorted(path.name for path in (world.store / "models" / "digits").iterdir()) == [
        "1",
        "active",
        "held",
    ]
    world.publish(4.0)
    assert world.update().version == 3
    assert world.answers() == 4.0


@pytest.mark.parametrize("onnx", [b"garbage", b"\x08\x07"])
def test_a_model_that_is_none(world: Any, onnx: bytes, draft: Callable[..., Draft]) -> None:
    broken = replace(draft(2.0), onnx=onnx)
    publish(broken, repository=world.repository, keys=world.keys, created=datetime.now(UTC))
    with pytest.raises(FedcoreError, match="cannot run it"):
        world.update()
    assert world.answers() == 1.0


def test_a_golden_file_that_is_none(world: Any) -> None:
    manifest = world.publish(2.0)
    path = manifest.golden.path
    golden = manifest.golden.model_copy(update={"sha256": sha256_hex(b"garbage"), "length": 7})
    raw = manifest_bytes(manifest.model_copy(update={"golden": golden}))
    world.sign({path: b"garbage", "models/digits/release.json": raw})
    world.check_refused(TrustError, "golden")


@pytest.mark.parametrize("name", ["../digits", "digits/../../x", "/etc", "digits\0", "a" * 300])
def test_a_name_that_leads_elsewhere(world: Any, name: str) -> None:
    source = folder_source(world.repository)
    before = sorted(world.folder.rglob("*"))
    with pytest.raises(ConfigError, match=r"^model "):
        update(source, store=world.store, model=name, root=None, threads=1)
    with pytest.raises(ReleaseError, match="model name"):
        world.publish(2.0, model=name)
    assert sorted(world.folder.rglob("*")) == before
    assert world.answers() == 1.0


def test_an_intended_rollback_is_taken(world: Any) -> None:
    world.publish(2.0)
    assert world.update().version == 2
    rollback("digits", 1, repository=world.repository, keys=world.keys, created=datetime.now(UTC))
    done = world.update()
    assert (done.version, done.previous) == (3, 2)
    assert world.answers() == 1.0


@pytest.mark.parametrize(
    ("onnx", "match"),
    [
        (hostile.endless_loop(), "no answer within 1 s, this device's time limit"),
        (hostile.memory_bomb(10**12), "MiB, this device's memory limit"),
        (hostile.reads_a_file("/etc/hostname", 4), "cannot run it"),
    ],
)
def test_a_model_that_does_harm_where_it_is_run(
    world: Any, draft: Callable[..., Draft], onnx: bytes, match: str
) -> None:
    harm = replace(draft(2.0), onnx=onnx)
    publish(harm, repository=world.repository, keys=world.keys, created=datetime.now(UTC))
    with pytest.raises(SelfTestFailed, match=match):
        update(
            folder_source(world.repository),
            store=world.store,
            model="digits",
            root=None,
            threads=1,
            limits=ModelLimits(seconds=1),
        )
    assert world.answers() == 1.0
    world.publish(4.0)
    assert world.update().version == 3
    assert world.answers() == 4.0
