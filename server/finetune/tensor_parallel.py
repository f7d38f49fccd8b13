"""Tensor parallelism: the matrices of feed-forward layers divided among processes.

Every process computes the whole batch with its columns of a pair's first matrix and its rows of the
second, so that activations are added up once for each pair. Start with `divide_matrices`. Attention
is left whole: how a model's own code cuts its projections into heads cannot be seen from outside.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional

from fedcore.errors import ConfigError

_ELEMENTWISE = (
    *(nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Mish, nn.ELU, nn.CELU, nn.SELU, nn.LeakyReLU),
    *(nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Hardswish, nn.Dropout, nn.Identity),
)
"""Layers that may stand between the two matrices: they treat each number alone."""


def pairs_of(model: nn.Module, world: int) -> list[tuple[str, str]]:
    """Returns the names of pairs of dense layers with nothing but elementwise layers between.

    Members of an `nn.Sequential`, and the feed-forward part of torch's own transformer layers, are
    found where the width between them is a multiple of ``world`` and no other layer shares weights
    with them.
    """
    modules = dict(model.named_modules())
    holders = Counter(
        id(each) for module in modules.values() for each in module._parameters.values()
    )
    return [
        pair
        for prefix, module in modules.items()
        for pair in _candidates(f"{prefix}." if prefix else "", module)
        if _fits(modules[pair[0]], modules[pair[1]], world, holders)
    ]


def _candidates(prefix: str, module: nn.Module) -> Iterator[tuple[str, str]]:
    if type(module) in (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer):
        if module.activation in (functional.relu, functional.gelu):
            yield f"{prefix}linear1", f"{prefix}linear2"
    elif type(module) is nn.Sequential:
        first: str | None = None
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                if first is not None:
                    yield f"{prefix}{first}", f"{prefix}{name}"
                    first = None
                else:
                    first = name
            elif type(child) not in _ELEMENTWISE:
                first = None


def _fits(first: nn.Module, second: nn.Module, world: int, holders: Counter[int]) -> bool:
    if not (isinstance(first, nn.Linear) and isinstance(second, nn.Linear)):
        return False
    if first.out_features % world:
        return False
    parameters = (*first.parameters(), *second.parameters())
    return all(holders[id(each)] == 1 for each in parameters)


def divide_matrices(model: nn.Module, device: torch.device, world: int) -> int:
    """Divides the weights of every pair among all processes, in place; returns how many pairs.

    Weights become new parameters, so optimisers are made afterwards.

    Raises:
        ConfigError: the model has no such pair.
    """
    from torch.distributed.device_mesh import init_device_mesh  # a second of imports
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        ParallelStyle,
        RowwiseParallel,
        parallelize_module,
    )

    pairs = pairs_of(model, world)
    if not pairs:
        raise ConfigError(
            "finetune.shard = 'tensor': this model has no two dense layers, in an nn.Sequential or "
            f"in torch's transformer layers, with a width between them that {world} processes "
            "divide. Nothing was trained; set it to 'always', which divides any model (FSDP2), or "
            "to 'auto'."
        )
    plan = dict[str, ParallelStyle]()
    for first, second in pairs:
        plan |= {first: ColwiseParallel(), second: RowwiseParallel()}
    parallelize_module(model, init_device_mesh(device.type, (world,)), plan)
    return len(pairs)
