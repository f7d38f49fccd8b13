from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

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
        ClientConfig(optimizer="adam", learning_rate=0.05),
    ],
    ids=["sgd", "momentum", "adam"],
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


def test_a_learning_rate_that_is_too_large_is_found_out() -> None:
    with pytest.raises(TrainingDiverged, match=r"learning_rate 100\.0.*lower the learning rate"):
        trained(ClientConfig(learning_rate=100.0), epochs=50)
