from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import Subset, TensorDataset

from fedcore.config.run import ClientConfig
from fedcore.errors import TrainingDiverged
from fedcore.seeds import torch_rng
from fedcore.training.local import make_optimizer, proximal, train

LOSS = nn.functional.mse_loss


def line(count: int = 64) -> Any:
    x = torch.randn(count, 3, generator=torch_rng(0, "x"))
    return TensorDataset(x, x @ torch.tensor([[1.0], [-2.0], [0.5]]))


def model() -> nn.Linear:
    linear = nn.Linear(3, 1)
    with torch.no_grad():
        linear.weight.zero_()
        linear.bias.zero_()
    return linear


def trained(settings: ClientConfig, **more: Any) -> tuple[nn.Linear, float]:
    linear = model()
    options: dict[str, Any] = {"epochs": 20, "batch_size": 8, "rng": torch_rng(1)} | more
    return linear, train(linear, line(), LOSS, settings, **options)


@pytest.mark.parametrize(
    "settings",
    [
        ClientConfig(),
        ClientConfig(momentum=0.5),
        ClientConfig(momentum=0.5, nesterov=True),
        ClientConfig(optimizer="adam", learning_rate=0.05),
        ClientConfig(optimizer="adamw", learning_rate=0.05, weight_decay=0.01),
        ClientConfig(learning_rate=0.2, max_grad_norm=1.0),
    ],
    ids=["sgd", "momentum", "nesterov", "adam", "adamw", "clipped"],
)
def test_training_finds_the_line(settings: ClientConfig) -> None:
    linear, loss = trained(settings)
    assert loss < 0.05
    assert torch.allclose(linear.weight, torch.tensor([[1.0, -2.0, 0.5]]), atol=0.2)


def test_one_step_of_sgd_is_the_textbooks() -> None:
    linear = model()
    data = line(8)
    x, y = data.tensors
    train(
        linear,
        data,
        LOSS,
        ClientConfig(learning_rate=0.1),
        epochs=1,
        batch_size=8,
        rng=torch_rng(0),
    )
    gradient = (2 * (0 - y) * x).mean(dim=0)
    assert torch.allclose(linear.weight[0], -0.1 * gradient, atol=1e-6)


def test_the_generator_fixes_every_bit() -> None:
    one, again, other = (
        trained(ClientConfig(), epochs=1, rng=torch_rng(seed))[0].weight for seed in (1, 1, 2)
    )
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_the_mean_loss_weighs_examples_and_not_batches() -> None:
    data: Any = TensorDataset(torch.zeros(5, 3), torch.tensor([[1.0]] * 4 + [[3.0]]))
    loss = train(
        model(),
        data,
        LOSS,
        ClientConfig(learning_rate=1e-12),
        epochs=1,
        batch_size=4,
        rng=torch_rng(0),
    )
    assert loss == pytest.approx((4 * 1 + 9) / 5)


def test_weight_decay_shrinks_weights() -> None:
    free, _ = trained(ClientConfig())
    decayed, _ = trained(ClientConfig(weight_decay=0.5))
    assert decayed.weight.norm() < 0.9 * free.weight.norm()


def test_the_proximal_term_holds_a_client_near_the_global_model() -> None:
    linear = model()
    held = trained(ClientConfig(), penalty=proximal(linear, 0.0))[0]
    assert torch.equal(held.weight, trained(ClientConfig())[0].weight)
    near = trained(ClientConfig(learning_rate=0.01), penalty=proximal(linear, 50.0))[0]
    assert near.weight.norm() < 0.3 * held.weight.norm()


def test_the_proximal_term_is_half_mu_times_the_squared_distance() -> None:
    linear = model()
    penalty = proximal(linear, 4.0)
    assert penalty(linear).item() == 0.0
    with torch.no_grad():
        linear.weight.fill_(1.0)
    assert penalty(linear).item() == pytest.approx(0.5 * 4.0 * 3)


def test_training_leaves_frozen_parameters_alone() -> None:
    linear = model()
    linear.bias.requires_grad_(False)
    held = [
        p for group in make_optimizer(linear, ClientConfig()).param_groups for p in group["params"]
    ]
    assert [tuple(p.shape) for p in held] == [(1, 3)]
    train(linear, line(), LOSS, ClientConfig(), epochs=1, batch_size=8, rng=torch_rng(0))
    assert linear.bias.item() == 0.0


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
def test_a_loss_that_is_not_finite_stops_training_with_the_next_step(poison: float) -> None:
    data = line()
    data.tensors[0][5, 1] = poison
    with pytest.raises(TrainingDiverged) as caught:
        train(model(), data, LOSS, ClientConfig(), epochs=2, batch_size=8, rng=torch_rng(0))
    assert "in local epoch 1 at learning_rate 0.1. No update was produced" in str(caught.value)


def test_an_input_that_is_not_finite_is_named_with_its_row() -> None:
    data = line()
    data.tensors[0][5, 1] = torch.nan
    part = Subset(data, [9, 8, 5])
    with pytest.raises(TrainingDiverged, match="row 5 of the data has an input of nan: fill"):
        train(model(), part, LOSS, ClientConfig(), epochs=1, batch_size=8, rng=torch_rng(0))


def test_a_learning_rate_that_is_too_large_is_found_out() -> None:
    with pytest.raises(TrainingDiverged, match=r"learning_rate 100\.0.*lower the learning rate"):
        trained(ClientConfig(learning_rate=100.0), epochs=50)


def test_adamw_decays_weights_apart_from_the_gradient() -> None:
    linear = model()
    with torch.no_grad():
        linear.weight.fill_(2.0)
    settings = ClientConfig(optimizer="adamw", learning_rate=0.1, weight_decay=0.5)
    optimizer = make_optimizer(linear, settings)
    linear.weight.grad, linear.bias.grad = torch.zeros(1, 3), torch.zeros(1)
    optimizer.step()
    assert torch.allclose(linear.weight, torch.full((1, 3), 2.0 * (1 - 0.1 * 0.5)))


def test_a_longer_gradient_is_scaled_to_the_bound() -> None:
    free, held = model(), model()
    for one, bound in ((free, None), (held, 0.25)):
        settings = ClientConfig(learning_rate=1.0, max_grad_norm=bound)
        train(one, line(8), LOSS, settings, epochs=1, batch_size=8, rng=torch_rng(0))
    whole = torch.cat([held.weight.flatten(), held.bias])
    direction = torch.cat([free.weight.flatten(), free.bias])
    assert whole.norm().item() == pytest.approx(0.25, rel=1e-4)
    assert torch.allclose(whole / whole.norm(), direction / direction.norm(), atol=1e-5)


@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_steps_of_whole_passes_are_these_epochs(epochs: int) -> None:
    by_epochs, loss = trained(ClientConfig(), epochs=epochs)
    by_steps, same = trained(ClientConfig(), epochs=99, steps=8 * epochs)
    assert torch.equal(by_epochs.weight, by_steps.weight)
    assert loss == same


def test_steps_end_within_a_pass() -> None:
    calls: list[int] = []
    linear, _ = trained(ClientConfig(), steps=11, between=lambda: calls.append(1))
    assert len(calls) == 11
    assert not torch.equal(linear.weight, trained(ClientConfig(), steps=12)[0].weight)


@pytest.mark.parametrize("physical", [1, 3, 7, 8, 50])
@pytest.mark.parametrize("mu", [0.0, 5.0])
def test_a_batch_in_parts_gives_the_gradient_of_the_whole(physical: int, mu: float) -> None:
    def once(**more: Any) -> tuple[nn.Linear, float]:
        settings, penalty = ClientConfig(momentum=0.5), proximal(model(), mu)
        return trained(settings, epochs=2, batch_size=8, penalty=penalty, **more)

    (whole, loss), (parts, same) = once(), once(physical_batch_size=physical)
    assert torch.allclose(whole.weight, parts.weight, atol=1e-6)
    assert loss == pytest.approx(same, rel=1e-5)
    assert torch.equal(whole.weight, parts.weight) or physical < 8


def test_no_part_has_more_examples_than_allowed() -> None:
    sizes: list[int] = []

    def noting(output: Any, target: Any) -> Any:
        sizes.append(len(target))
        return LOSS(output, target)

    settings = ClientConfig()
    options: dict[str, Any] = {"epochs": 1, "batch_size": 20, "rng": torch_rng(0)}
    train(model(), line(), noting, settings, physical_batch_size=8, **options)
    assert sizes == [8, 8, 4] * 3 + [4]
