"""fedcore's additions to the signed metadata of The Update Framework: epochs and signing times."""

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
"""The field of root and timestamp metadata with the time of signing."""
EPOCHS = "epochs.json"
"""Target path of the epochs. The ``releases`` role may not sign it, so only the offline targets
keys can."""
MAX_EPOCHS_BYTES = 1 << 20  # 1 MiB: some 10,000 models


class Epochs(BaseModel):
    """The current epoch of each model.

    Versions increase within an epoch; a later epoch supersedes all versions of earlier ones.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    epochs: dict[Name, Annotated[int, Field(ge=1, le=10**9)]] = {}
    """Epochs by model; a missing model is in epoch 0."""

    def of(self, model: str) -> int:
        """Returns the epoch of a model."""
        return self.epochs.get(model, 0)

    def after(self, model: str) -> Epochs:
        """Returns a copy in which a model's next epoch has begun."""
        return self.model_copy(update={"epochs": {**self.epochs, model: self.of(model) + 1}})

    def to_bytes(self) -> bytes:
        """Returns the epochs as canonical JSON."""
        return json.dumps(self.model_dump(), sort_keys=True, separators=(",", ":")).encode()


def parse_epochs(raw: bytes) -> Epochs:
    """Parses the delivered bytes of epochs.

    Raises:
        TrustError: the bytes are not valid epochs.
    """
    try:
        return Epochs.model_validate_json(raw)
    except ValidationError as error:
        raise TrustError(
            f"{EPOCHS}: {first_fault(error)}. Nothing was installed; the previous version keeps "
            "serving."
        ) from None


def stamp(moment: datetime) -> dict[str, Any]:
    """Returns the metadata field with the time of signing, to the second."""
    return {SIGNED_AT: f"{moment.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"}


def signed_at(fields: Mapping[str, Any]) -> datetime | None:
    """Returns the time of signing in metadata; None if missing or malformed."""
    return moment_of(fields.get(SIGNED_AT))


def moment_of(said: Any) -> datetime | None:
    """Returns the time in an ISO 8601 text with a time zone, in UTC; None for anything else."""
    try:
        moment = datetime.fromisoformat(said) if isinstance(said, str) else None
        return moment.astimezone(UTC) if moment and moment.tzinfo else None
    except (ValueError, OverflowError):
        return None
