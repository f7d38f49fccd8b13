"""Which layers cannot be trained under example-level differential privacy, and what to use."""

from __future__ import annotations

from opacus.validators import ModuleValidator
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

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
    named = [
        (name or "model", type(layer).__name__)
        for name, layer in module.named_modules()
        if _refused(layer)
    ]
    inside = [
        f"{name or 'model'} ({type(layer).__name__})" for name, layer in _in_place_layers(module)
    ]
    if named:
        listed = "; ".join(f"{name} ({kind})" for name, kind in named)
        instead = sorted(
            {advice for _, kind in named for prefix, advice in _INSTEAD.items() if prefix in kind}
        )
        also = f" {'; '.join(inside)} would need inplace=False, too." if inside else ""
        raise UnsupportedLayer(
            f"model: example-level privacy cannot take {listed}: such a layer mixes examples of a "
            "batch, or has no per-example gradient. Nothing was trained; use "
            f"{', '.join(instead) or 'a layer that treats each example alone'}, or set "
            f"privacy.unit to 'none'.{also}"
        )
    if inside:
        raise UnsupportedLayer(
            f"model: example-level privacy cannot take {'; '.join(inside)} with inplace=True: such "
            "a layer overwrites what the layer before it gave, which per-example gradients are "
            "taken from. Nothing was trained; use inplace=False, which gives the same result, or "
            "set privacy.unit to 'none'."
        )


def _in_place_layers(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Layers that work in place beside something that is trained, by their names.

    In a part of the model that is frozen as a whole, no gradient is taken.
    """
    found = []
    for name, layer in module.named_modules():
        if getattr(layer, "inplace", False):
            holder = module.get_submodule(name.rpartition(".")[0])
            if any(parameter.requires_grad for parameter in holder.parameters()):
                found.append((name, layer))
    return found


def _refused(layer: nn.Module) -> bool:
    if isinstance(layer, _BatchNorm):  # a frozen one mixes examples, too
        return True
    validate = ModuleValidator.VALIDATORS.get(type(layer))
    trained = any(parameter.requires_grad for parameter in layer.parameters())
    looked_at = trained or isinstance(layer, _InstanceNorm)  # frozen, its statistics still move
    return bool(validate and looked_at and validate(layer))
