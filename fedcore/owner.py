"""What the owner of a device decides: read on the device, and only ever tightening."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from fedcore.config import Count, DeviceChoice, Positive, RunConfig, Section
from fedcore.errors import PrivacyError
from fedcore.settings import load


class OwnerPolicy(Section):
    """``owner.toml``: limits that no server can lift."""

    data: str | None = None
    """Folder of the local data, handed to the task in place of its default."""
    max_epsilon: Positive | None = None
    """No update leaves once it would take this device past so much, whatever the server allows."""
    target_delta: Annotated[float, Field(gt=0, lt=1)] | None = None
    """The delta at which ``max_epsilon`` is counted, when stricter than the server's."""
    max_memory_bytes: Count | None = None
    """Training that would need more is declined before it starts."""
    max_threads: Count | None = None
    device: DeviceChoice | None = None
    """Pins where this device trains."""

    @property
    def data_folder(self) -> Path | None:
        """The folder of the local data."""
        return Path(self.data) if self.data else None


OPEN_POLICY = OwnerPolicy()
"""An owner who asks for nothing beyond what the server's file says."""


def load_owner(path: Path) -> OwnerPolicy:
    """Reads ``owner.toml``; raises `ConfigError` as a run's file does."""
    return load(path, OwnerPolicy)


def tighten(run: RunConfig, owner: OwnerPolicy) -> RunConfig:
    """The run as this device will do it: never looser than either side asked.

    Guarantee:
        ``max_epsilon`` and ``target_delta`` of the result are at most those of ``run``.

    Raises:
        PrivacyError: the owner set a budget, and the run would train without privacy.
    """
    if owner.max_epsilon is not None and not run.private:
        raise PrivacyError(
            f"owner.toml: max_epsilon = {owner.max_epsilon:g}, and the run has privacy.unit = "
            "'none', whose epsilon has no bound. This device takes no part and nothing was "
            "trained; the server must set privacy.unit to 'example', or the owner drop the budget."
        )
    privacy = run.privacy.model_copy(
        update={
            "max_epsilon": min(run.privacy.max_epsilon, owner.max_epsilon or float("inf")),
            "target_delta": min(run.privacy.target_delta, owner.target_delta or 1.0),
        }
    )
    client = run.client.model_copy(update={"device": owner.device or run.client.device})
    return run.model_copy(update={"privacy": privacy, "client": client})
