"""Publication of a run's model once, in however many processes the run ends."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedcore.artifacts.manifest import Digest, Lineage, Manifest
from fedcore.files import read_if_exists, sha256_hex, write_atomic
from server.release.draft import Draft
from server.release.publish import history, publish

PUBLISHED = "publish.json"
"""Name of the note in the folder of a run."""
_MAX_BYTES = 1 << 16


class _PublishNote(BaseModel):
    """Note on a publication, written before anything is published."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    made_from: Digest
    """Digest of the model's file, and of the devices that it is for."""
    version: Annotated[int, Field(ge=1)]
    """Lowest version that the run's release can have."""


def publish_once(
    note: Path, draft: Draft, *, repository: Path, keys: Path, created: datetime
) -> Manifest:
    """Publishes a run's model; returns the manifest of an earlier attempt if it got that far.

    The next version is noted before anything is published. A published model of at least that
    version, with the same bytes and from the same training, is therefore the run's own.

    Args:
        note: The file of the note, which is kept until the run is complete.
        draft: The release to publish.
        repository: The folder of the repository.
        keys: The folder of keys.
        created: Time of publication.

    Raises:
        FedcoreError: as `server.release.publish.publish` does.
    """
    onnx = sha256_hex(draft.onnx)
    made_from = sha256_hex(f"{onnx} {draft.canary}".encode())

    published = [one for one in history(repository, keys) if one.model == draft.model]
    noted = _noted(note)
    if noted is None or noted.made_from != made_from:
        version = max((one.version for one in published), default=0) + 1
        written = _PublishNote(made_from=made_from, version=version)
        write_atomic(note, written.model_dump_json(indent=1).encode() + b"\n")
    else:
        for one in published:
            ours = one.onnx.sha256 == onnx and _trained(one.lineage) == _trained(draft.lineage)
            if ours and one.version >= noted.version:
                return one
    return publish(draft, repository=repository, keys=keys, created=created)


def _trained(lineage: Lineage) -> Lineage:
    """Returns a lineage without what another setting of the release changes."""
    return lineage.model_copy(update={"config_sha256": ""})


def _noted(path: Path) -> _PublishNote | None:
    raw = read_if_exists(path, max_bytes=_MAX_BYTES, what="a note of a publication")
    try:
        return None if raw is None else _PublishNote.model_validate_json(raw)
    except ValidationError:
        return None
