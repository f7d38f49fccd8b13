"""Whoever has an online key signs any name: the owner's verbs bear it, and can remove it."""

from __future__ import annotations

from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import pytest
from tuf.api.metadata import (  # type: ignore[attr-defined]  # re-exported unsaid
    Snapshot,
    TargetFile,
    Targets,
)

from fedcore.errors import ReleaseError
from server.release.publish import history, publish, rollback, versions
from server.release.registry import repository as registry
from server.release.registry.keys import ONLINE, read_keys, read_trusted_root
from server.release.registry.rotation import rotate
from tests.adversarial.conftest import World, initialised, matmul_draft

LARGE = 10**15
NAMES = {
    "one word": ["x"],
    "empty": [""],
    "no version": ["models/digits"],
    "many digits": ["models/digits/" + "9" * 5000 + "/model.onnx"],
    "another alphabet's digit": ["models/digits/\u0663/manifest.json"],
    "leading out": ["models/../../../etc/1/manifest.json"],
    "escape": ["models/\x1b[2J/1/manifest.json"],
    "largest version": [
        f"models/digits/{LARGE}/{name}"
        for name in ("manifest.json", "model.onnx", "golden.safetensors")
    ],
    "beyond the largest": [f"models/digits/{LARGE + 5}/manifest.json"],
}


def plant(world: World, names: list[str]) -> None:
    now = datetime.now(UTC)
    with registry.locked(world.repository):
        state = registry.read_state(world.repository, read_trusted_root(world.keys))
        expires = now + registry.RELEASES_EXPIRY
        files = {name: TargetFile.from_data(name, b"x", ["sha256"]) for name in names}
        planted = Targets(
            version=state.releases.version + 1,
            expires=expires,
            targets={**state.releases.targets, **files},
        )
        registry.replace(
            world.repository,
            read_keys(world.keys, ONLINE),
            {"releases": planted},
            {},
            snapshot=Snapshot(
                version=state.snapshot.version + 1,
                expires=expires,
                meta=dict(state.snapshot.meta),
            ),
            timestamp_version=state.timestamp.version + 1,
            now=now,
        )


@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
def test_a_planted_name_breaks_no_verb_and_is_gone_after_going_back(
    tmp_path: Path, names: list[str]
) -> None:
    world = initialised(tmp_path)
    for scale in (1.0, 2.0):
        world.publish(scale)
    plant(world, names)
    where, now = {"repository": world.repository, "keys": world.keys}, datetime.now(UTC)
    with suppress(ReleaseError):
        history(world.repository, world.keys)
    with suppress(ReleaseError):
        rollback("digits", 1, created=now, **where)
    with suppress(ReleaseError):
        publish(matmul_draft(3.0), created=now, **where)
    rotate(world.repository, world.keys, roles=ONLINE, last_good={"digits": 2}, now=now)
    state = registry.read_state(world.repository, read_trusted_root(world.keys))
    assert versions(state, "digits") == [1, 2]
    assert not set(names) & set(state.releases.targets)
    assert publish(matmul_draft(3.0), created=datetime.now(UTC), **where).version == 3
