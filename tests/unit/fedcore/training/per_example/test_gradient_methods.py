"""Every way gives the gradients of batches of one, and so does Opacus where it can."""

from __future__ import annotations

import copy

import pytest
import torch
from opacus import GradSampleModule
from torch import Tensor, nn

from fedcore.training.per_example.chain import torch_run
from fedcore.training.per_example.gradient_methods import (
    GradientMethod,
    chain_method,
    is_mappable,
    one_by_one,
    preprocess_each,
    trainable_parameters,
    vmap_method,
)
from fedcore.training.per_example.graph import find_chain
from fedcore.training.per_example.runs import compiled_run
from tests.unit.fedcore.training.per_example.networks import NETWORKS, Network
from tests.ways import way_of, weighted

COUNT = 6


def by_hand(network: Network, model: nn.Module, count: int = COUNT) -> list[Tensor]:
    """Each example's own gradient: a tensor ``(B, ...)`` for each trained parameter."""
    inputs, targets = network.examples(count)
    each = []
    for place in range(count):
        one = slice(place, place + 1)
        parameters = list(trainable_parameters(model).values())
        loss = network.loss(model(inputs[one]), targets[one])
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        each.append(
            [
                torch.zeros_like(p) if gradient is None else gradient
                for p, gradient in zip(parameters, found, strict=True)
            ]
        )
    return [torch.stack(one) for one in zip(*each, strict=True)]


def check_same(
    way: GradientMethod, network: Network, model: nn.Module, expected: list[Tensor]
) -> None:
    """Norms, each gradient and sums of them, relative to the longest gradient."""
    inputs, targets = network.examples(COUNT)
    part = way.compute(nn.Identity(), model, inputs, targets)
    lengths = torch.stack([one.flatten(1).norm(dim=1) for one in expected]).norm(dim=0)
    assert part.usable.all()
    assert torch.allclose(part.squares.sqrt().float(), lengths, rtol=1e-5)
    shares = [*torch.eye(COUNT), torch.linspace(-1, 2, COUNT)]
    for share in shares:
        right = [torch.tensordot(share, one, dims=1) for one in expected]
        for one, other in zip(weighted(part, model, share), right, strict=True):
            assert one.shape == other.shape
            assert (one - other).abs().max() <= 1e-5 * lengths.max()


@pytest.mark.parametrize("name", NETWORKS)
def test_the_way_that_is_found_gives_gradients_of_batches_of_one(name: str) -> None:
    network = NETWORKS[name]
    model = network.build()
    way = way_of(model, network.loss, network.examples(1)[0][0])
    assert way.name == network.way
    assert bool(way.why) == (way.name != "chain")
    check_same(way, network, model, by_hand(network, model))


@pytest.mark.parametrize("name", NETWORKS)
def test_all_ways_agree(name: str) -> None:
    network = NETWORKS[name]
    model = network.build()
    expected = by_hand(network, model)
    ways = [one_by_one(network.loss, why=""), vmap_method(1, network.loss, why="")]
    if network.way == "chain":
        chain = find_chain(model, network.examples(2)[0])
        assert chain is not None
        runs = [torch_run(chain), compiled_run(chain, model, per_example=True)]
        ways += [chain_method(chain, run, network.loss) for run in runs if run is not None]
    for way in ways:
        check_same(way, network, model, expected)


@pytest.mark.parametrize("name", [name for name, one in NETWORKS.items() if one.opacus])
def test_opacus_agrees(name: str) -> None:
    network = NETWORKS[name]
    model = network.build()
    wrapped = GradSampleModule(copy.deepcopy(model), loss_reduction="mean")
    inputs, targets = network.examples(COUNT)
    loss = network.loss(wrapped(inputs), targets)
    loss.backward()  # type: ignore[no-untyped-call]
    expected = [p.grad_sample for p in wrapped.parameters() if p.requires_grad]
    way = way_of(model, network.loss, inputs[0])
    check_same(way, network, model, expected)


def test_a_gradient_of_a_parameter_that_is_not_used_is_zero() -> None:
    network = NETWORKS["unused"]
    model = network.build()
    for way in (one_by_one(network.loss, why=""), vmap_method(1, network.loss, why="")):
        part = way.compute(nn.Identity(), model, *network.examples(COUNT))
        found = dict(
            zip(trainable_parameters(model), weighted(part, model, torch.ones(COUNT)), strict=True)
        )
        assert not found["other.weight"].any()
        assert found["head.weight"].any()


def test_a_tied_parameter_has_one_gradient_with_both_its_uses() -> None:
    model = NETWORKS["tied"].build()
    assert list(trainable_parameters(model)) == ["words.weight", "mix.weight", "mix.bias"]


def test_nothing_of_the_model_changes_and_no_hook_stays() -> None:
    for name in ("dense", "attention", "gru", "lstm"):
        network = NETWORKS[name]
        model = network.build()
        before = copy.deepcopy(model.state_dict())
        way = way_of(model, network.loss, network.examples(1)[0][0])
        way.compute(nn.Identity(), model, *network.examples(COUNT))
        assert all(torch.equal(now, before[key]) for key, now in model.state_dict().items())
        assert all(p.grad is None for p in model.parameters())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_dropout_draws_for_each_example_by_itself() -> None:
    model = nn.Sequential(nn.Linear(6, 200, bias=False), nn.Dropout(0.5), nn.Linear(200, 1))

    def of_outputs(outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.mean()

    inputs = torch.ones(2, 6)
    way = vmap_method(1, of_outputs, why="")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        part = way.compute(nn.Identity(), model.train(), inputs, torch.zeros(2))
    dropped = [weighted(part, model, share)[1].flatten() == 0 for share in torch.eye(2)]
    assert all(60 < int(one.sum()) < 140 for one in dropped)
    assert 60 < int((dropped[0] != dropped[1]).sum()) < 140


class Normalise(nn.Module):
    """Preprocessing of one example by its own numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return x / x.abs().amax(1, keepdim=True)


class Loops(nn.Module):
    """Preprocessing that vmap cannot take."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([row / max(row.abs().tolist()) for row in x])


@pytest.mark.parametrize("preprocess", [Normalise(), Loops()], ids=["mapped", "looped"])
def test_preprocessing_runs_on_each_example_alone(preprocess: nn.Module) -> None:
    network = NETWORKS["dense"]
    model, (inputs, targets) = network.build(), network.examples(COUNT)
    mapped = is_mappable(preprocess, inputs)
    assert mapped == isinstance(preprocess, Normalise)
    expected = inputs / inputs.abs().amax(1, keepdim=True)
    assert torch.allclose(preprocess_each(preprocess, inputs, mapped=mapped), expected)
    way = way_of(model, network.loss, inputs[0], preprocess=preprocess)
    shares = torch.ones(COUNT)
    found = weighted(way.compute(preprocess, model, inputs, targets), model, shares)
    right = weighted(way.compute(nn.Identity(), model, expected, targets), model, shares)
    for one, other in zip(found, right, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_rows_of_a_physical_batch_follow_the_memory() -> None:
    way = vmap_method(1000, nn.functional.cross_entropy, why="")
    assert way.rows(way.bytes_per_example * 7) == 7
    assert way.rows(1) == 1
    assert one_by_one(nn.functional.cross_entropy, why="").rows(1 << 40) == 1
