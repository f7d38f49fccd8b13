"""Where to compute."""

from __future__ import annotations

import torch

from fedcore.config.run import DeviceChoice
from fedcore.errors import ConfigError


def available(choice: DeviceChoice) -> torch.device:
    """The device for a choice: CUDA, else MPS, else CPU when it is ``auto``.

    Raises:
        ConfigError: the device that was asked for is not there.
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
            "Nothing was trained; set it to 'auto' or to one that is there."
        )
    return torch.device(choice)
