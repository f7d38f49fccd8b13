"""Arithmetic of a training step: half precision, and what is computed again in place of kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fedcore.config.finetune import Finetune

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(settings: Finetune, device: torch.device) -> AbstractContextManager[object]:
    """Returns a context in which matrix products use ``finetune.precision``."""
    dtype = _DTYPES.get(settings.precision)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def make_scaler(settings: Finetune, device: torch.device) -> torch.amp.GradScaler | None:
    """Returns the scaling of losses that half precision needs, else None.

    Gradients of float16 vanish below 6e-8; steps whose scaled gradients overflow are left out.
    """
    return torch.amp.GradScaler(device.type) if settings.precision == "fp16" else None


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Returns the repeated parts of a model: members of lists and sequences that have parameters.

    Of parts within one another only the outermost count.
    """
    found = list[nn.Module]()

    def search(module: nn.Module) -> None:
        for child in module.children():
            listed = isinstance(module, nn.ModuleList | nn.Sequential)
            # A single layer keeps no activations of its own but its input and output.
            nested = any(True for _ in child.children())
            if listed and nested and any(True for _ in child.parameters()):
                found.append(child)
            else:
                search(child)

    search(model)
    return found


@contextmanager
def recomputed(model: nn.Module, *, active: bool) -> Iterator[int]:
    """Has the backward pass compute each block's activations again, in place of keeping them.

    Results are equal bit for bit: random streams are restored for the second computation.

    Yields:
        The number of blocks; 0 if ``active`` is False, or the model has none.
    """
    blocks: list[Any] = blocks_of(model) if active else []
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield len(blocks)
    finally:
        for block in blocks:
            del block.forward  # that of its class again
