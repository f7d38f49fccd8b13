"""What signed metadata says beyond The Update Framework's own fields."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedcore.config.run import Name
from fedcore.errors import TrustError
from fedcore.observability.faults import first_fault

SIGNED_AT = "signed_at"
"""The field of root and timestamp metadata that says when they were signed."""
EPOCHS = "epochs.json"
"""Target path of the epochs: outside what the ``releases`` role may sign, so that only the offline
targets keys vouch for it."""
MAX_EPOCHS_BYTES = 1 << 20  # 1 MiB: some 10,000 models


class Epochs(BaseModel):
    """From which epoch on a model's versions count.

    Versions only grow within an epoch; a later epoch supersedes every version of the ones before.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    epochs: dict[Name, Annotated[int, Field(ge=1, le=10**9)]] = {}
    """By model; one that is not named is in epoch 0."""

    def of(self, model: str) -> int:
        """The epoch of a model."""
        return self.epochs.get(model, 0)

    def after(self, model: str) -> Epochs:
        """These, with the next epoch of a model begun."""
        return self.model_copy(update={"epochs": {**self.epochs, model: self.of(model) + 1}})

    def to_bytes(self) -> bytes:
        """As canonical JSON."""
        return json.dumps(self.model_dump(), sort_keys=True, separators=(",", ":")).encode()


def parse_epochs(raw: bytes) -> Epochs:
    """Reads epochs that were delivered.

    Raises:
        TrustError: they are none.
    """
    try:
        return Epochs.model_validate_json(raw)
    except ValidationError as error:
        raise TrustError(
            f"{EPOCHS}: {first_fault(error)}. Nothing was installed; the version before keeps "
            "serving."
        ) from None


def stamp(moment: datetime) -> dict[str, Any]:
    """The field that says when metadata was signed, to the second."""
    return {SIGNED_AT: f"{moment.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"}


def signed_at(fields: Mapping[str, Any]) -> datetime | None:
    """When metadata says that it was signed; None where it does not, or not as a moment."""
    return moment_of(fields.get(SIGNED_AT))


def moment_of(said: Any) -> datetime | None:
    """A moment as ISO 8601 with its time zone, in UTC; None where ``said`` is something else."""
    try:
        moment = datetime.fromisoformat(said) if isinstance(said, str) else None
        return moment.astimezone(UTC) if moment and moment.tzinfo else None
    except (ValueError, OverflowError):
        return None
