"""Layers that example-level differential privacy cannot train, and their replacements."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from fedcore.errors import UnsupportedLayer


def check_layers(module: nn.Module) -> None:
    """Rejects layers that keep statistics of examples, or compute them over a batch.

    `fedcore.training.per_example.trial.choose_method` detects all other coupling between examples.

    Raises:
        UnsupportedLayer: Lists each such layer, the reason and the replacement.
    """
    named = [
        (name or "model", type(layer).__name__, instead)
        for name, layer in module.named_modules()
        if (instead := _instead(layer))
    ]
    if named:
        listed = "; ".join(f"{name} ({kind})" for name, kind, _ in named)
        raise UnsupportedLayer(
            f"model: example-level privacy does not support {listed}: these layers mix the "
            "examples of a batch or keep statistics of them. Nothing was trained; use "
            f"{', '.join(sorted({instead for _, _, instead in named}))}, or set privacy.unit to "
            "'none'."
        )


def _instead(layer: nn.Module) -> str:
    """Returns the replacement for a layer; empty if the layer is supported."""
    if isinstance(layer, _BatchNorm):  # also if frozen: in training mode it mixes examples
        return "GroupNorm (statistics of one example)"
    if isinstance(layer, _InstanceNorm) and layer.track_running_stats:
        return "InstanceNorm with track_running_stats=False"
    return ""
