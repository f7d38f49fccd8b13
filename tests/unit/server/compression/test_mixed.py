from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from fedcore.artifacts.parity import FloatArray
from fedcore.errors import CompressionError
from server.compression.export import export_onnx
from server.compression.mixed import MixedModel, int8_mixed
from server.compression.quantise import Calibrated, calibrate, int8_static
from server.compression.runtime import answer, open_session

INPUTS = torch.rand(96, 16, generator=torch.Generator().manual_seed(1))


def model() -> nn.Module:
    """A network with one hidden unit so large that 8 bits for all units lose the others."""
    torch.manual_seed(0)
    layers = [nn.Linear(16, 32), *(nn.Linear(32, 32) for _ in range(4)), nn.Linear(32, 3)]
    with torch.no_grad():
        layers[1].bias[0] = 3000.0
        layers[2].weight[:, 0] = 0.0
    steps = [step for layer in layers for step in (layer, nn.ReLU())]
    return nn.Sequential(*steps[:-1]).eval()


@pytest.fixture(scope="module")
def calibrated() -> Calibrated:
    raw = export_onnx(model(), INPUTS[:2], labels=(), kind="classification")
    return calibrate(raw, INPUTS)


def agreement(one: FloatArray, other: FloatArray) -> float:
    """1 minus the error relative to how far the outputs are from their means."""
    return float(1 - np.linalg.norm(other - one) / np.linalg.norm(one - one.mean(0)))


def search(
    calibrated: Calibrated,
    *,
    least: float = 0.8,
    limit_s: float = 1e6,
    ticks: Iterator[int] | None = None,
    lines: list[str] | None = None,
) -> MixedModel:
    ticks = ticks or count()
    return int8_mixed(
        calibrated,
        INPUTS.numpy(),
        agreement=agreement,
        least_agreement=least,
        reduce_range=False,
        time_limit_s=limit_s,
        progress=(lines if lines is not None else []).append,
        clock=lambda: next(ticks),
    )


def answers(raw: bytes) -> NDArray[np.float32]:
    return answer(open_session(raw, threads=1), INPUTS.numpy())


def test_the_layers_that_lose_the_most_stay_in_float32(calibrated: Calibrated) -> None:
    expected = answers(calibrated.prepared)
    assert agreement(expected, answers(int8_static(calibrated, reduce_range=False))) < 0.5
    lines: list[str] = []
    found = search(calibrated, lines=lines)
    assert agreement(expected, answers(found.onnx)) >= 0.8
    assert found.of == len(calibrated.layers) == 5
    assert found.quantised == 3  # not the layer of the large unit, nor the one that reads it
    assert len(found.onnx) < 0.9 * len(calibrated.prepared)
    types = [
        each.data_type
        for each in onnx.load_model_from_string(found.onnx).graph.initializer
        if len(each.dims) > 1
    ]
    assert types.count(onnx.TensorProto.INT8) == 3
    assert lines[0] == "int8_mixed: measuring layer 1 of 5"
    assert lines[-1] == "int8_mixed: leaving 2 of 5 layers in float32"
    assert search(calibrated) == found


def test_all_layers_are_quantised_where_that_agrees(calibrated: Calibrated) -> None:
    assert search(calibrated, least=-99.0).quantised == 5


def test_answers_that_no_choice_keeps_are_a_reason(calibrated: Calibrated) -> None:
    with pytest.raises(CompressionError, match=r"^no choice of its 5 layers to quantise keeps"):
        search(calibrated, least=1.1)


def test_the_search_ends_with_its_time(calibrated: Calibrated) -> None:
    lines: list[str] = []
    with pytest.raises(CompressionError, match=r"found within compression\.time_limit_s = 3 that"):
        search(calibrated, least=1.1, limit_s=3, lines=lines)
    assert len(lines) == 3  # two layers measured, one choice tried
    assert search(calibrated, least=-99.0, limit_s=3).quantised == 5
