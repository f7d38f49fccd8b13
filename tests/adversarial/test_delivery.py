"""What a device is offered by a repository that is hostile, damaged or old, and by a failing disk.

Each case names the error, and each ends with the version before still answering.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from edge_client import store as installed
from edge_client.runtime import load
from edge_client.source import Source, folder_source
from edge_client.update import Update, update
from fedcore.artifacts.golden import golden_bytes
from fedcore.artifacts.manifest import (
    Lineage,
    Manifest,
    Parity,
    PrivacyStatement,
    manifest_bytes,
    parse_manifest,
)
from fedcore.errors import (
    ConfigError,
    DataError,
    DigestMismatch,
    DiskFull,
    FedcoreError,
    ReleaseError,
    RollbackRefused,
    SelfTestFailed,
    SignatureInvalid,
    TrustError,
)
from fedcore.files import sha256_hex, write_atomic
from server.registry import repository as registry
from server.registry.keys import ONLINE, read_keys, read_trusted_root
from server.release import Draft, initialise, publish, refresh, rollback

INPUTS = np.eye(3, dtype=np.float32)


def weight(factor: float) -> Any:
    return (factor * np.arange(1, 7)).reshape(3, 2).astype(np.float32)


def draft(factor: float, *, model: str = "digits", padding: int = 0) -> Draft:
    """The model ``y = x @ (factor * W)``, with ``padding`` bytes that compute nothing."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "matmul",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 2])],
        [numpy_helper.from_array(weight(factor), "w")],
        doc_string="." * padding,
    )
    onnx = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return Draft(
        model=model,
        kind="regression",
        labels=(),
        input_shape=(3,),
        input_dtype="float32",
        golden_tolerance=1e-3,
        lineage=Lineage(
            run="demo",
            round=3,
            parent_sha256="a" * 64,
            finetuned=True,
            candidate="fp32",
            config_sha256="b" * 64,
            seed=1,
            calibration="none",
        ),
        privacy=PrivacyStatement(unit="none", epsilon=None, target_delta=None, noise="none"),
        parity=Parity(max_abs_error=0, agreement=1, metric="rmse", metric_before=1, metric_after=1),
        onnx=onnx.SerializeToString(),
        golden=golden_bytes(INPUTS, INPUTS @ weight(factor)),
    )


@dataclass(frozen=True)
class World:
    """A publisher and a device that has version 1, whose weights have factor 1."""

    folder: Path

    @property
    def repository(self) -> Path:
        return self.folder / "repository"

    @property
    def keys(self) -> Path:
        return self.folder / "keys"

    @property
    def store(self) -> Path:
        return self.folder / "store"

    def publish(self, factor: float, *, created: datetime | None = None, **more: Any) -> Manifest:
        return publish(
            draft(factor, **more),
            repository=self.repository,
            keys=self.keys,
            created=created or datetime.now(UTC),
        )

    def sign(self, files: dict[str, bytes]) -> None:
        """Publishes any files at all, as whoever holds the online keys could."""
        with registry.locked(self.repository):
            state = registry.read_state(self.repository, read_trusted_root(self.keys))
            keys = read_keys(self.keys, ONLINE)
            registry.add(self.repository, state, keys, files, now=datetime.now(UTC))

    def update(self, source: Source | None = None) -> Update:
        return update(
            source or folder_source(self.repository),
            store=self.store,
            model="digits",
            root=(self.keys / "root.json").read_bytes(),
            threads=1,
        )

    def answers(self) -> float:
        """The factor of the model that serves."""
        version = installed.serving(self.store, "digits")
        outputs = load(version.manifest, version.onnx, threads=1).predict(INPUTS)
        factor = float(outputs[0, 0])
        np.testing.assert_allclose(outputs, weight(factor))
        return factor

    def target(self, end: str) -> Path:
        (path,) = (self.repository / "targets").rglob(f"2/*.{end}")
        return path


@pytest.fixture(scope="module")
def first_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = World(tmp_path_factory.mktemp("first"))
    initialise(world.repository, world.keys, now=datetime.now(UTC))
    world.publish(1.0)
    assert world.update().version == 1
    assert world.answers() == 1.0
    return world


@pytest.fixture
def world(first_world: World, tmp_path: Path) -> World:
    """A copy: making one anew costs some sixty fsyncs."""
    shutil.copytree(first_world.folder, tmp_path, dirs_exist_ok=True, symlinks=True)
    return World(tmp_path)


def refused(world: World, error: type[FedcoreError], match: str) -> None:
    with pytest.raises(error, match=match) as caught:
        world.update()
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)
    assert world.answers() == 1.0


def flip(path: Path, place: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    path.write_bytes(raw)


# The repository is damaged or was tampered with


@pytest.mark.parametrize("end", ["model.onnx", "golden.safetensors"])
@pytest.mark.parametrize("place", [0, 100, -1])
def test_one_byte_changed_in_the_repository(world: World, end: str, place: int) -> None:
    world.publish(2.0)
    flip(world.target(end), place)
    refused(world, DigestMismatch, "expected .* bytes, sha256")
    flip(world.target(end), place)
    assert world.update().version == 2
    assert world.answers() == 2.0


def test_one_byte_changed_in_the_manifest(world: World) -> None:
    world.publish(2.0)
    for path in (world.repository / "targets").rglob("*.release.json"):
        flip(path, 40)
    refused(world, DigestMismatch, "differs from what was signed")


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("timestamp.json", SignatureInvalid),
        ("3.snapshot.json", DigestMismatch),
        ("3.releases.json", DigestMismatch),
    ],
)
def test_one_digit_changed_in_the_metadata(
    world: World, name: str, error: type[FedcoreError]
) -> None:
    world.publish(2.0)
    path = world.repository / "metadata" / name
    path.write_bytes(path.read_bytes().replace(b'"expires":"20', b'"expires":"30'))
    refused(world, error, "Nothing was installed")


@pytest.mark.parametrize(
    "garbage", [b"", b"{", b"[]", b"null", b"\x00\xff", b'{"signed":{}}', b"[" * 9999]
)
def test_garbage_for_metadata(world: World, garbage: bytes) -> None:
    world.publish(2.0)
    (world.repository / "metadata" / "timestamp.json").write_bytes(garbage)
    refused(world, TrustError, "cannot be read as such")


def test_metadata_without_end(world: World) -> None:
    with (world.repository / "metadata" / "timestamp.json").open("ab") as stream:
        stream.truncate(1 << 40)  # a terabyte that takes no room
    refused(world, DigestMismatch, "maximum allowed length")


@pytest.mark.parametrize("change", ["longer", "shorter", "gone"])
def test_a_file_of_another_length(world: World, change: str) -> None:
    world.publish(2.0)
    path = world.target("model.onnx")
    raw = path.read_bytes()
    if change == "longer":
        path.write_bytes(raw + b"\0" * 5_000_000)
        refused(world, DigestMismatch, "got more bytes")
        assert list((world.store / "incoming").glob("*.part")) == []
    elif change == "shorter":
        path.write_bytes(raw[:-10])
        refused(world, DigestMismatch, f"has the first {len(raw) - 10}")
    else:
        path.unlink()
        refused(world, DataError, "lacks this file")
    path.write_bytes(raw)
    assert world.update().version == 2


def test_metadata_that_is_gone(world: World) -> None:
    world.publish(2.0)
    (world.repository / "metadata" / "3.snapshot.json").unlink()
    refused(world, DataError, "not whole")
    (world.repository / "metadata" / "timestamp.json").unlink()
    refused(world, DataError, "not whole")


@pytest.mark.parametrize("name", ["metadata/timestamp.json", "targets"])
def test_a_link_that_leads_out_of_the_repository(world: World, name: str) -> None:
    world.publish(2.0)
    path, outside = world.repository / name, world.folder / "outside"
    path.rename(outside)
    path.symlink_to(outside)  # the bytes are right, and still not the repository's
    refused(world, TrustError, "leads out of the repository")


@pytest.mark.timeout(20)
def test_a_pipe_in_place_of_a_file(world: World) -> None:
    world.publish(2.0)
    path = world.target("model.onnx")
    path.unlink()
    os.mkfifo(path)
    refused(world, TrustError, "regular file")


# The repository is someone else's, or an old one


def test_a_repository_signed_by_someone_else(world: World) -> None:
    other = World(world.folder / "other")
    initialise(other.repository, other.keys, now=datetime.now(UTC))
    for factor in (5.0, 6.0, 7.0):
        other.publish(factor)
    shutil.rmtree(world.repository)
    other.repository.rename(world.repository)
    refused(world, SignatureInvalid, "not signed by the keys that this device trusts")
    (world.keys / "root.json").write_bytes((other.keys / "root.json").read_bytes())
    refused(world, TrustError, "not the one that this device has trusted")


def test_a_new_root_that_the_old_one_does_not_vouch_for(world: World) -> None:
    other = World(world.folder / "other")
    initialise(other.repository, other.keys, now=datetime.now(UTC))
    other.publish(5.0)
    theirs = read_keys(other.keys, ("root", "targets", *ONLINE))
    state = registry.read_state(other.repository, read_trusted_root(other.keys))
    root = state.root
    root.version = 2
    raw = registry.sign(root, theirs, "root")
    (world.repository / "metadata" / "2.root.json").write_bytes(raw)
    refused(world, SignatureInvalid, "not signed by the keys")


def test_signatures_that_have_run_out(tmp_path: Path) -> None:
    world = World(tmp_path)
    then = datetime.now(UTC) - timedelta(days=8)
    initialise(world.repository, world.keys, now=then)
    world.publish(1.0, created=then)
    with pytest.raises(SignatureInvalid, match=r"have run out .*timestamp"):
        world.update()
    world.publish(2.0)
    assert world.update().version == 2
    world.publish(3.0, created=then)
    with pytest.raises(SignatureInvalid, match="have run out"):
        world.update()
    assert world.answers() == 2.0


@pytest.mark.parametrize("wiped", ["", "models"])
def test_an_older_repository(world: World, wiped: str) -> None:
    shutil.copytree(world.repository, world.folder / "old")
    world.publish(2.0)
    assert world.update().version == 2
    if wiped:
        shutil.rmtree(world.store / wiped)
    with pytest.raises(RollbackRefused, match="older than what this device has seen"):
        world.update(folder_source(world.folder / "old"))
    if wiped:
        assert world.update().version == 2
    assert world.answers() == 2.0


def test_an_older_snapshot_under_the_newer_name(world: World) -> None:
    world.publish(2.0)
    metadata = world.repository / "metadata"
    shutil.copy(metadata / "2.snapshot.json", metadata / "3.snapshot.json")
    refused(world, DigestMismatch, "differs from what was signed")


def test_older_metadata_signed_anew_by_a_thief_of_the_timestamp_key(world: World) -> None:
    world.publish(2.0)
    assert world.update().version == 2
    root = read_trusted_root(world.keys)
    timestamp = registry.read_state(world.repository, root).timestamp
    timestamp.version += 1
    timestamp.snapshot_meta.version = 2
    raw = (world.repository / "metadata" / "2.snapshot.json").read_bytes()
    timestamp.snapshot_meta = type(timestamp.snapshot_meta).from_data(2, raw, ["sha256"])
    stolen = registry.sign(timestamp, read_keys(world.keys, ONLINE), "timestamp")
    (world.repository / "metadata" / "timestamp.json").write_bytes(stolen)
    with pytest.raises(RollbackRefused, match="older than what this device has seen"):
        world.update()
    assert world.answers() == 2.0


# Signed, and still not what was asked for


def test_an_older_version_under_newer_signatures(world: World) -> None:
    first = (next((world.repository / "targets").rglob("1/*.manifest.json"))).read_bytes()
    world.publish(2.0)
    assert world.update().version == 2
    world.sign({"models/digits/release.json": first})
    with pytest.raises(RollbackRefused, match="version 1, older than version 2"):
        world.update()
    assert world.answers() == 2.0


def test_a_version_that_changed_after_it_was_published(world: World) -> None:
    manifest = installed.serving(world.store, "digits").manifest
    other = manifest.model_copy(update={"created": "2030-01-01T00:00:00Z"})
    world.sign({"models/digits/release.json": manifest_bytes(other)})
    refused(world, DigestMismatch, "differs from the one installed")


def test_the_manifest_of_another_model(world: World) -> None:
    other = world.publish(5.0, model="letters")
    world.sign({"models/digits/release.json": manifest_bytes(other)})
    refused(world, TrustError, "of model 'letters'")


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
def test_a_manifest_that_points_elsewhere(world: World, path: str) -> None:
    manifest = world.publish(2.0)
    wrong = manifest.model_copy(
        update={"version": 2, "onnx": manifest.onnx.model_copy(update={"path": path})}
    )
    world.sign({"models/digits/release.json": manifest_bytes(wrong)})
    refused(world, TrustError, "was expected")


def test_a_manifest_that_names_what_nobody_signed(world: World) -> None:
    manifest = world.publish(2.0)
    raw = manifest_bytes(manifest).replace(b"models/digits/2/", b"models/digits/9/")
    newer = manifest_bytes(parse_manifest(raw).model_copy(update={"version": 9}))
    world.sign({"models/digits/release.json": newer})
    refused(world, TrustError, "nobody signed it")


def test_a_manifest_and_metadata_that_disagree(world: World) -> None:
    manifest = world.publish(2.0)
    entry = manifest.onnx.model_copy(update={"length": manifest.onnx.length + 1})
    wrong = manifest_bytes(manifest.model_copy(update={"onnx": entry}))
    world.sign({"models/digits/release.json": wrong})
    refused(world, DigestMismatch, "the manifest says")


@pytest.mark.parametrize("raw", [b"", b"{}", b"[]", b"{", b"\xff", b'{"format":2}', b"[" * 9999])
def test_garbage_for_a_manifest(world: World, raw: bytes) -> None:
    world.sign({"models/digits/release.json": raw})
    refused(world, TrustError, "manifest")


def test_a_manifest_larger_than_any_is(world: World) -> None:
    world.sign({"models/digits/release.json": b" " * (2 << 20)})
    refused(world, TrustError, "more than the")


def test_files_that_the_online_keys_may_not_sign(world: World) -> None:
    bound = World(world.folder / "bound")
    initialise(bound.repository, bound.keys, models=["letters"], now=datetime.now(UTC))
    manifest = bound.publish(5.0, model="letters")
    raw = manifest_bytes(manifest.model_copy(update={"model": "digits"}))
    bound.sign({"models/digits/release.json": raw})
    with pytest.raises(DataError, match="no model of that name"):
        bound.update()
    with pytest.raises(ReleaseError, match="'digits'"):
        bound.publish(5.0)


def test_a_model_that_answers_otherwise_here(world: World) -> None:
    wrong = replace(draft(2.0), golden=draft(3.0).golden)
    publish(wrong, repository=world.repository, keys=world.keys, created=datetime.now(UTC))
    refused(world, SelfTestFailed, "more than the 0.001 allowed")
    assert sorted(path.name for path in (world.store / "models" / "digits").iterdir()) == [
        "1",
        "active",
    ]
    world.publish(4.0)
    assert world.update().version == 3
    assert world.answers() == 4.0


@pytest.mark.parametrize("onnx", [b"garbage", b"\x08\x07"])
def test_a_model_that_is_none(world: World, onnx: bytes) -> None:
    broken = replace(draft(2.0), onnx=onnx)
    publish(broken, repository=world.repository, keys=world.keys, created=datetime.now(UTC))
    with pytest.raises(FedcoreError, match="cannot run it"):
        world.update()
    assert world.answers() == 1.0


def test_a_golden_file_that_is_none(world: World) -> None:
    manifest = world.publish(2.0)
    path = manifest.golden.path
    golden = manifest.golden.model_copy(update={"sha256": sha256_hex(b"garbage"), "length": 7})
    raw = manifest_bytes(manifest.model_copy(update={"golden": golden}))
    world.sign({path: b"garbage", "models/digits/release.json": raw})
    refused(world, TrustError, "golden")


@pytest.mark.parametrize("name", ["../digits", "digits/../../x", "/etc", "digits\0", "a" * 300])
def test_a_name_that_leads_elsewhere(world: World, name: str) -> None:
    source = folder_source(world.repository)
    before = sorted(world.folder.rglob("*"))
    with pytest.raises(ConfigError, match="--model"):
        update(source, store=world.store, model=name, root=None, threads=1)
    with pytest.raises(ReleaseError, match="model name"):
        world.publish(2.0, model=name)
    assert sorted(world.folder.rglob("*")) == before
    assert world.answers() == 1.0


def test_an_intended_rollback_is_taken(world: World) -> None:
    world.publish(2.0)
    assert world.update().version == 2
    rollback("digits", 1, repository=world.repository, keys=world.keys, created=datetime.now(UTC))
    done = world.update()
    assert (done.version, done.previous) == (3, 2)
    assert world.answers() == 1.0


@pytest.mark.parametrize("offline", [False, True])
def test_signatures_that_are_renewed_in_time_are_followed(world: World, offline: bool) -> None:
    refresh(world.repository, world.keys, now=datetime.now(UTC), offline=offline)
    assert not world.update().changed
    world.publish(2.0)
    assert world.update().version == 2
    assert world.answers() == 2.0


# The device is interrupted, or its disk fails


@pytest.mark.parametrize("name", ["model.onnx", "golden.safetensors", "manifest.json"])
def test_one_byte_changed_in_the_store(world: World, name: str) -> None:
    world.publish(2.0)
    world.update()
    flip(world.store / "models" / "digits" / "2" / name, 50)
    with pytest.raises(DigestMismatch, match="has changed since it was installed"):
        installed.read(world.store, "digits", "active")
    assert world.answers() == 1.0  # the version before
    assert world.update().changed
    assert world.answers() == 2.0


@pytest.mark.parametrize("name", ["timestamp.json", "snapshot.json", "releases.json"])
def test_trusted_metadata_that_was_damaged_does_not_bring_back_an_old_version(
    world: World, name: str
) -> None:
    shutil.copytree(world.repository, world.folder / "old")
    world.publish(2.0)
    world.update()
    (world.store / "trust" / "metadata" / name).write_bytes(b"")
    with pytest.raises(RollbackRefused):
        world.update(folder_source(world.folder / "old"))
    assert world.answers() == 2.0


def test_a_fetch_that_is_killed_between_chunks_goes_on(world: World) -> None:
    world.publish(2.0, padding=5_000_000)
    length, whole = world.target("model.onnx").stat().st_size, folder_source(world.repository)

    def killed(name: str, offset: int) -> Iterator[bytes]:
        for number, chunk in enumerate(whole(name, offset)):
            if number == 2:
                raise KeyboardInterrupt
            yield chunk

    with pytest.raises(KeyboardInterrupt):
        world.update(killed)
    assert world.answers() == 1.0
    asked: list[tuple[str, int]] = []

    def noting(name: str, offset: int) -> Iterator[bytes]:
        asked.append((name, offset))
        return whole(name, offset)

    assert world.update(noting).version == 2
    assert world.answers() == 2.0
    (offset,) = [offset for name, offset in asked if name.endswith("model.onnx")]
    assert 0 < offset < length


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def in_child(work: Callable[[], int]) -> int:
    """Runs ``work`` in a process of its own, which may die; returns its exit status."""
    child = os.fork()
    if child == 0:
        status = 99
        try:
            status = work()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def dying(work: Callable[[], object], step: int) -> Callable[[], int]:
    """``work`` killed before its ``step``-th rename; 0 when it has ended before."""

    def run() -> int:
        left = step

        def rename(path: Path, target: Path, *, really: Callable[..., Path]) -> Path:
            nonlocal left
            if left == 0:
                os._exit(9)
            left -= 1
            return really(path, target)

        for name in ("rename", "replace"):
            really = getattr(Path, name)
            setattr(Path, name, lambda path, to, really=really: rename(path, to, really=really))
        work()
        return 0

    return run


def test_a_device_that_is_killed_at_any_step_answers_and_recovers(world: World) -> None:
    world.publish(2.0)
    shutil.copytree(world.store, world.folder / "saved")
    for step in range(100):
        status = in_child(dying(world.update, step))
        factor = world.answers()
        assert factor in (1.0, 2.0)
        assert world.update().version == 2
        assert world.answers() == 2.0
        folder = world.store / "models" / "digits"
        if status == 0:
            assert step > 4  # pinning apart, it takes so many renames
            break
        assert status == 9
        assert {path.name for path in folder.iterdir()} >= {"1", "2", "active", "previous"}
        shutil.rmtree(world.store)
        shutil.copytree(world.folder / "saved", world.store)
    else:
        raise AssertionError("the update never ended")


def test_a_publisher_that_is_killed_at_any_step_leaves_a_release_in_force(world: World) -> None:
    shutil.copytree(world.repository, world.folder / "saved")
    for step in range(100):
        status = in_child(dying(lambda: world.publish(2.0), step))
        done = world.update()
        assert world.answers() == done.version
        if status == 0:
            assert done.version == 2
            assert step == 7  # four files and three kinds of metadata
            break
        assert (status, done.version) == (9, 1)
    else:
        raise AssertionError("the publication never ended")
    assert world.publish(3.0).version == 3  # what was left lying does no harm
    assert world.update().version == 3


def limited(work: Callable[[], object], most_bytes: int) -> Callable[[], int]:
    """``work`` on a disk that takes no file above a size; 0 when it says `DiskFull`."""

    def run() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
        try:
            work()
        except DiskFull as error:
            return 0 if "no room" in str(error) else 1
        return 2

    return run  # Python ignores SIGXFSZ, so that the write fails with EFBIG


def test_a_full_disk_on_the_device(world: World) -> None:
    world.publish(2.0, padding=300_000)
    assert in_child(limited(world.update, 100_000)) == 0
    assert world.answers() == 1.0
    assert list((world.store / "incoming").iterdir()) == []
    assert in_child(limited(world.update, 100)) == 0  # not even metadata
    assert world.answers() == 1.0
    assert world.update().version == 2
    assert world.answers() == 2.0


def test_a_full_disk_at_the_publisher(world: World) -> None:
    before = files(world.repository)
    assert in_child(limited(lambda: world.publish(2.0, padding=300_000), 100_000)) == 0
    assert files(world.repository) == before
    assert not world.update().changed
    assert world.publish(2.0).version == 2


def test_a_publication_that_fails_before_the_timestamp(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    really = write_atomic

    def failing(path: Path, data: bytes) -> None:
        if path.name == "timestamp.json":
            raise OSError(5, "Input/output error")
        really(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(registry, "write_atomic", failing)
        with pytest.raises(OSError, match="Input/output"):
            world.publish(2.0)
    assert not world.update().changed
    assert world.answers() == 1.0
    assert world.publish(3.0).version == 2
    assert world.update().version == 2
    assert world.answers() == 3.0


def test_the_store_holds_plain_files_only(world: World) -> None:
    for path in (world.store / "models").rglob("*"):
        assert path.suffix in ("", ".json", ".onnx", ".safetensors")
        assert not path.is_symlink()
    active = json.loads((world.store / "models" / "digits" / "active").read_text())
    assert set(active) == {"version", "manifest_sha256"}
