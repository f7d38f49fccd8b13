"""One bad example counts as zero, and the sum over the others is the same to the last bit."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset, Subset, TensorDataset

from fedcore.seeds import global_streams, torch_rng
from fedcore.task.definition import Examples, Loss
from fedcore.training.per_example.clipped_sum import Batch, ClippedSum, clipped_sum, read_batch
from fedcore.training.per_example.gradient_methods import (
    GradientMethod,
    one_by_one,
    trainable_parameters,
    vmap_method,
)
from tests.unit.fedcore.training.per_example.networks import NETWORKS, Network
from tests.ways import way_of

CPU = torch.device("cpu")
LOSS = functional.cross_entropy
COUNT, BAD = 11, 4
HUGE = 1e30  # a clip norm that clips nothing, so that a sum shows every bit of what is added


def summed(
    way: GradientMethod,
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    loss: Loss = LOSS,
    clip: float = HUGE,
    physical: int = 256,
) -> ClippedSum:
    return clipped_sum(way, nn.Identity(), model, loss, batches, clip_norm=clip, physical=physical)


def batch(inputs: Tensor, targets: Tensor, counted: Tensor | None = None) -> list[Batch]:
    everything = torch.ones(len(targets), dtype=torch.bool)
    return [Batch(inputs, targets, everything if counted is None else counted, 0)]


@pytest.mark.parametrize("shape", [(0, 48), (48, 0), (0, 0)])
@pytest.mark.parametrize("channels", [1, 3, 16])
def test_an_empty_image_counts_as_zero(channels: int, shape: tuple[int, int]) -> None:
    """Padding leaves something of it, which a loop over its pixels would fill with nothing."""
    model = nn.Sequential(
        *(nn.Conv2d(channels, 8, 6, stride=2, padding=3), nn.ReLU(), nn.AdaptiveAvgPool2d(1)),
        *(nn.Flatten(), nn.Linear(8, 3)),
    )
    way = way_of(model, LOSS, torch.randn(channels, 32, 32))
    assert way.name == "chain"
    rows = [(torch.zeros(channels, *shape), torch.tensor(1))] * 3
    rows.append((torch.ones(channels, 32, 32), torch.tensor(0)))

    class Rows(Dataset[Any]):
        def __len__(self) -> int:
            return len(rows)

        def __getitem__(self, place: int) -> Any:
            return rows[place]

    read = read_batch(Rows(), torch.arange(4), CPU, seed=0, usual=way.usual)  # type: ignore[arg-type]
    found = summed(way, model, read)
    assert found.skipped == 3
    alone = summed(way, model, batch(rows[3][0].unsqueeze(0), rows[3][1].unsqueeze(0)))
    assert torch.allclose(flat(found), flat(alone), atol=1e-6)


def without(place: int, count: int = COUNT) -> Tensor:
    return torch.arange(count) != place


def is_same(one: ClippedSum, other: ClippedSum) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.sums, other.sums, strict=True))


def flat(found: ClippedSum) -> Tensor:
    return torch.cat([one.flatten() for one in found.sums])


def prepared(name: str, scale: float = 1.0) -> tuple[Network, nn.Module, GradientMethod]:
    """A network, its model at the weights of a hostile server, and its way."""
    network = NETWORKS[name]
    model = network.build()
    way = way_of(model, network.loss, network.examples(1)[0][0])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale / parameter.abs().max().clamp(min=1e-3))  # some biases are zero
    return network, model, way


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("clip", [0.05, HUGE])
def test_the_physical_batch_changes_nothing_but_rounding(name: str, clip: float) -> None:
    network, model, way = prepared(name)
    examples = network.examples(40)
    each = [
        flat(summed(way, model, batch(*examples), loss=network.loss, clip=clip, physical=rows))
        for rows in (1, 7, 256)
    ]
    assert each[0].norm() > 0.01
    for one in each[1:]:
        assert (one - each[0]).abs().max() <= 1e-6 * max(1.0, each[0].abs().max().item())


@pytest.mark.parametrize("name", NETWORKS)
def test_each_example_is_scaled_to_the_clip_norm_over_all_parameters(name: str) -> None:
    network, model, way = prepared(name)
    inputs, targets = network.examples(COUNT)
    gradients: list[Tensor] = []
    for place in range(COUNT):
        one = slice(place, place + 1)
        parameters = list(trainable_parameters(model).values())
        found = torch.autograd.grad(
            network.loss(model(inputs[one]), targets[one]), parameters, allow_unused=True
        )
        gradient = torch.cat(
            [
                (torch.zeros_like(p) if g is None else g).flatten()
                for p, g in zip(parameters, found, strict=True)
            ]
        ).double()
        gradients.append(gradient)
    lengths = torch.stack(gradients).norm(dim=1)
    clip = lengths.median().item()  # some are longer, some are not
    shares = (clip / (lengths + 1e-6)).clamp(max=1)
    expected = (torch.stack(gradients) * shares[:, None]).sum(0)
    got = summed(way, model, batch(inputs, targets), loss=network.loss, clip=clip)
    assert shares.min() < 1 == shares.max()
    assert (flat(got) - expected).abs().max() <= 1e-6 * COUNT * clip
    assert all(one.dtype == torch.float64 for one in got.sums)


Spoil = Callable[[Tensor, Tensor], None]


def number(value: float) -> Spoil:
    def spoil(inputs: Tensor, targets: Tensor) -> None:
        inputs[BAD].view(-1)[0] = value

    return spoil


def label(value: int) -> Spoil:
    def spoil(inputs: Tensor, targets: Tensor) -> None:
        targets[BAD] = value

    return spoil


SPOILT: list[tuple[str, str, Spoil]] = [
    (name, said, spoil)
    for name, network in NETWORKS.items()
    for said, spoil in (
        [("far label", label(17)), ("label below zero", label(-100_000))]
        + (
            [("nan", number(float("nan"))), ("inf", number(float("inf")))]
            if network.examples(1)[0].is_floating_point()
            else [("word out of range", number(11)), ("word below zero", number(-1))]
        )
    )
]


@pytest.mark.parametrize("scale", [0.5, 1e6], ids=["honest", "hostile"])
@pytest.mark.parametrize(("name", "said", "spoil"), SPOILT, ids=lambda one: str(one)[:20])
def test_a_bad_example_counts_as_zero_and_the_others_are_the_same_bits(
    name: str, said: str, spoil: Spoil, scale: float
) -> None:
    network, model, way = prepared(name, scale)
    inputs, targets = (one.clone() for one in network.examples(COUNT))
    # The same places, in one of which nothing counts: what stands there is another example.
    fine = summed(way, model, batch(inputs, targets, without(BAD)), loss=network.loss)
    assert fine.skipped == 0 or scale > 1
    spoil(inputs, targets)
    spoilt = summed(way, model, batch(inputs, targets), loss=network.loss)
    assert spoilt.skipped == fine.skipped + 1
    assert is_same(spoilt, fine)
    if scale < 1:
        assert flat(fine).abs().max() > 0


@pytest.mark.parametrize("bad", [(0,), (COUNT - 1,), (0, 3, 4), tuple(range(COUNT))])
@pytest.mark.parametrize("name", ["dense", "convolution", "group norm", "attention"])
@pytest.mark.parametrize("physical", [1, 4, 256])
def test_wherever_bad_examples_stand_and_however_many_there_are(
    name: str, bad: tuple[int, ...], physical: int
) -> None:
    network, model, way = prepared(name)
    inputs, targets = (one.clone() for one in network.examples(COUNT))
    counted = torch.tensor([place not in bad for place in range(COUNT)])
    fine = summed(way, model, batch(inputs, targets, counted), physical=physical)
    targets[list(bad)] = 17
    spoilt = summed(way, model, batch(inputs, targets), physical=physical)
    assert spoilt.skipped == len(bad)
    assert is_same(spoilt, fine)
    if len(bad) == COUNT:
        assert not flat(spoilt).any()


def test_what_stands_where_nothing_counts_changes_no_bit_of_the_rest() -> None:
    for name in NETWORKS:
        network, model, way = prepared(name)
        inputs, targets = (one.clone() for one in network.examples(COUNT))
        one = summed(way, model, batch(inputs, targets, without(BAD)), loss=network.loss)
        inputs[BAD] = inputs[2]
        targets[BAD] = 1
        other = summed(way, model, batch(inputs, targets, without(BAD)), loss=network.loss)
        assert is_same(one, other), name


def test_one_more_example_moves_a_sum_by_the_clip_norm_at_most_at_hostile_weights() -> None:
    for name in NETWORKS:
        for scale in (1.0, 1e3, 1e6):
            network, model, way = prepared(name, scale)
            examples = network.examples(COUNT)
            whole = flat(summed(way, model, batch(*examples), loss=network.loss, clip=1.0))
            for place in (0, BAD, COUNT - 1):
                part = batch(*examples, without(place))
                moved = whole - flat(summed(way, model, part, loss=network.loss, clip=1.0))
                assert moved.norm().item() <= 1 + 1e-4, (name, scale)


class Halves(nn.Module):
    """A convolution whose slopes cancel: the mean of an image's one half less that of the other."""

    def __init__(self, outs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, outs, 1)
        self.head = nn.Linear(outs, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x).flatten(2)
        return self.head(h[..., ::2].sum(2) - h[..., 1::2].sum(2))


@pytest.mark.parametrize("name", ["convolution", "halves"])
def test_rows_that_cancel_move_a_sum_by_the_clip_norm_at_most(name: str) -> None:
    """Images of one colour all over, at huge weights: their gradient is rounding alone."""
    with global_streams(1):
        model = Halves(64) if name == "halves" else NETWORKS[name].build()
    example = torch.zeros(2, 9, 8)
    way = way_of(model, LOSS, example)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1e4)
    inputs, targets = NETWORKS["convolution"].examples(COUNT)
    inputs = inputs.clone()
    inputs[BAD] = 1e6
    inputs[BAD + 1] = torch.tensor([1e6, -1e6]).view(2, 1, 1)
    whole = flat(summed(way, model, batch(inputs, targets), clip=1.0))
    for place in (BAD, BAD + 1):
        moved = whole - flat(summed(way, model, batch(inputs, targets, without(place)), clip=1.0))
        assert moved.norm().item() <= 1 + 1e-4


class Rows(Dataset[Any]):
    """Examples read one by one, of which one is made otherwise."""

    def __init__(self, bad: Callable[[Tensor, Tensor], Any] | None, at: int = BAD) -> None:
        self.inputs, self.targets = NETWORKS["dense"].examples(COUNT)
        self.bad, self.at = bad, at

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, row: int) -> Any:
        pair = self.inputs[row], self.targets[row]
        return self.bad(*pair) if self.bad and row == self.at else pair


def raising(error: BaseException) -> Callable[[Tensor, Tensor], Any]:
    def bad(inputs: Tensor, target: Tensor) -> Any:
        raise error

    return bad


ODD: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "raises": raising(ValueError("could not convert 'patient 4711'")),
    "exits": raising(SystemExit(3)),
    "shape": lambda inputs, target: (torch.zeros(9), target),
    "target's shape": lambda inputs, target: (inputs, target.repeat(3)),
    "dtype": lambda inputs, target: (inputs.half(), target),
    "target's dtype": lambda inputs, target: (inputs, target.double()),
    "no tensor": lambda inputs, target: ("a word", target),
    "one tensor": lambda inputs, target: inputs,
    "three tensors": lambda inputs, target: (inputs, target, target),
    "nothing": lambda inputs, target: None,
    "nan": lambda inputs, target: (inputs * float("nan"), target),
}


@pytest.mark.parametrize("at", [0, BAD, COUNT - 1])
@pytest.mark.parametrize("said", ODD)
def test_a_row_that_cannot_be_read_or_fits_not_counts_as_zero(said: str, at: int) -> None:
    _, model, way = prepared("dense")
    every = torch.arange(COUNT)
    inputs, targets = NETWORKS["dense"].examples(COUNT)
    expected = summed(way, model, batch(inputs, targets, without(at)))
    found = summed(way, model, read_batch(Rows(ODD[said], at), every, CPU, seed=0))  # type: ignore[arg-type]
    assert is_same(found, expected)


def test_rows_that_are_read_alone_and_together_are_summed_alike() -> None:
    _, model, way = prepared("dense")
    rows = torch.tensor([1, 3, 4, 9])
    inputs, targets = NETWORKS["dense"].examples(COUNT)
    whole: Any = TensorDataset(inputs, targets)
    shifted: Any = Subset(whole, list(range(1, COUNT)))
    expected = summed(way, model, read_batch(whole, rows, CPU, seed=0))
    assert is_same(summed(way, model, read_batch(Rows(None), rows, CPU, seed=0)), expected)  # type: ignore[arg-type]
    assert is_same(summed(way, model, read_batch(shifted, rows - 1, CPU, seed=0)), expected)
    assert list(read_batch(whole, torch.tensor([], dtype=torch.int64), CPU, seed=0)) == []
    empty = summed(way, model, [])
    assert [one.shape for one in empty.sums] == [p.shape for p in model.parameters()]
    assert not flat(empty).any()


def test_examples_of_two_shapes_are_all_summed_each_in_its_place() -> None:
    class Lengths(Dataset[Any]):
        def __len__(self) -> int:
            return 6

        def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
            words = torch.randint(11, (3 + row % 2,), generator=torch_rng(row))
            return words, torch.tensor(row % 3)

    _, model, way = prepared("lstm")
    data: Examples = Lengths()  # type: ignore[assignment]
    batches = list(read_batch(data, torch.arange(6), CPU, seed=0))
    assert [one.counted.tolist() for one in batches] == [[True, False] * 3, [False, True] * 3]
    assert all(len(one.inputs) == 6 for one in batches)
    found = flat(summed(way, model, batches))
    alone = sum(
        flat(summed(way, model, read_batch(data, torch.tensor([row]), CPU, seed=0)))
        for row in range(6)
    )
    assert (found - alone).abs().max() <= 1e-6 * found.abs().max()


def test_a_loss_that_ends_the_process_counts_as_zero() -> None:
    def leaving(outputs: Tensor, targets: Tensor) -> Tensor:
        if bool((targets == 2).any()):
            sys.exit(3)
        return LOSS(outputs, targets)

    _, model, _ = prepared("dense")
    inputs, targets = NETWORKS["dense"].examples(COUNT)
    way = one_by_one(leaving, why="")
    found = summed(way, model, batch(inputs, targets), loss=leaving, physical=1)
    counted = targets != 2
    expected = summed(one_by_one(LOSS, why=""), model, batch(inputs, targets, counted), physical=1)
    assert found.skipped == int((~counted).sum())
    assert is_same(found, expected)


def test_what_is_asked_of_the_person_at_the_keyboard_is_not_swallowed() -> None:
    def interrupted(outputs: Tensor, targets: Tensor) -> Tensor:
        raise KeyboardInterrupt

    _, model, _ = prepared("dense")
    with pytest.raises(KeyboardInterrupt):
        summed(one_by_one(interrupted, why=""), model, batch(*NETWORKS["dense"].examples(2)))


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't allocate memory: 8 TB")])
def test_an_example_that_asks_for_more_memory_than_there_is_counts_as_zero(
    error: Exception,
) -> None:
    def hungry(outputs: Tensor, targets: Tensor) -> Tensor:
        raise error

    _, model, _ = prepared("dense")
    way = vmap_method(1, hungry, why="")
    found = summed(way, model, batch(*NETWORKS["dense"].examples(COUNT)), loss=hungry)
    assert found.skipped == COUNT
    assert not flat(found).any()


def test_one_example_of_each_batch_is_taken_where_torch_cannot_take_them_together() -> None:
    """A loss that looks at a value runs on each example, and under vmap on none."""

    def looking(outputs: Tensor, targets: Tensor) -> Tensor:
        return LOSS(outputs, targets) * (2 if float(outputs.detach().max()) > 0 else 1)

    network, model, _ = prepared("dense")
    examples = network.examples(COUNT)
    found = summed(vmap_method(1, looking, why=""), model, batch(*examples), loss=looking)
    expected = summed(one_by_one(looking, why=""), model, batch(*examples), physical=1)
    assert found.skipped == 0
    assert (flat(found) - flat(expected)).abs().max() <= 1e-6 * flat(expected).abs().max()
