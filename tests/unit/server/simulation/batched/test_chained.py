"""Dense clients trained by batched products learn what each would have learnt alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from fedcore.config.run import ClientConfig
from fedcore.privacy.accounting import Charge
from fedcore.privacy.draws import FLOAT_MARGIN, SimulatedDraws
from fedcore.privacy.planning import PrivatePlan
from fedcore.seeds import torch_rng
from fedcore.task.definition import Examples, Loss
from fedcore.task.kinds.registry import KindName
from fedcore.task.model import FullModel
from fedcore.training.local import proximal, train
from fedcore.training.per_example.chain import Chain, Run, torch_run
from fedcore.training.per_example.cpu import kernel_run
from fedcore.training.per_example.graph import find_chain
from fedcore.training.private import train_private
from fedcore.updates.pack import pack
from server.simulation.batched.chained import train_chained
from server.simulation.batched.work import LocalWork, PrivateWork
from tests.ways import way_of

Make = Callable[[int, torch.Generator], Examples]


def classify(count: int, rng: torch.Generator) -> Examples:
    inputs = torch.randn(count, 6, generator=rng)
    return TensorDataset(inputs, inputs[:, :3].argmax(1))  # type: ignore[return-value]


def images(count: int, rng: torch.Generator) -> Examples:
    inputs = torch.randn(count, 1, 2, 3, generator=rng)
    return TensorDataset(inputs, inputs.flatten(1)[:, :3].argmax(1))  # type: ignore[return-value]


def photos(count: int, rng: torch.Generator) -> Examples:
    inputs = torch.randn(count, 2, 9, 8, generator=rng)
    return TensorDataset(inputs, inputs.mean(dim=(2, 3)).argmax(1))  # type: ignore[return-value]


def regress(count: int, rng: torch.Generator) -> Examples:
    inputs = torch.randn(count, 6, generator=rng)
    return TensorDataset(inputs, inputs.sum(1))  # type: ignore[return-value]


def borders(count: int, rng: torch.Generator) -> Examples:
    inputs = torch.randn(count, 2, 6, 6, generator=rng)
    return TensorDataset(inputs, inputs[:, :1, 2:, 1:-1])  # type: ignore[return-value]


def squared(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.mse_loss(output.reshape(target.shape), target)


def of_sums(output: Tensor, target: Tensor) -> Tensor:
    """Whose slopes are one number for all outputs of an example."""
    return nn.functional.mse_loss(output.sum(1), target)


def of_lengths(output: Tensor, target: Tensor) -> Tensor:
    """Whose slopes are no numbers where the outputs are nought."""
    return squared(torch.sqrt((output**2).sum(1)), target)


class Residual(nn.Module):
    """As a user writes a model: layers in the constructor, functions on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6, bias=False)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        x = x + functional.relu(self.first(x))
        return self.head(torch.tanh(self.second(x)) * 0.5)


class Photos(nn.Module):
    """Convolutions by functions, with a way around one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 9, 3, padding=1)
        self.second = nn.Conv2d(9, 9, (3, 1), padding=(1, 0), bias=False)
        self.head = nn.Linear(9 * 4 * 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.max_pool2d(functional.relu(self.first(x)), 2)
        x = functional.max_pool2d(x + torch.tanh(self.second(x)), (1, 2))
        return self.head(torch.flatten(x, 1))


torch.manual_seed(0)  # what the nets below start from
CASES: dict[str, tuple[nn.Module, Make, Loss]] = {
    "one layer": (nn.Linear(6, 3), classify, functional.cross_entropy),
    "no bias": (nn.Linear(6, 3, bias=False), classify, nn.CrossEntropyLoss()),
    "in place": (
        nn.Sequential(nn.Flatten(), nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 3)),
        images,
        functional.cross_entropy,
    ),
    "residual": (Residual(), classify, functional.cross_entropy),
    "regression": (nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)), regress, squared),
    "smoothed": (
        nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3)),
        classify,
        nn.CrossEntropyLoss(label_smoothing=0.1),
    ),
    "cnn": (
        nn.Sequential(
            *(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.MaxPool2d(2)),  # leaves a row out
            *(nn.Conv2d(8, 6, 2, bias=False), nn.ReLU(inplace=True), nn.Flatten()),
            *(nn.Linear(24, 5), nn.ReLU(), nn.Linear(5, 3)),
        ),
        photos,
        functional.cross_entropy,
    ),
    "strided": (
        nn.Sequential(
            *(nn.Conv2d(2, 10, 3, stride=(2, 1), padding=2), nn.MaxPool2d((2, 3)), nn.ELU()),
            *(nn.Conv2d(10, 16, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Conv2d(16, 4, 1), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        ),
        photos,
        functional.cross_entropy,
    ),
    "letters": (
        nn.Sequential(
            *(nn.Conv2d(2, 8, 3, padding=1), nn.MaxPool2d(2), nn.ReLU()),
            *(nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Identity()),
            *(nn.Flatten(), nn.Linear(48, 9), nn.ReLU(), nn.Linear(9, 3)),
        ),
        photos,
        functional.cross_entropy,
    ),
    "one convolution": (nn.Conv2d(2, 1, 3), borders, squared),
    "length": (nn.Linear(6, 2, bias=False), regress, of_lengths),  # no number where rows pad
    "photos": (Photos(), photos, functional.cross_entropy),
    "sums": (nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)), regress, of_sums),
}
STRAIGHT = ("cnn", "strided", "letters", "one convolution")
"""Those that kernels run; torch runs all."""
SPOILT = (float("nan"), float("inf"))


def torchs(chain: Chain, settings: ClientConfig, private: bool) -> Run | None:
    return torch_run(chain)


def kernels(chain: Chain, settings: ClientConfig, private: bool) -> Run | None:
    return kernel_run(chain, per_example=private)


WAYS = [(name, torchs) for name in CASES] + [(name, kernels) for name in STRAIGHT]
NAMED = [f"{name}-{method.__name__}" for name, method in WAYS]
Way = Callable[[Chain, ClientConfig, bool], Run | None]
SIZES = (20, 20, 13, 1, 20, 7, 10)
SETTINGS = [
    ClientConfig(batch_size=5, learning_rate=0.1),
    ClientConfig(batch_size=5, learning_rate=0.1, weight_decay=0.05, epochs=2),
    ClientConfig(batch_size=8, learning_rate=0.01, momentum=0.9, weight_decay=0.01, epochs=3),
    ClientConfig(batch_size=8, learning_rate=0.01, optimizer="adam", epochs=2),
]
IDS = ["sgd", "decay", "momentum", "adam"]
MORE = [
    ClientConfig(batch_size=8, learning_rate=0.01, optimizer="adamw", weight_decay=0.1),
    ClientConfig(batch_size=5, momentum=0.9, nesterov=True, weight_decay=0.01, steps=7),
    ClientConfig(batch_size=5, max_grad_norm=0.3, steps=3),
    ClientConfig(batch_size=8, max_grad_norm=0.1, epochs=2),
]
MORE_IDS = ["adamw", "nesterov, by steps", "clipped, in one pass", "clipped"]


def work_of(
    make: Make, sizes: Sequence[int], private: Callable[[int], PrivateWork | None]
) -> list[LocalWork]:
    return [
        LocalWork(
            make(size, torch_rng(0, "data", place)),
            lambda place=place: torch_rng(0, "order", place),  # type: ignore[misc]
            private(place),
        )
        for place, size in enumerate(sizes)
    ]


def chain_of(
    model: FullModel, example: Tensor, method: Way, settings: ClientConfig, *, private: bool = False
) -> tuple[Chain, Run]:
    chain = find_chain(model.model, example.unsqueeze(0))
    assert chain is not None
    run = method(chain, settings, private)
    assert run is not None
    return chain, run


def distance(alone: nn.Module, weights: Tensor, before: Tensor) -> float:
    """Of the update, relative to its own length."""
    expected = torch.from_numpy(pack(alone))
    moved = (expected - before).norm().item()
    assert moved > 0
    return (expected - weights).norm().item() / moved


def _check_alone(name: str, method: Way, settings: ClientConfig, mu: float) -> None:
    net, make, loss = CASES[name]
    model = FullModel(nn.Identity(), copy.deepcopy(net))
    before = torch.from_numpy(pack(model.model))
    work = work_of(make, SIZES, lambda place: None)
    chain, run = chain_of(model, work[0].examples[0][0], method, settings)
    together = train_chained(model, chain, work, loss, settings, proximal_mu=mu, run=run)
    assert torch.equal(torch.from_numpy(pack(model.model)), before)
    for place, one in enumerate(work):
        alone = copy.deepcopy(model)
        value = train(
            alone,
            one.examples,
            loss,
            settings,
            epochs=settings.epochs,
            batch_size=settings.batch_size,
            steps=settings.steps,
            rng=one.order(),
            penalty=proximal(alone.model, mu) if mu else None,
        )
        assert distance(alone.model, together.weights[place], before) <= 1e-5
        assert together.losses[place] == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize(("name", "method"), WAYS, ids=NAMED)
@pytest.mark.parametrize("settings", SETTINGS, ids=IDS)
@pytest.mark.parametrize("mu", [0.0, 0.5])
def test_each_learns_what_it_would_alone(
    name: str, method: Way, settings: ClientConfig, mu: float
) -> None:
    _check_alone(name, method, settings, mu)


@pytest.mark.parametrize(
    ("name", "method"), [("residual", torchs), ("cnn", torchs), ("cnn", kernels)]
)
@pytest.mark.parametrize("settings", MORE, ids=MORE_IDS)
def test_each_learns_alone_with_any_optimiser(
    name: str, method: Way, settings: ClientConfig
) -> None:
    _check_alone(name, method, settings, 0.5)


@pytest.mark.parametrize(
    ("name", "method"),
    WAYS,
)
@pytest.mark.parametrize("settings", SETTINGS, ids=IDS)
@pytest.mark.parametrize("noise", [0.7, 1e-9], ids=["noise", "no noise"])
@pytest.mark.parametrize("mu", [0.0, 0.5])
def test_each_learns_with_privacy_what_it_would_alone(
    name: str, method: Way, settings: ClientConfig, noise: float, mu: float
) -> None:
    net, make, loss = CASES[name]
    model = FullModel(nn.Identity(), copy.deepcopy(net))
    before = torch.from_numpy(pack(model.model))

    def private(place: int) -> PrivateWork:
        steps = -(-SIZES[place] // settings.batch_size)
        charge = Charge(1, noise, 1 / steps, steps * settings.epochs)
        return PrivateWork(
            PrivatePlan(charge, clip_norm=0.5), lambda device: torch_rng(0, "noise", place)
        )

    work = work_of(make, SIZES, private)
    chain, run = chain_of(model, work[0].examples[0][0], method, settings, private=True)
    together = train_chained(model, chain, work, loss, settings, proximal_mu=mu, run=run)
    kind: KindName = (
        "regression" if work[0].examples[0][1].is_floating_point() else "classification"
    )
    found = way_of(model.model, loss, work[0].examples[0][0], kind)
    for place, one in enumerate(work):
        assert one.private is not None
        alone = copy.deepcopy(model)
        train_private(
            alone.preprocess,
            alone.model,
            one.examples,
            loss,
            settings,
            one.private.plan,
            method=found,
            draws=SimulatedDraws(one.order(), one.private.noise(torch.device("cpu"))),
            proximal_mu=mu,
        )
        assert distance(alone.model, together.weights[place], before) <= 1e-5
    assert together.losses == [None] * len(work)


@pytest.mark.parametrize(
    ("name", "method"), [("residual", torchs), ("cnn", torchs), ("cnn", kernels)]
)
def test_one_client_alone_leaves_the_global_model_as_it_was(name: str, method: Way) -> None:
    net, make, loss = CASES[name]
    model = FullModel(nn.Identity(), copy.deepcopy(net))
    before = torch.from_numpy(pack(model.model))
    work = work_of(make, [9], lambda place: None)
    chain, run = chain_of(model, work[0].examples[0][0], method, SETTINGS[0])
    trained = train_chained(model, chain, work, loss, SETTINGS[0], proximal_mu=0.0, run=run)
    assert torch.equal(torch.from_numpy(pack(model.model)), before)
    assert not torch.equal(trained.weights[0], before)


@pytest.mark.parametrize(
    ("name", "method"),
    [each for each in WAYS if each[0] in ("residual", "strided", "one layer", "one convolution")],
)
def test_a_step_of_an_empty_batch_is_one_of_noise(name: str, method: Way) -> None:
    net, make, loss = CASES[name]
    model = FullModel(nn.Identity(), copy.deepcopy(net))
    before = torch.from_numpy(pack(model.model))
    plan = PrivatePlan(Charge(1, 0.7, 1e-6, 2), clip_norm=0.5)  # so rare that nobody is drawn
    work = work_of(make, [3], lambda place: PrivateWork(plan, lambda device: torch_rng(1)))
    chain, run = chain_of(model, work[0].examples[0][0], method, SETTINGS[0], private=True)
    trained = train_chained(model, chain, work, loss, SETTINGS[0], proximal_mu=0.0, run=run)
    rng, deviation = torch_rng(1), 0.7 * 0.5 * (1 + FLOAT_MARGIN)
    steps = [
        torch.cat(
            [torch.normal(0, deviation, p.shape, generator=rng).flatten() for p in net.parameters()]
        )
        for _ in range(2)
    ]
    moved = -SETTINGS[0].learning_rate * torch.stack(steps).sum(0)
    assert torch.allclose(trained.weights[0] - before, moved, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "method", "value"),
    [
        ("regression", torchs, float("nan")),
        *(("strided", method, value) for method in (torchs, kernels) for value in SPOILT),
    ],
)
def test_a_client_that_diverges_does_not_take_others_with_it(
    name: str, method: Way, value: float
) -> None:
    net, make, loss = CASES[name]
    model = FullModel(nn.Identity(), copy.deepcopy(net))
    good = make(4, torch_rng(0))
    inputs = torch.stack([good[place][0] for place in range(4)])
    targets = torch.stack([good[place][1] for place in range(4)])
    inputs[3, ..., 0] = value
    data: list[Examples] = [good, TensorDataset(inputs, targets)]  # type: ignore[list-item]
    work = [LocalWork(one, lambda: torch_rng(0)) for one in data]
    chain, run = chain_of(model, inputs[0], method, SETTINGS[0])
    settings = ClientConfig(batch_size=4)
    trained = train_chained(model, chain, work, loss, settings, proximal_mu=0.0, run=run)
    told, lost = trained.losses
    assert torch.isfinite(trained.weights[0]).all()
    assert told == told
    assert lost != lost


@pytest.mark.parametrize("name", sorted(set(CASES) - set(STRAIGHT)))
def test_kernels_leave_what_branches_or_has_no_convolution_to_torch(name: str) -> None:
    net, make, _ = CASES[name]
    chain = find_chain(net, make(1, torch_rng(0))[0][0].unsqueeze(0))
    assert chain is not None
    assert kernel_run(chain, per_example=False) is None
