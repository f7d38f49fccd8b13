"""Adapters: which parameters train, that merging changes no answer, and what rounds send."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fedcore
from fedcore.errors import TaskError
from fedcore.task.adapters import LowRankLinear, merge_adapters, with_adapters
from fedcore.updates.pack import layout_of, pack, unpack
from tests.unit.server.simulation.plain import federated, run_of, task_of

BIG = 3160  # its square is 10 million


def dense() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))


class Tied(nn.Module):
    """A transformer whose dense layer is used twice, and whose head is tied to its table."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(7, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.once = self.again = nn.Linear(8, 8)
        self.head = nn.Linear(8, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.block(self.embed(x))
        return self.head(self.again(torch.tanh(self.once(hidden))))  # type: ignore[no-any-return]


def moved(model: nn.Module) -> nn.Module:
    """The model after a change of all that trains."""
    vector = pack(model)
    unpack(vector + np.random.default_rng(0).normal(0, 0.3, vector.shape).astype("f4"), model)
    return model


def trained(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad]


def test_only_adapters_train_and_begin_without_effect() -> None:
    inputs = torch.randn(5, 6)
    model = with_adapters(dense(), targets=["2"], rank=2, trained=["0.bias"])
    assert trained(model) == ["0.bias", "2.down.weight", "2.up.weight"]
    assert layout_of(model).size == 16 + 2 * (16 + 3)
    assert torch.equal(model(inputs), dense()(inputs))


@pytest.mark.parametrize("training", [True, False])
def test_merged_adapters_give_equal_answers(training: bool) -> None:
    """In evaluation mode torch's transformer reads weights of its layers, and not their outputs."""
    tokens = torch.arange(14).view(2, 7) % 7
    model = moved(with_adapters(Tied(), rank=2)).train(training)
    names = ("once", "again", "head", "block.linear1", "block.self_attn.out_proj")
    assert all(isinstance(model.get_submodule(name), LowRankLinear) for name in names)
    assert model.once is model.again
    with torch.no_grad():
        expected = model(tokens)
        merged = merge_adapters(model)
        assert not torch.allclose(expected, Tied().train(training)(tokens), atol=0.1)
        assert torch.allclose(merged(tokens), expected, atol=1e-5)
        assert torch.equal(model(tokens), expected)  # a copy was merged
    plain = Tied().state_dict()
    assert {name: one.shape for name, one in merged.state_dict().items()} == {
        name: one.shape for name, one in plain.items()
    }
    assert torch.equal(merged.embed.weight, plain["embed.weight"])  # its other owner changed
    changed = ("block.self_attn.in_proj_weight", "once.weight", "head.weight")
    assert set(changed) < set(trained(merged))
    assert merge_adapters(merged) is merged


class Wrapper(nn.Module):
    """An adapter of another library, in the form that peft gives its layers."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer, self.added = layer, nn.Parameter(torch.ones(layer.weight.shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + functional.linear(x, self.added)  # type: ignore[no-any-return]

    def merge(self) -> None:
        self.layer.weight.data += self.added.data

    def get_base_layer(self) -> nn.Module:
        return self.layer


class Doubled(nn.Linear):
    """A layer whose output is not that of its weight."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)),
        lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6)),
        lambda: Doubled(6, 6),
    ],
)
def test_layers_with_a_computation_of_their_own_merge_to_equal_answers(
    layer: Callable[[], nn.Module],
) -> None:
    model = moved(with_adapters(nn.Sequential(layer(), nn.ReLU(), nn.Linear(6, 3)))).eval()
    inputs = torch.randn(5, 6)
    merged = merge_adapters(model)
    torch.testing.assert_close(merged(inputs), model(inputs))
    assert not any(isinstance(one, LowRankLinear) for one in merged.modules())


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_a_layer_whose_weight_a_hook_computes_gets_no_adapter() -> None:
    layer = nn.utils.weight_norm(nn.Linear(6, 6))  # type: ignore[no-untyped-call]
    model = with_adapters(nn.Sequential(layer, nn.ReLU(), nn.Linear(6, 3)))
    assert trained(model) == ["2.down.weight", "2.up.weight"]


def test_an_adapted_layer_by_itself_is_merged() -> None:
    layer = moved(with_adapters(dense()))[0]  # type: ignore[index]
    inputs = torch.randn(5, 6)
    merged = merge_adapters(layer)
    assert type(merged) is nn.Linear
    torch.testing.assert_close(merged(inputs), layer(inputs))


def test_a_model_with_adapters_is_refused_as_it_is() -> None:
    for model in (with_adapters(dense()), with_adapters(nn.MultiheadAttention(8, 2))):
        before = trained(model)
        with pytest.raises(TaskError, match="adapters already"):
            with_adapters(model)
        assert trained(model) == before


def test_adapters_of_peft_are_merged() -> None:
    model, inputs = dense().requires_grad_(False), torch.randn(5, 6)
    model[0] = Wrapper(model[0])
    merged = merge_adapters(model)
    assert type(merged[0]) is nn.Linear
    assert torch.allclose(merged(inputs), model(inputs), atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"targets": ["attn.*"]}, r"targets 'attn\.\*' matches no dense layer .* those are 0, 2\."),
        ({"trained": ["head"]}, r"trained 'head' matches no parameter of the model; .* 0\.weight"),
        ({"rank": 0}, "got rank 0, expected a whole number above 0"),
        ({"rank": 2.5}, "got rank 2.5, expected a whole number"),
        ({"rank": True}, "got rank True, expected a whole number"),
        ({"alpha": float("nan")}, "got alpha nan, expected a finite number above 0"),
        ({"alpha": float("inf")}, "got alpha inf, expected a finite number above 0"),
        ({"alpha": "16"}, "got alpha '16', expected a finite number above 0"),
        ({"targets": "*2"}, r"got targets '\*2', expected a list of patterns"),
        ({"trained": ["0.bias", 3]}, "expected a list of patterns"),
    ],
)
def test_what_fits_nothing_is_refused(arguments: dict[str, Any], said: str) -> None:
    model = dense()
    with pytest.raises(TaskError, match=said):
        with_adapters(model, **arguments)
    assert trained(model) == trained(dense())


def test_a_model_of_one_dense_layer_is_refused_before_it_changes() -> None:
    layer = nn.Linear(2, 2)
    with pytest.raises(TaskError, match=r"one dense layer, .* wrap it in nn\.Sequential"):
        with_adapters(layer)
    assert layer.weight.requires_grad


class Wide(nn.Module):
    """10 million frozen parameters, and about 10,000 that are trained."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.large = nn.Linear(6, BIG), nn.Linear(BIG, BIG)
        self.requires_grad_(False)
        self.head = nn.Linear(BIG, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.large(self.inside(x))))  # type: ignore[no-any-return]


def test_an_update_has_the_bytes_of_what_is_trained() -> None:
    found = federated(task_of(Wide, {"anna": 4}), run_of(rounds=1))
    trained = layout_of(found.model.model).size
    assert 9_000 < trained < 11_000
    assert found.federated.rounds[0].bytes_up < 60_000


@pytest.mark.parametrize("privacy", [{}, {"unit": "example", "noise_multiplier": 0.5}])
def test_a_run_trains_adapters_and_releases_a_plain_model(privacy: dict[str, Any]) -> None:
    task = task_of(lambda: with_adapters(dense(), rank=2), {"anna": 30, "ben": 40})
    privacy = privacy and {**privacy, "max_epsilon": 1000.0, "target_delta": 1e-3}
    result = fedcore.simulate(
        task,
        federation={"rounds": 2},
        client={"batch_size": 8},
        privacy=privacy,
        finetune={"epochs": 1, "max_metric_drop": 1.0},
        compression={"candidates": ["fp32"], "timing_runs": 100},
        progress=False,
    )
    assert torch.equal(result.federated.model[0].base.weight, dense()[0].weight)
    moved = result.federated.model[0].up.weight, result.model.model[2].up.weight
    assert all(bool(one.any()) for one in moved)  # in rounds, and in fine-tuning
    plain = fedcore.merge_adapters(result.model)
    inputs = torch.randn(3, 6)
    assert torch.allclose(plain(inputs), result.model(inputs), atol=1e-5)
    exported = result.compressed.files["fp32"]
    assert len(exported) < 3_000
    assert exported.count(b"MatMul") + exported.count(b"Gemm") <= 4


def test_clients_with_adapters_train_side_by_side() -> None:
    task = task_of(lambda: with_adapters(dense(), rank=2), {"anna": 30, "ben": 41, "cara": 7})
    found = {}
    for training in ("loop", "vectorised"):
        result = fedcore.simulate(
            task,
            federation={"rounds": 2},
            client={"batch_size": 8, "learning_rate": 0.03},
            simulation={"training": training},
            finetune={"epochs": 0},
            compression={"candidates": ["fp32"], "timing_runs": 100},
            progress=False,
        )
        found[training] = torch.from_numpy(pack(result.federated.model))
    assert torch.allclose(found["loop"], found["vectorised"], atol=1e-5)
