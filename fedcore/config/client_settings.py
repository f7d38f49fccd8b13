"""Settings of local training that a server may change per round and per client."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from pydantic import ValidationError

from fedcore.config.contradictions import of_optimizer
from fedcore.config.run import ClientConfig
from fedcore.observability.foreign import foreign

PROXIMAL_MU = "proximal-mu"
"""The key under which Flower's FedProx and `ClientSettings` send the proximal weight."""
MAX_PROXIMAL_MU = 1e6
CHARGED = ("epochs", "steps", "batch_size")
"""The settings that determine the noise and the charge of DP-SGD."""


@dataclass(frozen=True, kw_only=True)
class ClientSettings:
    """Settings of one client's local training in one round; ``None`` keeps the run's value.

    Each has the bounds of the setting with its name in ``[client]``; a device rejects other
    values. Under example-level privacy ``epochs``, ``steps`` and ``batch_size`` must stay the
    run's: noise and charges were planned for them.

    Example::

        fedcore.ClientSettings(learning_rate=0.1 / round.number, epochs=2)
    """

    learning_rate: float | None = None
    """Step size of the local optimiser."""
    epochs: int | None = None
    """Passes over the client's data; replaces the run's ``steps``, if it has any."""
    steps: int | None = None
    """Optimiser steps, in place of ``epochs``."""
    batch_size: int | None = None
    """Examples a step."""
    momentum: float | None = None
    """Momentum of SGD."""
    weight_decay: float | None = None
    """L2 penalty of the optimiser."""
    max_grad_norm: float | None = None
    """L2 norm to which longer gradients of a batch are scaled; not under example-level privacy."""
    proximal_mu: float = 0.0
    """Weight of FedProx's penalty ``mu/2 * ||w - w_round||^2``, from 0 to 1e6; 0 disables it."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, np.generic):  # messages carry plain Python numbers
                object.__setattr__(self, name, value.item())

    @property
    def changes(self) -> dict[str, Any]:
        """The changed settings, by their names in ``[client]``."""
        return {name: value for name in SETTABLE if (value := getattr(self, name)) is not None}

    def sent(self) -> dict[str, Any]:
        """Returns the entries for a message's configuration record."""
        record = {key_of(name): value for name, value in self.changes.items()}
        return record | ({PROXIMAL_MU: self.proximal_mu} if self.proximal_mu else {})


SETTABLE = tuple(
    field.name for field in fields(ClientSettings) if field.name in ClientConfig.model_fields
)
RUN_SETTINGS = ClientSettings()
"""Settings that change nothing."""


def key_of(name: str) -> str:
    """Returns the key of a setting in a message."""
    return name.replace("_", "-")


def read_settings(config: Mapping[str, Any]) -> ClientSettings:
    """Returns the settings in a message's configuration record, without FedProx's weight.

    Does not check types and bounds; `settings_with` does.
    """
    found: dict[str, Any] = {name: config.get(key_of(name)) for name in SETTABLE}
    return ClientSettings(**found)


def settings_with(run: ClientConfig, changed: ClientSettings, *, private: bool) -> ClientConfig:
    """Returns the run's ``[client]`` with a server's changes, after checking them.

    Guarantee:
        With ``private``, ``epochs``, ``steps`` and ``batch_size`` are those of ``run``, so the
        charge for the round follows from the settings that training uses.

    Args:
        run: The run's ``[client]`` in this round, see `fedcore.config.in_round`.
        changed: The server's changes.
        private: Whether clients train with example-level privacy.

    Raises:
        ValueError: a setting has the wrong type, is out of its bounds, or may not change under
            privacy. The text names the setting, the value found and the values expected.
    """
    if type(changed.proximal_mu) not in (int, float) or not 0 <= changed.proximal_mu <= (
        MAX_PROXIMAL_MU
    ):  # false for NaN, too
        raise ValueError(
            f"proximal_mu = {_shown(changed.proximal_mu)}, expected a number from 0 to "
            f"{MAX_PROXIMAL_MU:g}"
        )
    changes = changed.changes
    if not changes:
        return run
    if "epochs" in changes and "steps" not in changes and not private:
        changes["steps"] = None
    for name in CHARGED if private else ():
        if name in changes and changes[name] != getattr(run, name):
            raise ValueError(
                f"{name} = {_shown(changes[name])}, expected client.{name} = "
                f"{getattr(run, name)!r}: under example-level privacy the noise and the privacy "
                "spent in every round depend on it and were planned for the run's own value"
            )
    try:
        settings = ClientConfig.model_validate({**run.model_dump(), **changes})
    except ValidationError as error:
        found = error.errors()[0]
        name = str(found["loc"][0])
        allowed = found["msg"].partition(" should be ")[2] or found["msg"]
        raise ValueError(f"{name} = {_shown(found['input'])}, expected {allowed}") from None
    for problem in of_optimizer("client", settings, private=private):
        raise ValueError(problem.rstrip("."))
    return settings


def _shown(value: object) -> str:
    """Returns a value in Python's notation, on one line: a server may send anything."""
    try:
        return foreign(repr(value), 60)
    except ValueError:  # Python refuses to print an integer of too many digits
        return "a number with thousands of digits"
