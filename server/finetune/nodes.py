"""What several machines that train together check and share before the first step."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from fedcore.config.run import RunConfig
from fedcore.errors import ConfigError
from server.finetune.control import Group
from server.finetune.job import settings_digest


def check_alike(group: Group, run: RunConfig, *, joins: bool) -> int:
    """Checks that all nodes have the same settings, and returns whose starting points count.

    Args:
        group: All processes.
        run: This node's run.
        joins: Whether this node has no starting point of its own.

    Returns:
        The first process of a node that has starting points.

    Raises:
        ConfigError: settings differ, or every node joins.
    """
    if run.finetune.nodes == 1:
        return 0
    digest = settings_digest(run)
    if group.least(digest) != -group.least(-digest):
        raise ConfigError(
            "fine-tuning: the nodes have different settings of [finetune], or other seeds. Nothing "
            "was trained; give all of them the same run file and the same --set options."
        )
    source = group.least(group.world if joins else group.rank)
    if source == group.world:
        raise ConfigError(
            "fine-tuning: every node joins, and none has a model to start from. Nothing was "
            "trained; start one of them without --join."
        )
    return source


def share_weights(group: Group, model: nn.Module, *, source: int) -> None:
    """Gives the model in all processes the weights and buffers that process ``source`` has."""
    if group.world > 1:
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, src=source)


def shared_place(group: Group, place: str | None, *, source: int) -> Path | None:
    """Returns the folder for checkpoints, under the name that process ``source`` gives it.

    Raises:
        ConfigError: nodes do not share the folder.
    """
    if place is None or group.world == 1:
        return None if place is None else Path(place)
    own = Path(place)
    name = torch.frombuffer(bytearray(bytes.fromhex(own.name)), dtype=torch.uint8).clone()
    dist.broadcast(name, src=source, group=group.control)
    found = own.with_name(bytes(name.tolist()).hex())
    mark = found / "shared"
    if group.rank == 0:
        found.mkdir(parents=True, exist_ok=True)
        mark.touch()
    group.agreed(0)
    if not group.least(int(mark.exists())):
        raise ConfigError(
            f"finetune.checkpoints: nodes do not share the folder {found.parent}. Nothing was "
            "trained; name a folder on a file system that all of them mount."
        )
    return found
