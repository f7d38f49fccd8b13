"""What runs a chain the quickest on this machine."""

from __future__ import annotations

import torch
from torch import nn

from fedcore.training.per_example.chain import Chain, Conv, Run


def compiled_run(chain: Chain, model: nn.Module, *, apart: bool) -> Run | None:
    """Runs a chain by compiled loops; None where it is better left to torch.

    So it is on GPUs, without convolutions, and where a result is used twice.

    Args:
        chain: From `fedcore.training.per_example.graph.find_chain`.
        model: That the chain was found in.
        apart: Whether examples are left apart on the way back.
    """
    plain = all(p.dtype == torch.float32 and p.is_cpu for p in model.parameters())
    if not plain or not any(isinstance(layer, Conv) for layer in chain.layers):
        return None
    from fedcore.training.per_example.cpu import by_kernels  # compiles on first use

    return by_kernels(chain, apart=apart)
