"""Rollout of a model: which devices get a version before the others, signed with the releases.

A repository has two channels for each model. ``stable`` is the version that its pointer names.
``canary`` is a later version for some devices: a share of all, drawn by their keys, and named
devices. Both are in metadata signed with the online keys, so a server that delivers a repository
can neither give a device another channel nor keep a rollback from it without being noticed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedcore.artifacts.manifest import MAX_VERSION
from fedcore.errors import TrustError
from fedcore.observability.faults import first_fault

FIELD = "rollout"
"""Key in the custom metadata of a model's pointer."""
MAX_COHORT = 1000
MAX_ROLLED_BACK = 20
_Version = Annotated[int, Field(ge=1, le=MAX_VERSION)]
DeviceName = Annotated[str, Field(min_length=1, max_length=64)]


@dataclass(frozen=True)
class DeviceIdentity:
    """The identity by which a device belongs to a channel."""

    name: str
    fingerprint: str
    """Of its public key."""


class Canary(BaseModel):
    """A version for some devices, and which ones."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    version: _Version
    since: _Version
    """The first version of this trial. Devices that have it, or a later one, follow the trial."""
    basis_points: Annotated[int, Field(ge=0, le=10_000)]
    """Share of all devices, in hundredths of a percent: signed metadata holds no fractions."""
    cohort: Annotated[tuple[DeviceName, ...], Field(max_length=MAX_COHORT)] = ()
    """Names of further devices."""

    @property
    def percent(self) -> float:
        """Share of all devices, in percent."""
        return self.basis_points / 100

    def selects(self, model: str, device: DeviceIdentity) -> bool:
        """Returns whether a device takes part.

        A larger percentage of the same trial contains the devices of a smaller one.
        """
        if device.name in self.cohort:
            return True
        drawn = hashlib.sha256(f"{model}/{self.since}/{device.fingerprint}".encode()).digest()
        return int.from_bytes(drawn[:8], "big") < self.basis_points * 2**64 // 10_000


class EndedTrial(BaseModel):
    """A version whose trial ended badly."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: _Version
    why: Annotated[str, Field(max_length=1000)]


class Rollout(BaseModel):
    """Content of the custom metadata of a model's pointer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    canary: Canary | None = None
    rolled_back: Annotated[tuple[EndedTrial, ...], Field(max_length=MAX_ROLLED_BACK)] = ()
    """The latest trials that ended badly, oldest first."""

    def ended_badly(self, version: int, why: str) -> tuple[EndedTrial, ...]:
        """Returns ``rolled_back`` with another version, without the oldest if it is full."""
        return (*self.rolled_back, EndedTrial(version=version, why=why[:1000]))[-MAX_ROLLED_BACK:]

    def custom(self) -> dict[str, Any]:
        """Returns the custom metadata."""
        return {FIELD: self.model_dump(mode="json", exclude_defaults=True)}


def rollout_of(custom: Mapping[str, Any] | None) -> Rollout:
    """Parses a pointer's custom metadata; without any, everything is stable.

    Raises:
        TrustError: it is not a rollout that this version knows.
    """
    if not custom or FIELD not in custom:
        return Rollout()
    try:
        return Rollout.model_validate(custom[FIELD])
    except ValidationError as error:
        raise TrustError(
            f"rollout: {first_fault(error)}. Nothing was installed; the previous version keeps "
            "serving. Install the publisher's version of fedcore."
        ) from None
