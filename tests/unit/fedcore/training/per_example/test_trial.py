"""Which models and losses are refused before anything is charged, and which way others take."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from fedcore.config.run import ClientConfig
from fedcore.errors import PrivacyError, UnsupportedLayer
from fedcore.privacy.accounting import Charge
from fedcore.privacy.draws import SimulatedDraws
from fedcore.privacy.planning import PrivatePlan
from fedcore.seeds import torch_rng
from fedcore.task.definition import Examples, Loss
from fedcore.task.kinds.registry import KindName
from fedcore.task.model import FullModel
from fedcore.training.per_example.trial import synthetic_examples
from fedcore.training.private import train_private
from tests import ways
from tests.unit.fedcore.training.per_example.networks import NETWORKS
from tests.ways import task_of, way_of

CROSS_ENTROPY = functional.cross_entropy


class Applies(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def dense(*between: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), *between, nn.Linear(8, 3))


class Told(nn.Module):
    """Attention, an LSTM and a bag of tokens: torch has no batching rule for any of them."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(5, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.memory = nn.LSTM(8, 4, batch_first=True)
        self.head = nn.Linear(12, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        words = self.bag(tokens).unsqueeze(1).repeat(1, 4, 1)
        last = self.memory(words)[0][:, -1]
        return cast(Tensor, self.head(torch.cat([self.block(words).mean(1), last], dim=1)))


def test_torch_says_nothing_of_its_own_batching_and_of_made_up_examples() -> None:
    rng = torch_rng(0, "told")
    inputs = torch.randint(5, (12, 6), generator=rng)
    targets = torch.randint(3, (12,), generator=rng)
    model = Told()
    settings = ClientConfig(device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        method = way_of(model, CROSS_ENTROPY, inputs[0])
        assert method.name == "vmap"
        train_private(
            nn.Identity(),
            model,
            cast(Examples, TensorDataset(inputs, targets)),
            CROSS_ENTROPY,
            settings,
            PrivatePlan(Charge(1, 1.0, 0.5, 2), clip_norm=1.0),
            method=method,
            draws=SimulatedDraws(sampling=rng, noise=rng),
        )
        # The targets that are tried first do not fit: torch would say so, of nobody's numbers.
        column = nn.Sequential(nn.Linear(6, 1))
        way_of(column, lambda o, t: ((o - t.view(-1, 1)) ** 2).mean(), torch.zeros(6))
        way_of(column, functional.mse_loss, torch.zeros(6))


MIXING: dict[str, Callable[[Tensor], Tensor]] = {
    "centred": lambda h: h - h.mean(0),
    "batch norm": lambda h: functional.batch_norm(h, None, None, training=True),
    "over the count": lambda h: h / len(h),
    "sorted": lambda h: h.sort(0).values,
    "shifted": lambda h: h + h.roll(1, 0),
    "attention across": lambda h: torch.softmax(h @ h.t(), -1) @ h,
    "flipped": lambda h: h.flip(0),
}


@pytest.mark.parametrize("name", MIXING)
def test_a_model_that_mixes_examples_is_refused(name: str) -> None:
    with pytest.raises(UnsupportedLayer, match=r"(other examples|of one fails).* or charged"):
        way_of(dense(Applies(MIXING[name])), CROSS_ENTROPY, torch.zeros(6))


@pytest.mark.parametrize("name", MIXING)
def test_preprocessing_that_mixes_examples_is_refused(name: str) -> None:
    with pytest.raises(UnsupportedLayer, match=r"preprocess: .*(other examples|of one fails)"):
        way_of(dense(), CROSS_ENTROPY, torch.zeros(6), preprocess=Applies(MIXING[name]))


APART: dict[str, Callable[[Tensor], Tensor]] = {
    "rows as a batch": lambda h: h.reshape(-1, 2).square().reshape(-1, 8),
    "positions": lambda h: h + torch.arange(8.0),
    "own norm": lambda h: h / (1 + h.norm(dim=1, keepdim=True)),
    "own order": lambda h: h.sort(1).values,
}


@pytest.mark.parametrize("name", APART)
def test_a_model_that_treats_examples_apart_is_taken(name: str) -> None:
    method = way_of(dense(Applies(APART[name])), CROSS_ENTROPY, torch.zeros(6))
    assert method.name == ("chain" if name == "rows as a batch" else "vmap")


def weighted(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, targets, weight=torch.tensor([1.0, 20.0, 100.0]))


def masked(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, targets, ignore_index=1)


def rooted(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.mse_loss(outputs, targets).sqrt()


def summed(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, targets, reduction="sum")


def divided(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, targets, reduction="sum") / 32


def ranked(outputs: Tensor, targets: Tensor) -> Tensor:
    scores = outputs[:, 0]
    return (1 - (scores[:, None] - scores[None, :])).square().mean()


def relative(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().mean() / targets.square().mean()


@pytest.mark.parametrize(
    ("loss", "kind"),
    [
        *((one, "classification") for one in (weighted, masked, summed, divided, ranked)),
        *((one, "regression") for one in (rooted, relative)),
    ],
)
def test_a_loss_that_is_no_mean_over_examples_is_refused_with_the_remedy(
    loss: Loss, kind: KindName
) -> None:
    with pytest.raises(PrivacyError, match=r"not the mean of the losses.*reduction='none'"):
        way_of(dense(), loss, torch.zeros(6), kind)


def own_weights(outputs: Tensor, targets: Tensor) -> Tensor:
    weights = torch.tensor([1.0, 20.0, 100.0])[targets]
    return (weights * functional.cross_entropy(outputs, targets, reduction="none")).mean()


def multi_label(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.binary_cross_entropy_with_logits(outputs, targets)


@pytest.mark.parametrize(
    ("loss", "kind"),
    [
        (CROSS_ENTROPY, "classification"),
        (own_weights, "classification"),
        (nn.CrossEntropyLoss(label_smoothing=0.1), "classification"),
        (functional.mse_loss, "regression"),
        (functional.smooth_l1_loss, "regression"),
        (multi_label, "classification"),
    ],
)
def test_a_loss_that_is_a_mean_is_taken(loss: Loss, kind: KindName) -> None:
    assert way_of(dense(), loss, torch.zeros(6), kind).name == "chain"


def test_a_batch_of_one_that_fails_is_refused() -> None:
    def two(h: Tensor) -> Tensor:
        if len(h) < 2:
            raise ValueError("expected more than 1 value per channel")
        return h

    with pytest.raises(UnsupportedLayer, match=r"a batch of one fails: ValueError: expected more"):
        way_of(dense(Applies(two)), CROSS_ENTROPY, torch.zeros(6))


class InTraining(nn.Module):
    """Does in training what it does not in evaluation."""

    def __init__(self, does: str) -> None:
        super().__init__()
        self.does = does
        self.register_buffer("seen", torch.zeros(8))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("flag", torch.zeros((), dtype=torch.bool))
        self.frozen = nn.Parameter(torch.zeros(8), requires_grad=False)
        self.free = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            if self.does == "seen":
                self.seen.mul_(0.9).add_(x.detach().mean(0))
            if self.does == "replaces seen":
                self.seen = x.detach().mean(0)
            if self.does == "count":
                self.count += len(x)
            if self.does == "flag":
                self.flag.fill_(True)
            if self.does == "frozen":
                self.frozen.data.add_(x.detach().mean(0))
            if self.does == "free":
                self.free.data.add_(x.detach().mean(0))
            if self.does == "fails" and len(x) < 2:
                raise ValueError("expected more than 1 value per channel")
        return x * self.free


@pytest.mark.parametrize("loss", [CROSS_ENTROPY, lambda o, t: o.sum() * float("nan")])
@pytest.mark.parametrize("does", ["seen", "replaces seen", "count", "flag", "frozen", "free"])
def test_a_layer_that_keeps_statistics_in_training_is_refused_and_left_as_it_was(
    does: str, loss: Loss
) -> None:
    model = dense(InTraining(does))
    before = copy.deepcopy(model.state_dict())
    name = does.removeprefix("replaces ")
    with pytest.raises(UnsupportedLayer, match=rf"running it changes 1\.{name}, .* or charged"):
        way_of(model, loss, torch.zeros(6))
    assert all(torch.equal(now, before[key]) for key, now in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_a_layer_that_takes_no_batch_of_one_in_training_is_refused() -> None:
    with pytest.raises(UnsupportedLayer, match="in training mode a batch of one fails"):
        way_of(dense(InTraining("fails")), CROSS_ENTROPY, torch.zeros(6))


@pytest.mark.parametrize("mode", [True, False])
def test_a_model_is_as_before(mode: bool) -> None:
    for network in NETWORKS.values():
        model = network.build().train(mode)
        before = copy.deepcopy(model.state_dict())
        held = dict(model.named_parameters())
        way_of(model, network.loss, network.examples(1)[0][0])
        assert all(torch.equal(now, before[key]) for key, now in model.state_dict().items())
        assert all(one.training == mode for one in model.modules())
        assert all(held[name] is now for name, now in model.named_parameters())


def test_weights_that_are_no_numbers_are_no_reason_to_refuse_a_buffer() -> None:
    model = dense(InTraining("nothing"))
    with torch.no_grad():
        model[1].seen.fill_(float("nan"))
    assert way_of(model, CROSS_ENTROPY, torch.zeros(6)).name == "vmap"


def test_what_vmap_cannot_take_is_taken_one_by_one_and_says_why() -> None:
    def looks(h: Tensor) -> Tensor:
        return h * (2 if float(h.detach().sum()) > 1e9 else 1)

    method = way_of(dense(Applies(looks)), CROSS_ENTROPY, torch.zeros(6))
    assert method.name == "alone"
    assert "torch cannot compute all gradients at once" in method.why


def test_a_loss_for_targets_of_its_own_is_taken_one_by_one() -> None:
    def odd(outputs: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(outputs, targets[:, 0, 0])

    method = way_of(dense(), odd, torch.zeros(6))
    assert method.name == "alone"
    assert "accepts none of the targets" in method.why


def test_hooks_keep_a_model_from_being_read_as_a_chain() -> None:
    model = dense()
    model[0].register_forward_hook(lambda module, args, output: 2 * output)
    method = way_of(model, CROSS_ENTROPY, torch.zeros(6))
    assert method.name == "vmap"
    inputs, targets = torch.randn(4, 6, generator=torch_rng(0)), torch.arange(4) % 3
    part = method.compute(nn.Identity(), model, inputs, targets)
    found = ways.weighted(part, model, torch.full((4,), 0.25))
    torch.autograd.backward(CROSS_ENTROPY(model(inputs), targets))
    for one, parameter in zip(found, model.parameters(), strict=True):
        assert parameter.grad is not None
        assert torch.allclose(one, parameter.grad, atol=1e-6)


@pytest.mark.parametrize("example", [torch.zeros(5).long(), torch.zeros(5).int()])
def test_made_up_words_are_those_of_the_table(example: Tensor) -> None:
    model = FullModel(nn.Identity(), nn.Sequential(nn.Embedding(11, 3), nn.Flatten()))
    tried = synthetic_examples(task_of(model, CROSS_ENTROPY, example), model, 200)
    assert tried.inputs.dtype == example.dtype
    assert sorted(tried.inputs.unique().tolist()) == list(range(11))
    again = synthetic_examples(task_of(model, CROSS_ENTROPY, example), model, 200)
    assert torch.equal(tried.inputs, again.inputs)


def test_made_up_targets_fit_the_kind() -> None:
    model = FullModel(nn.Identity(), dense())
    task = task_of(model, CROSS_ENTROPY, torch.zeros(6))
    assert synthetic_examples(task, model, 9).targets is not None
    assert synthetic_examples(task, model, 9).targets.tolist() == [0, 1, 2] * 3  # type: ignore[union-attr]
    numbers = synthetic_examples(
        task_of(model, functional.mse_loss, torch.zeros(6), "regression"), model
    )
    assert numbers.targets is not None
    assert numbers.targets.shape == (8, 3)
