"""What a server may set anew for local training: per round, and per client."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from pydantic import ValidationError

from fedcore.config.run import ClientConfig
from fedcore.observability.foreign import foreign

PROXIMAL_MU = "proximal-mu"
"""The name under which Flower's FedProx sends its weight, and `ClientSettings` too."""
MOST_PROXIMAL_MU = 1e6
CHARGED = ("epochs", "batch_size")
"""What the noise and the charge of DP-SGD follow from."""


@dataclass(frozen=True, kw_only=True)
class ClientSettings:
    """Settings of one client's local training in one round; ``None`` keeps the run's own.

    Each has the bounds of its namesake in ``[client]``, and a device refuses what is outside them.
    Under example-level privacy ``epochs`` and ``batch_size`` stay those of the run: noise and
    charges were planned for them.
    """

    learning_rate: float | None = None
    """Step size of the local optimiser."""
    epochs: int | None = None
    """Passes over the client's data."""
    batch_size: int | None = None
    """Examples a step."""
    momentum: float | None = None
    """Of SGD."""
    weight_decay: float | None = None
    """L2 penalty of the optimiser."""
    proximal_mu: float = 0.0
    """Weight of FedProx's penalty ``mu/2 * ||w - w_round||^2``, from 0 to 1e6; 0 without."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, np.generic):  # travels as the Python number that it is
                object.__setattr__(self, name, value.item())

    @property
    def changes(self) -> dict[str, Any]:
        """What differs from the run, by its name in ``[client]``."""
        return {name: value for name in SETTABLE if (value := getattr(self, name)) is not None}

    def sent(self) -> dict[str, Any]:
        """As a message's configuration record holds it."""
        record = {key_of(name): value for name, value in self.changes.items()}
        return record | ({PROXIMAL_MU: self.proximal_mu} if self.proximal_mu else {})


SETTABLE = tuple(
    field.name for field in fields(ClientSettings) if field.name in ClientConfig.model_fields
)
RUN_SETTINGS = ClientSettings()
"""Nothing is set anew."""


def key_of(name: str) -> str:
    """What a setting is called in a message."""
    return name.replace("_", "-")


def read_settings(config: Mapping[str, Any]) -> ClientSettings:
    """The settings in a message's configuration record, without FedProx's weight.

    Types and bounds are looked at by `settings_with`.
    """
    found: dict[str, Any] = {name: config.get(key_of(name)) for name in SETTABLE}
    return ClientSettings(**found)


def settings_with(run: ClientConfig, asked: ClientSettings, *, private: bool) -> ClientConfig:
    """The settings that a client trains with.

    Guarantee:
        With ``private``, ``epochs`` and ``batch_size`` are those of ``run``, so what is charged for
        the round follows from the settings that are used.

    Args:
        run: The run's ``[client]``.
        asked: What is to be another.
        private: Whether clients train with example-level privacy.

    Raises:
        ValueError: a setting is of the wrong type, out of its bounds, or may not change under
            privacy. The text names the setting, what was got and what was expected.
    """
    if type(asked.proximal_mu) not in (int, float) or not 0 <= asked.proximal_mu <= (
        MOST_PROXIMAL_MU
    ):  # false for NaN, too
        raise ValueError(
            f"proximal_mu = {_shown(asked.proximal_mu)}, expected a number from 0 to "
            f"{MOST_PROXIMAL_MU:g}"
        )
    changes = asked.changes
    if not changes:
        return run
    for name in CHARGED if private else ():
        if name in changes and changes[name] != getattr(run, name):
            raise ValueError(
                f"{name} = {_shown(changes[name])}, expected client.{name} = "
                f"{getattr(run, name)!r}: under example-level privacy the noise and the charge of "
                "every round follow from it, and were planned for the run's own"
            )
    try:
        return ClientConfig.model_validate({**run.model_dump(), **changes})
    except ValidationError as error:
        found = error.errors()[0]
        name = str(found["loc"][0])
        allowed = found["msg"].partition(" should be ")[2] or found["msg"]
        raise ValueError(f"{name} = {_shown(found['input'])}, expected {allowed}") from None


def _shown(value: object) -> str:
    """A value as Python writes it, and no longer than a line: a server may send anything."""
    try:
        return foreign(repr(value), 60)
    except ValueError:  # a whole number may be as long as one likes
        return "a number of thousands of digits"
