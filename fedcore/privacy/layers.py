"""Which layers cannot be trained under example-level differential privacy, and what to use."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from fedcore.errors import UnsupportedLayer


def check_layers(module: nn.Module) -> None:
    """Refuses layers that keep statistics of examples, or take them over a batch.

    What else couples examples is found by `fedcore.training.per_example.trial.find_way`.

    Raises:
        UnsupportedLayer: names each layer, why, and what to use in its place.
    """
    named = [
        (name or "model", type(layer).__name__, instead)
        for name, layer in module.named_modules()
        if (instead := _instead(layer))
    ]
    if named:
        listed = "; ".join(f"{name} ({kind})" for name, kind, _ in named)
        raise UnsupportedLayer(
            f"model: example-level privacy cannot take {listed}: such a layer mixes examples of a "
            "batch, or keeps statistics of them. Nothing was trained; use "
            f"{', '.join(sorted({instead for _, _, instead in named}))}, or set privacy.unit to "
            "'none'."
        )


def _instead(layer: nn.Module) -> str:
    """What to use in place of a layer; empty where the layer may stay."""
    if isinstance(layer, _BatchNorm):  # a frozen one mixes examples, too
        return "GroupNorm (statistics of one example)"
    if isinstance(layer, _InstanceNorm) and layer.track_running_stats:
        return "InstanceNorm with track_running_stats=False"
    return ""
