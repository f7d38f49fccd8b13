"""Selects the torch device to compute on."""

from __future__ import annotations

import torch

from fedcore.config.run import DeviceChoice
from fedcore.errors import ConfigError


def available(choice: DeviceChoice) -> torch.device:
    """Returns the torch device for a setting; ``auto`` prefers CUDA, then MPS, then CPU.

    Raises:
        ConfigError: This machine does not have the requested device.
    """
    has = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if choice == "auto":
        return torch.device(next(name for name in ("cuda", "mps", "cpu") if has[name]))
    if not has[choice]:
        there = ", ".join(name for name, is_there in has.items() if is_there)
        raise ConfigError(
            f"client.device = {choice!r}: this machine has no such device (found: {there}). "
            "Nothing was trained; set it to 'auto' or to an available device."
        )
    return torch.device(choice)
