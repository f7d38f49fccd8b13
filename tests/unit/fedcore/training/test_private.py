from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset

from fedcore.config.run import ClientConfig, Privacy
from fedcore.errors import UnsupportedLayer
from fedcore.privacy.accounting import Charge, epsilon_of
from fedcore.privacy.draws import SimulatedDraws
from fedcore.privacy.planning import PrivatePlan, plan
from fedcore.seeds import torch_rng
from fedcore.task.definition import Examples, size_of
from fedcore.training.batches import gather
from fedcore.training.local import make_optimizer
from fedcore.training.per_example.gradient_methods import one_by_one
from fedcore.training.private import train_private
from tests.ways import way_of

LOSS = nn.functional.cross_entropy
EXAMPLE_DP = Privacy(unit="example", target_delta=1e-3)


def blobs(count: int = 60) -> Any:
    rng = torch_rng(0, "blobs")
    targets = torch.randint(3, (count,), generator=rng)
    return TensorDataset(
        3 * nn.functional.one_hot(targets, 6) + torch.randn(count, 6, generator=rng), targets
    )


def network(*, seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def private(
    model: nn.Module,
    examples: Examples,
    *,
    multiplier: float,
    clip: float = 1e6,
    rate: float = 0.25,
    steps: int = 12,
    settings: ClientConfig | None = None,
    **more: Any,
) -> nn.Module:
    planned = PrivatePlan(Charge(1, multiplier, rate, steps), clip_norm=clip)
    streams = {"sampling": torch_rng(1, "s"), "noise": torch_rng(1, "n")}
    streams |= {name: more.pop(name) for name in streams if name in more}
    preprocess = more.pop("preprocess", nn.Identity())
    method = more.pop("method", None) or way_of(model, LOSS, torch.zeros(6), preprocess=preprocess)
    found = more.pop("found", [])
    skipped = train_private(
        preprocess,
        model,
        examples,
        LOSS,
        settings or ClientConfig(),
        planned,
        method=method,
        draws=SimulatedDraws(**streams),
        **more,
    )
    found.append(skipped)
    return model


def poisson(examples: Examples, rate: float, steps: int) -> list[tuple[Tensor, Tensor]]:
    """The batches that `private` draws."""
    rng = torch_rng(1, "s")
    drawn = [torch.rand(size_of(examples), generator=rng) < rate for _ in range(steps)]
    return [gather(examples, mask.nonzero().flatten()) for mask in drawn]


def weights(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach()


@pytest.mark.parametrize(
    "settings",
    [
        ClientConfig(),
        ClientConfig(momentum=0.9),
        ClientConfig(optimizer="adam", learning_rate=0.01),
    ],
    ids=["sgd", "momentum", "adam"],
)
def test_without_noise_and_clipping_it_is_training_on_the_same_batches(
    settings: ClientConfig,
) -> None:
    examples, expected = blobs(), network()
    got = private(network(), examples, multiplier=1e-12, settings=settings)
    optimizer = make_optimizer(expected, settings)
    for inputs, targets in poisson(examples, 0.25, 12):
        optimizer.zero_grad()
        loss = LOSS(expected(inputs), targets, reduction="sum") / 15  # 60 examples at 1/4
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert (weights(got) - weights(expected)).abs().max() < 1e-5
    assert (weights(got) - weights(network())).abs().max() > 1e-2


def test_each_example_moves_the_weights_by_at_most_the_clipping_norm() -> None:
    examples, rate, clip = blobs(8), 1.0, 0.01
    model = private(network(), examples, multiplier=1e-12, clip=clip, rate=rate, steps=1)
    moved = (weights(model) - weights(network())).norm().item()
    bound = ClientConfig().learning_rate * clip  # the mean of 8 clipped gradients
    assert 0 < moved <= bound * (1 + 1e-5)
    alone = private(
        network(), Subset(examples, [0]), multiplier=1e-12, clip=clip, rate=rate, steps=1
    )
    assert (weights(alone) - weights(network())).norm().item() == pytest.approx(bound, rel=1e-4)


def test_an_empty_batch_is_a_step_that_releases_noise_alone() -> None:
    rate = 1e-9
    assert all(not len(targets) for _, targets in poisson(blobs(), rate, 3))
    moved = weights(private(network(), blobs(), multiplier=1.0, clip=1.0, rate=rate, steps=3))
    still = weights(private(network(), blobs(), multiplier=1e-12, clip=1.0, rate=rate, steps=3))
    assert (moved - weights(network())).abs().min() > 0
    assert torch.allclose(still, weights(network()), atol=1e-9)


def test_empty_batches_pass_layers_that_cannot_take_them() -> None:
    model = nn.Sequential(
        nn.Unflatten(1, (1, 6)),
        nn.Conv1d(1, 4, 3),
        nn.GroupNorm(2, 4),
        nn.Flatten(),
        nn.Linear(16, 3),
    )
    before = weights(model).clone()
    private(model, blobs(), multiplier=1.0, clip=1.0, rate=0.01, steps=8)
    assert torch.isfinite(weights(model)).all()
    assert not torch.equal(weights(model), before)


@pytest.mark.parametrize("stream", ["sampling", "noise"])
def test_simulated_draws_fix_every_bit(stream: str) -> None:
    one, again = (private(network(), blobs(), multiplier=1.0, clip=1.0) for _ in range(2))
    assert torch.equal(weights(one), weights(again))
    streams = {stream: torch_rng(2, "other")}
    other = private(network(), blobs(), multiplier=1.0, clip=1.0, **streams)
    assert not torch.equal(weights(one), weights(other))


def test_the_process_wide_generators_are_not_drawn_from() -> None:
    before = torch.random.get_rng_state()
    private(network(), blobs(), multiplier=1.0, clip=1.0)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_module_is_an_ordinary_one_afterwards() -> None:
    model = private(network(), blobs(), multiplier=1.0, clip=1.0)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    private(model, blobs(), multiplier=1.0, clip=1.0)  # and can be trained again


class Failing(nn.Module):
    """Fails on examples that nobody would make up."""

    def forward(self, x: Tensor) -> Tensor:
        if float(x.detach().abs().max()) > 100:
            raise ValueError("no such example")
        return x


def test_an_example_on_which_the_model_fails_counts_as_zero_and_ends_nothing() -> None:
    inputs, targets = (one.clone() for one in blobs(8).tensors)
    inputs[2] = 1000.0
    failed: Any = TensorDataset(inputs, targets)
    start = nn.Sequential(Failing(), nn.Linear(6, 3))
    model, expected = copy.deepcopy(start), copy.deepcopy(start)
    settings = ClientConfig(learning_rate=0.5)
    found: list[int] = []
    private(model, failed, multiplier=1e-12, rate=1.0, steps=1, settings=settings, found=found)
    kept = torch.arange(8) != 2
    loss = LOSS(expected(inputs[kept]), targets[kept], reduction="sum") / 8
    loss.backward()  # type: ignore[no-untyped-call]
    make_optimizer(expected, settings).step()
    assert (weights(model) - weights(expected)).abs().max() < 1e-6
    assert (weights(model) - weights(start)).abs().max() > 1e-2
    assert found == [1]
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in model.modules())


def test_a_model_that_fails_on_every_example_releases_noise_alone() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("no such shape")

    model = nn.Sequential(nn.Linear(6, 3), Broken())
    before = weights(model)
    private(model, blobs(), multiplier=1.0, clip=1.0, method=one_by_one(LOSS, why=""))
    assert torch.isfinite(weights(model)).all()
    assert not torch.equal(weights(model), before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
def test_weights_that_run_away_are_the_starts_again(value: float) -> None:
    class Wild(SimulatedDraws):
        def add_noise(self, sums: Any, *, deviation: float, bound: float) -> None:
            super().add_noise(sums, deviation=deviation, bound=bound)
            sums[0].flatten()[:2] = value

    model = network()
    draws = Wild(torch_rng(1, "s"), torch_rng(1, "n"))
    planned = PrivatePlan(Charge(1, 1.0, 0.25, 3), clip_norm=1.0)
    method = way_of(model, LOSS, torch.zeros(6))
    train_private(
        nn.Identity(), model, blobs(), LOSS, ClientConfig(), planned, method=method, draws=draws
    )
    got, start = model[0].weight.flatten(), network()[0].weight.flatten()
    assert torch.equal(got[:2], start[:2])
    assert torch.isfinite(weights(model)).all()
    assert not torch.isclose(got[2:], start[2:], rtol=0, atol=1e-9).any()


def test_preprocessing_runs_and_is_not_trained() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("factor", torch.tensor(2.0))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.factor

    scale, data = Scale(), blobs()
    scaled: Any = TensorDataset(2 * data.tensors[0], data.tensors[1])
    got = private(network(), data, multiplier=1e-12, preprocess=scale)
    assert torch.equal(weights(got), weights(private(network(), scaled, multiplier=1e-12)))
    assert scale.factor == 2.0


def test_frozen_parameters_stay_and_get_no_noise() -> None:
    model = network()
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    private(model, blobs(), multiplier=1.0, clip=1.0)
    assert torch.equal(model[0].weight, before)
    assert not torch.equal(model[2].weight, network()[2].weight)


class Remembers(nn.Module):
    """Keeps what it saw, as no layer under privacy may."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x.detach().mean(0)
        return x


def test_a_layer_that_remembers_the_data_is_found_out_before_training() -> None:
    model = nn.Sequential(Remembers(), nn.Linear(6, 3))
    before = weights(model)
    with pytest.raises(UnsupportedLayer, match=r"running it changes 0\.seen, .* or charged"):
        private(model, blobs(), multiplier=1.0)
    assert torch.equal(weights(model), before)
    assert torch.equal(model[0].seen, torch.zeros(6))


class RemembersOutliers(nn.Module):
    """Keeps large values only, which no made-up example shows; in place, or by a new tensor."""

    def __init__(self, *, where: str) -> None:
        super().__init__()
        self.where = where
        self.register_buffer("seen", torch.zeros(6))
        self.frozen = nn.Parameter(torch.zeros(6), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        if float(x.detach().abs().max()) > 100:
            if self.where == "replaced":
                self.seen = x.detach().mean(0)
            else:
                kept = self.frozen if self.where == "frozen" else self.seen
                kept.data.copy_(x.detach().mean(0))
        return x


@pytest.mark.parametrize("where", ["in place", "replaced", "frozen"])
def test_what_is_remembered_all_the_same_never_leaves(where: str) -> None:
    inputs, targets = (one.clone() for one in blobs(8).tensors)
    inputs[2] = 1000.0
    seen: Any = TensorDataset(inputs, targets)
    model = nn.Sequential(RemembersOutliers(where=where), nn.Linear(6, 3))
    before = model[1].weight.clone()
    private(model, seen, multiplier=1.0, clip=1.0, rate=1.0, steps=2)
    assert torch.equal(model.state_dict()["0.seen"], torch.zeros(6))
    assert torch.equal(model.state_dict()["0.frozen"], torch.zeros(6))
    assert not torch.equal(model[1].weight, before)


def test_the_proximal_term_is_that_of_training_without_privacy() -> None:
    examples, mu, settings = blobs(), 2.0, ClientConfig()
    got = private(network(), examples, multiplier=1e-12, proximal_mu=mu)
    expected, anchor = network(), weights(network())
    optimizer = make_optimizer(expected, settings)
    for inputs, targets in poisson(examples, 0.25, 12):
        optimizer.zero_grad()
        current = nn.utils.parameters_to_vector(expected.parameters())
        loss = LOSS(expected(inputs), targets, reduction="sum") / 15
        (loss + mu / 2 * (current - anchor).square().sum()).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert (weights(got) - weights(expected)).abs().max() < 1e-5
    free = private(network(), examples, multiplier=1e-12)
    assert (weights(got) - anchor).norm() < 0.8 * (weights(free) - anchor).norm()


def test_the_proximal_term_pulls_with_clipping_too() -> None:
    steps, clip = 40, 1e-3
    far = network(seed=1)
    settings = ClientConfig(learning_rate=0.1)
    start = weights(far).clone()
    private(far, blobs(), multiplier=100.0, clip=clip, steps=steps, settings=settings)
    held = private(
        network(seed=1),
        blobs(),
        multiplier=100.0,
        clip=clip,
        steps=steps,
        settings=settings,
        proximal_mu=5.0,
    )
    assert (weights(held) - start).norm() < 0.5 * (weights(far) - start).norm()


@pytest.mark.parametrize(
    ("count", "batch_size", "epochs", "rate", "steps"),
    [(60, 15, 1, 1 / 4, 4), (61, 15, 2, 1 / 5, 10), (10, 32, 3, 1.0, 3), (1, 1, 1, 1.0, 1)],
)
def test_the_plan_has_as_many_steps_as_batches(
    count: int, batch_size: int, epochs: int, rate: float, steps: int
) -> None:
    settings = ClientConfig(batch_size=batch_size, epochs=epochs)
    fixed = EXAMPLE_DP.model_copy(update={"noise_multiplier": 1.5, "clip_norm": 0.7})
    planned = plan(blobs(count), settings, fixed, round=4, participations=10)
    assert planned == PrivatePlan(Charge(4, 1.5, rate, steps), 0.7)


def test_automatic_noise_keeps_all_rounds_within_the_budget_and_small_clients_need_more() -> None:
    settings = ClientConfig(batch_size=10)
    large, small = (
        plan(blobs(count), settings, EXAMPLE_DP, round=1, participations=20).charge
        for count in (80, 10)
    )
    for charge in (large, small):
        rounds = [charge] * 20
        spent = epsilon_of(rounds, target_delta=1e-3, accountant="prv")
        assert 0.95 * EXAMPLE_DP.max_epsilon < spent <= EXAMPLE_DP.max_epsilon
    assert small.noise_multiplier > large.noise_multiplier
    fewer = plan(blobs(10), settings, EXAMPLE_DP, round=1, participations=2).charge
    assert fewer.noise_multiplier < small.noise_multiplier
