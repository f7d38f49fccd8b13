"""Selects the fastest way to run a chain on this machine."""

from __future__ import annotations

import torch
from torch import nn

from fedcore.training.per_example.chain import Chain, Conv, Run


def compiled_run(chain: Chain, model: nn.Module, *, per_example: bool) -> Run | None:
    """Returns a run of the chain by compiled loops; None where torch is the better choice.

    That is the case on GPUs, for other types than float32, without convolutions, and where a result
    is used twice.

    Args:
        chain: From `fedcore.training.per_example.graph.find_chain`.
        model: The model of the chain.
        per_example: Whether the backward pass keeps examples separate.
    """
    plain = all(p.dtype == torch.float32 and p.is_cpu for p in model.parameters())
    if not plain or not any(isinstance(layer, Conv) for layer in chain.layers):
        return None
    from fedcore.training.per_example.cpu import kernel_run  # compiles on first use

    return kernel_run(chain, per_example=per_example)
