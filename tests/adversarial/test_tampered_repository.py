"""What a device does with a repository whose files were damaged or tampered with.

Each case names the error, and each ends with the version before still answering.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedcore.errors import DataError, DigestMismatch, FedcoreError, SignatureInvalid, TrustError


@pytest.mark.parametrize("end", ["model.onnx", "golden.safetensors"])
@pytest.mark.parametrize("place", [0, 100, -1])
def test_one_byte_changed_in_the_repository(
    world: Any, end: str, place: int, flip: Callable[[Path, int], None]
) -> None:
    world.publish(2.0)
    flip(world.target(end), place)
    world.check_refused(DigestMismatch, "expected .* bytes, sha256")
    flip(world.target(end), place)
    assert world.update().version == 2
    assert world.answers() == 2.0


def test_one_byte_changed_in_the_manifest(world: Any, flip: Callable[[Path, int], None]) -> None:
    world.publish(2.0)
    for path in (world.repository / "targets").rglob("*.release.json"):
        flip(path, 40)
    world.check_refused(DigestMismatch, "differs from what was signed")


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("timestamp.json", SignatureInvalid),
        ("3.snapshot.json", DigestMismatch),
        ("3.releases.json", DigestMismatch),
    ],
)
def test_one_digit_changed_in_the_metadata(
    world: Any, name: str, error: type[FedcoreError]
) -> None:
    world.publish(2.0)
    path = world.repository / "metadata" / name
    path.write_bytes(path.read_bytes().replace(b'"expires":"20', b'"expires":"30'))
    world.check_refused(error, "Nothing was installed")


@pytest.mark.parametrize(
    "garbage", [b"", b"{", b"[]", b"null", b"\x00\xff", b'{"signed":{}}', b"[" * 9999]
)
def test_garbage_for_metadata(world: Any, garbage: bytes) -> None:
    world.publish(2.0)
    (world.repository / "metadata" / "timestamp.json").write_bytes(garbage)
    world.check_refused(TrustError, "cannot parse the repository's metadata")


def test_metadata_without_end(world: Any) -> None:
    with (world.repository / "metadata" / "timestamp.json").open("ab") as stream:
        stream.truncate(1 << 40)  # a terabyte that takes no room
    world.check_refused(DigestMismatch, "maximum allowed length")


@pytest.mark.parametrize("change", ["longer", "shorter", "gone"])
def test_a_file_of_another_length(world: Any, change: str) -> None:
    world.publish(2.0)
    path = world.target("model.onnx")
    raw = path.read_bytes()
    if change == "longer":
        path.write_bytes(raw + b"\0" * 5_000_000)
        world.check_refused(DigestMismatch, "got more bytes")
        assert list((world.store / "incoming").rglob("*.part")) == []
    elif change == "shorter":
        path.write_bytes(raw[:-10])
        world.check_refused(DigestMismatch, f"got only the first {len(raw) - 10}")
    else:
        path.unlink()
        world.check_refused(DataError, "lacks this file")
    path.write_bytes(raw)
    assert world.update().version == 2


def test_metadata_that_is_gone(world: Any) -> None:
    world.publish(2.0)
    (world.repository / "metadata" / "3.snapshot.json").unlink()
    world.check_refused(DataError, "is incomplete")
    (world.repository / "metadata" / "timestamp.json").unlink()
    world.check_refused(DataError, "is incomplete")


@pytest.mark.parametrize("name", ["metadata/timestamp.json", "targets"])
def test_a_link_that_leads_out_of_the_repository(world: Any, name: str) -> None:
    world.publish(2.0)
    path, outside = world.repository / name, world.folder / "outside"
    path.rename(outside)
    path.symlink_to(outside)  # the bytes are right, and still not the repository's
    world.check_refused(TrustError, "points outside the repository")


@pytest.mark.timeout(20)
def test_a_pipe_in_place_of_a_file(world: Any) -> None:
    world.publish(2.0)
    path = world.target("model.onnx")
    path.unlink()
    os.mkfifo(path)
    world.check_refused(TrustError, "regular file")


@pytest.mark.timeout(60)
def test_a_pipe_in_place_of_the_lock_is_not_waited_for(world: Any) -> None:
    lock = world.repository / ".lock"
    lock.unlink(missing_ok=True)
    os.mkfifo(lock)
    with pytest.raises(DataError, match=r"cannot read the lock: .*remove it"):
        world.publish(2.0)
    lock.unlink()
    world.publish(2.0)
    assert world.update().version == 2
