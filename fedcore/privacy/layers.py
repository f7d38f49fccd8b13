"""Which layers cannot be trained under example-level differential privacy, and what to use."""

from __future__ import annotations

from opacus.validators import ModuleValidator
from torch import nn

from fedcore.errors import UnsupportedLayer

_INSTEAD = {
    "BatchNorm": "GroupNorm (statistics of one example) or `opacus.validators.ModuleValidator.fix`",
    "SyncBatchNorm": "GroupNorm",
    "InstanceNorm": "InstanceNorm with track_running_stats=False",
    "LSTM": "opacus.layers.DPLSTM",
    "GRU": "opacus.layers.DPGRU",
    "RNN": "opacus.layers.DPRNN",
    "MultiheadAttention": "opacus.layers.DPMultiheadAttention",
}


def check_layers(module: nn.Module) -> None:
    """Refuses a model that per-example gradients cannot be taken of.

    Raises:
        UnsupportedLayer: names each layer, why, and what to use in its place.
    """
    if not ModuleValidator.validate(module, strict=False):
        return
    named = [
        (name, type(layer).__name__)
        for name, layer in module.named_modules()
        if not list(layer.children()) and ModuleValidator.validate(layer, strict=False)
    ]
    named = named or [("model", type(module).__name__)]
    listed = "; ".join(f"{name} ({kind})" for name, kind in named)
    instead = sorted(
        {advice for _, kind in named for prefix, advice in _INSTEAD.items() if prefix in kind}
    )
    raise UnsupportedLayer(
        f"model: example-level privacy cannot take {listed}: such a layer mixes examples of a "
        "batch, or has no per-example gradient. Nothing was trained; use "
        f"{', '.join(instead) or 'a layer that treats each example alone'}, or set privacy.unit to "
        "'none'."
    )
