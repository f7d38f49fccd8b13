from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fedcore.errors import UnsupportedLayer
from fedcore.privacy.layers import check_layers
from tests.ways import way_of, weighted


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
        nn.RNN(4, 4),
        nn.LSTM(4, 4),
        nn.GRU(4, 4),
        nn.MultiheadAttention(4, 2),
        nn.TransformerEncoderLayer(4, 2),
        nn.ReLU(inplace=True),
        nn.Hardtanh(inplace=True),
        nn.Dropout(0.1, inplace=True),
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
        (nn.BatchNorm3d(4), "GroupNorm"),
        (nn.SyncBatchNorm(4), "GroupNorm"),
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
    with pytest.raises(UnsupportedLayer, match=r"does not support 1 \((Batch|Instance)Norm1d\)"):
        check_layers(nn.Sequential(nn.Linear(4, 4), norm))


class OwnNorm(nn.BatchNorm1d):
    pass


def test_a_batch_norm_by_another_name_is_refused() -> None:
    with pytest.raises(UnsupportedLayer, match=r"0 \(OwnNorm\)"):
        check_layers(nn.Sequential(OwnNorm(4)))


def test_a_model_that_is_one_such_layer_is_named() -> None:
    with pytest.raises(UnsupportedLayer, match=r"does not support model \(BatchNorm1d\)"):
        check_layers(nn.BatchNorm1d(4))


def test_a_frozen_layer_that_treats_each_example_alone_passes() -> None:
    check_layers(nn.Sequential(nn.LSTM(4, 4).requires_grad_(False), nn.Linear(4, 4)))


def test_a_model_in_evaluation_mode_is_judged_alike() -> None:
    check_layers(nn.Sequential(nn.Linear(4, 4)).eval())
    with pytest.raises(UnsupportedLayer):
        check_layers(nn.Sequential(nn.BatchNorm1d(4)).eval())


class TakesLast(nn.Module):
    """A recurrent layer or attention, and what it says last."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        found = (
            self.layer(x, x, x)
            if isinstance(self.layer, nn.MultiheadAttention)
            else (self.layer(x))
        )
        return (found[0] if isinstance(found, tuple) else found)[:, -1]


TRAINED = {
    "in place": lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.ReLU(inplace=True)),
    "in place, twice": lambda: nn.Sequential(
        *(nn.Flatten(), nn.Linear(12, 9), nn.Hardtanh(inplace=True), nn.Linear(9, 4)),
        nn.LeakyReLU(inplace=True),
    ),
    "frozen and in place": lambda: nn.Sequential(
        *(nn.Flatten(), nn.Linear(12, 9).requires_grad_(False), nn.ReLU(inplace=True)),
        nn.Linear(9, 4),
    ),
    "RNN": lambda: TakesLast(nn.RNN(4, 5, batch_first=True)),
    "LSTM": lambda: TakesLast(nn.LSTM(4, 5, num_layers=2, batch_first=True)),
    "GRU": lambda: TakesLast(nn.GRU(4, 5, bidirectional=True, batch_first=True)),
    "attention": lambda: TakesLast(nn.MultiheadAttention(4, 2, batch_first=True)),
    "transformer": lambda: TakesLast(
        nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    ),
}


@pytest.mark.parametrize("name", TRAINED)
def test_what_passes_is_trained_on_each_examples_own_gradient(name: str) -> None:
    torch.manual_seed(0)
    model, inputs, targets = TRAINED[name](), torch.randn(5, 3, 4), torch.arange(5) % 4
    loss = nn.functional.cross_entropy
    part = way_of(model, loss, inputs[0]).compute(nn.Identity(), model, inputs, targets)
    for place in range(5):
        model.zero_grad()
        one = slice(place, place + 1)
        torch.autograd.backward(loss(model(inputs[one]), targets[one]))
        trained = [p for p in model.parameters() if p.requires_grad]
        expected = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
        found = weighted(part, model, torch.eye(5)[place])
        length = torch.cat([one.flatten() for one in expected]).norm()
        for one_found, one_expected in zip(found, expected, strict=True):
            assert (one_found - one_expected).abs().max() <= 1e-6 * length
        assert part.squares[place].sqrt().item() == pytest.approx(length.item(), rel=1e-5)


@pytest.mark.parametrize("layer", [nn.LSTM(4, 4), nn.GRU(4, 4), nn.MultiheadAttention(4, 2)])
def test_sequences_that_come_first_are_found_to_mix_examples(layer: nn.Module) -> None:
    model = nn.Sequential(TakesLast(layer), nn.Linear(4, 2))
    with pytest.raises(UnsupportedLayer, match="batch_first=True"):
        way_of(model, nn.functional.cross_entropy, torch.zeros(3, 4))
