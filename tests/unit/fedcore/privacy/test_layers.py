from __future__ import annotations

import pytest
import torch
from opacus import GradSampleModule
from torch import nn

from fedcore.errors import UnsupportedLayer
from fedcore.privacy.layers import check_layers


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(4, 4),
        nn.Conv1d(3, 8, 3),
        nn.Conv2d(3, 8, 3),
        nn.Embedding(10, 4),
        nn.GroupNorm(2, 4),
        nn.LayerNorm(4),
        nn.InstanceNorm1d(4),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_layers_that_treat_each_example_alone_pass(layer: nn.Module) -> None:
    check_layers(nn.Sequential(layer, nn.ReLU(), nn.Dropout(0.1)))


@pytest.mark.parametrize(
    ("layer", "instead"),
    [
        (nn.BatchNorm1d(4), "GroupNorm"),
        (nn.BatchNorm2d(4), "GroupNorm"),
        (nn.InstanceNorm1d(4, affine=True, track_running_stats=True), "track_running_stats=False"),
        (nn.LSTM(4, 4), "opacus.layers.DPLSTM"),
        (nn.GRU(4, 4), "opacus.layers.DPGRU"),
        (nn.MultiheadAttention(4, 2), "opacus.layers.DPMultiheadAttention"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_layer_that_cannot_be_protected_is_named_with_what_to_use(
    layer: nn.Module, instead: str
) -> None:
    model = nn.Sequential(nn.Linear(4, 4), layer)
    with pytest.raises(UnsupportedLayer) as caught:
        check_layers(model)
    said = str(caught.value)
    assert f"1 ({type(layer).__name__})" in said
    assert instead in said
    assert "Nothing was trained" in said
    assert "0 (Linear)" not in said


def test_every_such_layer_is_named() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    with pytest.raises(UnsupportedLayer, match=r"0 \(BatchNorm1d\); 1\.1 \(BatchNorm1d\)"):
        check_layers(model)


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm1d(4).requires_grad_(False),
        nn.BatchNorm1d(4, affine=False),
        nn.BatchNorm1d(4, affine=False, track_running_stats=False),
        nn.InstanceNorm1d(4, track_running_stats=True),
    ],
    ids=["frozen", "without parameters", "without statistics either", "instance norm"],
)
def test_a_norm_without_trainable_parameters_still_mixes_or_keeps_what_it_sees(
    norm: nn.Module,
) -> None:
    with pytest.raises(UnsupportedLayer, match=r"cannot take 1 \((Batch|Instance)Norm1d\)"):
        check_layers(nn.Sequential(nn.Linear(4, 4), norm))


class OwnNorm(nn.BatchNorm1d):
    pass


def test_a_batch_norm_by_another_name_is_refused() -> None:
    with pytest.raises(UnsupportedLayer, match=r"0 \(OwnNorm\)"):
        check_layers(nn.Sequential(OwnNorm(4)))


def test_a_model_that_is_one_such_layer_is_named() -> None:
    with pytest.raises(UnsupportedLayer, match=r"cannot take model \(LSTM\)"):
        check_layers(nn.LSTM(4, 4))


def test_a_frozen_layer_that_treats_each_example_alone_passes() -> None:
    check_layers(nn.Sequential(nn.LSTM(4, 4).requires_grad_(False), nn.Linear(4, 4)))


def test_a_model_in_evaluation_mode_is_judged_alike() -> None:
    check_layers(nn.Sequential(nn.Linear(4, 4)).eval())
    with pytest.raises(UnsupportedLayer):
        check_layers(nn.Sequential(nn.BatchNorm1d(4)).eval())


@pytest.mark.parametrize(
    "layer",
    [nn.ReLU(inplace=True), nn.Hardtanh(inplace=True), nn.Dropout(0.1, inplace=True)],
    ids=lambda layer: type(layer).__name__,
)
def test_a_layer_that_works_in_place_is_named_with_the_remedy(layer: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), layer))
    with pytest.raises(UnsupportedLayer) as caught:
        check_layers(model)
    said = str(caught.value)
    assert f"cannot take 1.1 ({type(layer).__name__}) with inplace=True" in said
    assert "use inplace=False, which gives the same result" in said
    assert "Nothing was trained" in said


def test_what_works_in_place_is_named_with_what_is_refused_for_another_reason() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(inplace=True))
    with pytest.raises(UnsupportedLayer) as caught:
        check_layers(model)
    said = str(caught.value)
    assert "cannot take 1 (BatchNorm1d)" in said
    assert "2 (ReLU) would need inplace=False, too" in said


def test_what_works_in_place_in_a_frozen_part_passes_and_trains() -> None:
    frozen = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)).requires_grad_(False)
    model = nn.Sequential(frozen, nn.Linear(4, 2))
    check_layers(model)
    inputs = torch.randn(3, 4, requires_grad=True)
    torch.autograd.backward(GradSampleModule(model)(inputs * 1).sum())
    assert [p.grad_sample.shape for p in model[1].parameters()] == [(3, 2, 4), (3, 2)]


def test_what_is_refused_in_place_could_not_be_trained() -> None:
    def model(inplace: bool) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=inplace))

    with pytest.raises(RuntimeError, match="modified inplace"):
        GradSampleModule(model(inplace=True))(torch.randn(3, 4))
    check_layers(model(inplace=False))
    assert GradSampleModule(model(inplace=False))(torch.randn(3, 4)).shape == (3, 4)
