from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fedcore import Task
from fedcore.config.finetune import Finetune
from fedcore.errors import CompressionError
from fedcore.task.kinds.classification import Classification
from fedcore.task.metrics import ACCURACY
from fedcore.task.model import FullModel
from fedcore.training.batches import gather_all
from fedcore.training.evaluate import evaluate
from server.cloud import CloudData
from server.compression.prune import prune_and_recover, prune_channels
from server.compression.train_close import CloudTraining


def widths(module: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(p.shape) for name, p in module.named_parameters() if name.endswith("weight")]


def conv_model(norm: nn.Module) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        norm,
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(12 * 16, 20),
        nn.ReLU(),
        nn.Linear(20, 5),
    )


class Residual(nn.Module):
    """Both layers add into the output, so neither may shrink."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.hidden, self.two = nn.Linear(4, 3), nn.Linear(4, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) + self.two(self.hidden(x).relu())  # type: ignore[no-any-return]


class RunsOnAfterItsOutput(nn.Module):
    """The layer that runs last is not the one whose outputs are the model's."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 6), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        output = self.one(x)
        self.two(x)
        return output  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    def __init__(self, layer: Callable[..., nn.RNNBase], entry: bool) -> None:
        super().__init__()
        self.entry = nn.Linear(4, 4) if entry else nn.Identity()
        self.layer, self.head = layer(4, 6, batch_first=True), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden, _ = self.layer(self.entry(x))
        return self.head(hidden[:, -1])  # type: ignore[no-any-return]


def test_halves_hidden_widths_and_nothing_else(digits_model: FullModel) -> None:
    before = widths(digits_model)
    pruned = prune_channels(digits_model, torch.zeros(2, 64), fraction=0.5)
    assert widths(pruned) == [(128, 64), (64, 128), (10, 64)]
    assert widths(digits_model) == before == [(256, 64), (128, 256), (10, 128)]


def test_the_weakest_channels_go() -> None:
    module = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2))
    with torch.no_grad():
        module[0].weight.copy_(torch.arange(1.0, 7.0)[:, None].expand(6, 3))
        module[2].weight.fill_(1.0)
    pruned = prune_channels(module, torch.zeros(2, 3), fraction=0.5)
    assert pruned[0].weight[:, 0].tolist() == [4.0, 5.0, 6.0]


@pytest.mark.parametrize(
    "norm", [nn.Identity(), nn.GroupNorm(2, 8), nn.GroupNorm(1, 8), nn.BatchNorm2d(8)]
)
def test_convolutions_and_their_norms_shrink_together(norm: nn.Module) -> None:
    pruned = prune_channels(conv_model(norm), torch.randn(2, 1, 4, 4), fraction=0.5)
    kept = [w for w in widths(pruned) if len(w) > 1]
    assert kept == [(4, 1, 3, 3), (6, 4, 3, 3), (10, 6 * 16), (5, 10)]
    assert pruned(torch.randn(3, 1, 4, 4)).shape == (3, 5)


def test_convolutions_over_time_shrink_too() -> None:
    module = nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 6, 2))
    pruned = prune_channels(module, torch.randn(2, 3, 8), fraction=0.25)
    assert widths(pruned) == [(6, 3, 3), (2, 36)]


def test_layers_that_add_into_the_output_stay() -> None:
    pruned = prune_channels(nn.Sequential(Residual()), torch.randn(2, 4), fraction=0.5)
    assert widths(pruned) == [(3, 4), (5, 4), (3, 5)]


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.one, self.two = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.trunk(x).relu()
        return torch.cat([self.one(hidden), self.two(hidden)], dim=1)


@pytest.mark.parametrize("frozen", [False, True])
def test_no_head_loses_outputs(frozen: bool) -> None:
    module = nn.Sequential(TwoHeads().requires_grad_(not frozen))
    pruned = prune_channels(module, torch.randn(2, 4), fraction=0.5)
    assert widths(pruned) == [(4, 4), (3, 4), (6, 4)]
    assert all(each.requires_grad != frozen for each in pruned.parameters())


@pytest.mark.parametrize(
    ("module", "inputs", "reason"),
    [
        (nn.Linear(4, 3), torch.randn(2, 4), "no hidden channels"),
        (nn.ReLU(), torch.randn(2, 4), "no linear or convolutional layers"),
        (RunsOnAfterItsOutput(), torch.randn(2, 4), "no hidden channels"),
        (Recurrent(nn.GRU, False), torch.randn(2, 3, 4), "no hidden channels|cannot be pruned"),
        (Recurrent(nn.GRU, True), torch.randn(2, 3, 4), "no hidden channels|cannot be pruned"),
    ],
)
def test_what_cannot_be_pruned_is_refused_with_the_reason(
    module: nn.Module, inputs: Tensor, reason: str
) -> None:
    with pytest.raises(CompressionError, match=reason) as caught:
        prune_channels(nn.Sequential(module), inputs, fraction=0.5)
    assert "\n" not in str(caught.value)


def test_pruning_one_model_leaves_the_next_alone() -> None:
    grouped = prune_channels(conv_model(nn.GroupNorm(4, 8)), torch.randn(2, 1, 4, 4), fraction=0.5)
    plain = prune_channels(conv_model(nn.Identity()), torch.randn(2, 1, 4, 4), fraction=0.5)
    assert [w for w in widths(grouped) if len(w) > 1] == widths(plain)


def test_training_recovers_what_pruning_lost(
    digits: Task, digits_model: FullModel, digits_cloud: CloudData
) -> None:
    def pruned(epochs: int, seed: int = 0) -> FullModel:
        return prune_and_recover(
            digits_model,
            torch.zeros(2, 64),
            CloudTraining(digits_cloud.train, digits.loss_of, digits.problem, Finetune(), seed),
            fraction=0.9,
            epochs=epochs,
        )

    def accuracy(module: nn.Module) -> float:
        return evaluate(module, digits_cloud.heldout, [ACCURACY])["accuracy"]

    trained = pruned(10)
    assert accuracy(trained) > accuracy(pruned(0))
    again, other = pruned(10).state_dict(), pruned(10, seed=1).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in trained.state_dict().items())
    assert any(not torch.equal(other[name], t) for name, t in trained.state_dict().items())


def test_a_pruned_model_remembers_what_the_cloud_does_not_show(
    digits: Task, digits_model: FullModel, digits_cloud: CloudData
) -> None:
    """The cloud has the digits 0 to 4 alone; what is lost of the others is lost to clients."""
    inputs, targets = gather_all(digits_cloud.train)
    few = TensorDataset(inputs[targets < 5], targets[targets < 5])

    def accuracy(remember: float) -> float:
        pruned = prune_and_recover(
            digits_model,
            torch.zeros(2, 64),
            CloudTraining(few, digits.loss_of, digits.problem, Finetune(remember=remember), 0),
            fraction=0.5,
            epochs=10,
        )
        return evaluate(pruned, digits_cloud.heldout, [ACCURACY])["accuracy"]

    assert accuracy(0.7) > accuracy(0.0) + 0.1


def test_dropout_draws_from_the_seed_and_leaves_the_global_stream_alone() -> None:
    module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))
    examples = TensorDataset(torch.randn(20, 4), torch.randint(0, 3, (20,)))

    def pruned() -> Tensor:
        found = prune_and_recover(
            module,
            torch.zeros(2, 4),
            CloudTraining(examples, nn.functional.cross_entropy, Classification(), Finetune(), 5),
            fraction=0.5,
            epochs=2,
        )
        return found[0].weight  # type: ignore[return-value]

    state = torch.random.get_rng_state()
    one = pruned()
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(7)  # the global stream has moved on
    assert torch.equal(one, pruned())


def test_training_that_diverges_is_a_reason_not_a_crash(
    digits: Task, digits_model: FullModel, digits_cloud: CloudData
) -> None:
    with pytest.raises(CompressionError, match=r"training it .* failed: .*loss was"):
        prune_and_recover(
            digits_model,
            torch.zeros(2, 64),
            CloudTraining(
                digits_cloud.train, digits.loss_of, digits.problem, Finetune(learning_rate=1e6), 0
            ),
            fraction=0.5,
            epochs=5,
        )
