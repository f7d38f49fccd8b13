"""Version floor: the newest versions that a device has verified and installed, on disk for good.

python-tuf's cache of metadata and the installed models may be wiped, to free room or to repair a
device. ``trust/versions.json`` outlives both, so that what is older stays refused. It is written
durably before the state that it protects comes into force.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from edge_client.delivery.state_file import read_state
from fedcore.config.run import Name
from fedcore.errors import RollbackRefused
from fedcore.files import write_atomic

_MAX_BYTES = 1 << 20
_MAX_MODELS = 4096
_Count = Annotated[int, Field(ge=0, le=2**63)]


class VersionFloor(BaseModel):
    """The least versions that a device accepts: the content of ``versions.json``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    metadata: Annotated[dict[str, _Count], Field(max_length=16)] = {}
    """Version by role of the repository; the keys that signed them are still trusted."""
    models: Annotated[dict[Name, tuple[_Count, _Count]], Field(max_length=_MAX_MODELS)] = {}
    """Epoch and version by model, as installed."""

    def check_metadata(self, versions: Mapping[str, int]) -> None:
        """Checks that no role's metadata is older than before.

        Raises:
            RollbackRefused: one is.
        """
        for role, version in versions.items():
            if version < self.metadata.get(role, 0):
                raise RollbackRefused(
                    f"{role}: the repository offers version {version} of its signed metadata, but "
                    f"this device has seen version {self.metadata[role]}. Nothing was installed; "
                    "the previous version keeps serving. Fetch from the current repository. If a "
                    "stolen key signed versions that are too high, the publisher must run "
                    "`fedcore release rotate`."
                )

    def with_metadata(self, versions: Mapping[str, int]) -> VersionFloor:
        """Returns the floor after metadata of these versions has been verified."""
        return self.model_copy(update={"metadata": dict(versions)})

    def with_model(self, model: str, epoch: int, version: int) -> VersionFloor:
        """Returns the floor before a version of a model comes into force."""
        kept = max((epoch, version), self.models.get(model, (0, 0)))
        return self.model_copy(update={"models": {**self.models, model: kept}})


def read_versions(trust: Path) -> VersionFloor:
    """Reads the version floor from the folder of the trusted state; empty before the first update.

    Raises:
        DataError: the file is damaged.
    """
    found = read_state(
        _path(trust),
        VersionFloor,
        max_bytes=_MAX_BYTES,
        what="the versions seen",
        remedy="Make sure that the repository is the current one, then remove the file and run "
        "again.",
    )
    return found or VersionFloor()


def write_versions(trust: Path, floor: VersionFloor) -> None:
    """Writes the version floor durably to the folder of the trusted state.

    Raises:
        DiskFull: there was no room.
    """
    write_atomic(_path(trust), floor.model_dump_json().encode() + b"\n")


def _path(trust: Path) -> Path:
    return trust / "versions.json"
