"""Numbers of a server that private training refuses before it reads data."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedcore.errors import InvalidUpdate
from fedcore.task.model import FullModel
from fedcore.training.server_numbers import check_instruction
from fedcore.updates.local import mark_local
from fedcore.updates.messages import Instruction
from fedcore.updates.pack import layout_of, pack


@pytest.mark.parametrize("value", [2e6, -2e6, float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["trained", "frozen", "local"])
def test_a_huge_weight_is_refused_wherever_it_is(where: str, value: float) -> None:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(3)))
    model[1].requires_grad_(False)
    mark_local(model, ["2.*"])
    place = ("trained", "frozen", "local").index(where)

    def check(*, initial: bool = True) -> None:
        sent = Instruction(1, pack(model), layout_of(model).digest, b"", 0.0)
        check_instruction(sent, FullModel(nn.Identity(), model), initial=initial)

    check()
    with torch.no_grad():
        model[place].weight[0, 0] = value  # type: ignore[index, union-attr]
    with pytest.raises(InvalidUpdate, match="Nothing was trained or charged"):
        check()
    if where == "local":
        check(initial=False)  # the client's own: no server sent it
