"""Manifests of released models, and the list of epochs, as a device reads them."""

from __future__ import annotations

from functools import cache
from random import Random

from fedcore.artifacts.manifest import FileEntry, Manifest, manifest_bytes, parse_manifest
from fedcore.artifacts.statements import Epochs, moment_of, parse_epochs
from tests.fuzz.mutate import damaged, damaged_json, packed, unpacked
from tests.origin import LINEAGE, NO_PRIVACY, PARITY

_WORDS = ("classification", "regression", "inf", "2026-03-01T12:00:00Z", "float32", "digits")


@cache
def _valid() -> tuple[bytes, bytes]:
    file = FileEntry(path="models/digits/3/model.onnx", sha256="a" * 64, length=1000)
    manifest = Manifest(
        model="digits",
        version=3,
        created="2026-03-01T12:00:00Z",
        kind="classification",
        labels=("a", "b", "c"),
        input_shape=(3, 2),
        input_dtype="float32",
        onnx=file,
        golden=file,
        golden_tolerance=1e-3,
        lineage=LINEAGE,
        privacy=NO_PRIVACY,
        parity=PARITY,
    )
    return manifest_bytes(manifest), Epochs(epochs={"digits": 1, "other": 7}).to_bytes()


def make(rng: Random) -> bytes:
    """A manifest, or now and then a list of epochs."""
    which = int(rng.randrange(6) == 0)
    raw = _valid()[which]
    found = damaged_json(rng, raw, _WORDS) if rng.randrange(8) else damaged(rng, raw)
    return packed([b"em"[1 - which : 2 - which], found])


def read(raw: bytes) -> None:
    """As an update reads what is signed."""
    which, found = unpacked(raw)
    if which == b"e":
        assert parse_epochs(found).of("digits") >= 0
        return
    manifest = parse_manifest(found)
    moment_of(manifest.created)
    parse_manifest(manifest_bytes(manifest))
