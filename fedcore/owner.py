"""What the owner of a device decides: read on the device, and only ever tightening."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from fedcore.config import Count, DeviceChoice, Positive, RunConfig, Section
from fedcore.errors import PrivacyError
from fedcore.settings import load

Hours = Annotated[str, Field(pattern=r"^([01]\d|2[0-3]):[0-5]\d-([01]\d|2[0-3]):[0-5]\d$")]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class OwnerPolicy(Section):
    """``owner.toml``: limits that no server can lift."""

    data: str | None = None
    """Folder of the local data, handed to the task in place of its default."""
    max_epsilon: Positive | None = None
    """No update leaves once it would take this device past so much, whatever the server allows,
    over all runs on the same data."""
    target_delta: Annotated[float, Field(gt=0, lt=1)] | None = None
    """The delta at which ``max_epsilon`` is counted, when stricter than the server's."""
    max_memory_bytes: Count | None = None
    """Training that would need more is declined before it starts."""
    max_threads: Count | None = None
    device: DeviceChoice | None = None
    """Pins where this device trains."""
    tasks: tuple[Digest, ...] | None = None
    """SHA-256 of each task file that may run here; any that is installed when unset."""
    hours: tuple[Hours, ...] | None = None
    """When this device takes part, by its own clock, as ``["22:00-06:00"]``; always when unset.
    What was begun within the hours is finished."""
    max_bandwidth_bytes_per_s: Annotated[int, Field(ge=10_000)] | None = None
    """Most bytes a second, to and from the server together, over a transfer as a whole."""
    min_battery_percent: Annotated[int, Field(ge=0, le=100)] | None = None
    """On battery, this device takes no part below that charge."""
    on_mains_only: bool = False
    """This device takes no part while it runs on its battery."""
    max_gpu_fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    """The share of a GPU's memory that training may take; more ends as too little memory does."""
    free_gpu_between_rounds: bool = False
    """Gives the GPU's memory back after each round; the next one takes longer to begin."""

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
