"""What a round does to aggregated weights before it publishes them."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from fedcore.updates.pack import layout_of, pack, unpack
from server.rounds.training import without_negative_variances


def test_a_variance_below_zero_keeps_its_earlier_value() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    layout, before = layout_of(model), pack(model)
    noised = before - np.float32(0.25)
    assert without_negative_variances(noised, before, layout) is noised
    unpack(noised, model)
    model[1].running_var.copy_(torch.tensor([-0.5, 0.5]))
    found = without_negative_variances(pack(model), before, layout)
    unpack(found, model)
    assert model[1].running_var.tolist() == [1.0, 0.5]
    assert model[1].running_mean.tolist() == [-0.25, -0.25]  # other values may be negative
    assert torch.isfinite(model.eval()(torch.randn(4, 3))).all()
