"""How far one example can move what noise is added to, over a zoo of models and losses.

The real training runs, with noise off: two data sets differ in one example, which one of them
replaces by a row that cannot be read. Models that are accepted keep to the clip norm whatever the
example and the server's weights are; those that are refused are so before anything is charged.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from fedcore.config.owner import OPEN_POLICY
from fedcore.config.run import ClientConfig as Settings
from fedcore.config.run import RunConfig
from fedcore.errors import PrivacyError, UnsupportedLayer
from fedcore.privacy.accounting import Charge
from fedcore.privacy.ledger import Ledger
from fedcore.privacy.planning import PrivatePlan
from fedcore.seeds import SystemEntropy, global_streams
from fedcore.task.definition import Task
from fedcore.task.model import FullModel, build_model, preprocess_bytes
from fedcore.training.client import Client, learn
from fedcore.training.per_example.chain import torch_run
from fedcore.training.per_example.clipped_sum import Batch, clipped_sum
from fedcore.training.per_example.clipping import _CANCELLED as CANCELLED
from fedcore.training.per_example.clipping import clip_factors, example_gradients, norms
from fedcore.training.per_example.gradient_methods import EXACT_ROWS, GradientMethod, chain_method
from fedcore.training.per_example.graph import find_chain
from fedcore.training.per_example.runs import compiled_run
from fedcore.training.per_example.trial import choose_method
from fedcore.training.private import train_private
from fedcore.updates.messages import Instruction
from fedcore.updates.pack import layout_of, pack
from tests.property.zoo import ACCEPTED, CLASSES, REFUSED, TOKENS, WIDTH, Case

ROUNDING = 1e-4
"""What the noise is drawn larger by."""
COUNT, PLACE = 6, 3
RUN = RunConfig.model_validate(
    {
        "name": "run",
        "task": "task.py",
        "client": {"batch_size": COUNT, "device": "cpu"},
        "privacy": {"unit": "example", "target_delta": 1e-3},
    }
)
Row = tuple[Tensor, Tensor]


@dataclass
class Silent:
    """Draws every example in every step, and no noise; keeps the sums that it is given."""

    sums: list[Tensor] = field(default_factory=list)

    def seed(self) -> int:
        return 5

    def poisson(self, count: int, rate: float) -> Tensor:
        return torch.arange(count)

    def add_noise(self, sums: Sequence[Tensor], *, deviation: float, bound: float) -> None:
        self.sums.append(torch.cat([one.double().flatten() for one in sums]))


class Rows(Dataset[Row]):
    """Rows as they are, of which one may be unreadable."""

    def __init__(self, rows: list[Row | None]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Row:
        found = self.rows[row]
        if found is None:
            raise ValueError("row 4711 of the file is no number")
        return found


def task_of(case: Case) -> Task:
    return Task(
        name="zoo",
        kind=case.kind,
        model=case.model,
        clients=lambda folder: ["anna"],
        client_data=lambda client, folder: TensorDataset(*data_of(case)),
        test_data=lambda folder: TensorDataset(*data_of(case)),
        example_input=case.example,
        preprocess=case.preprocess,
        loss=copy.deepcopy(case.loss),
    )


def data_of(case: Case) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(3)
    shape = (COUNT, *case.example.shape)
    if case.example.is_floating_point():
        inputs = torch.randn(shape, generator=rng)
    else:
        inputs = torch.randint(TOKENS, shape, generator=rng)
    return inputs, case.targets(COUNT, rng)


def adversaries(case: Case) -> Iterator[Row]:
    """Examples that try to move the sum by more than one may, the plain one first."""
    inputs, targets = (one[PLACE].clone() for one in data_of(case))
    yield inputs, targets
    if inputs.is_floating_point():
        for factor in (50.0, 1e6, 1e19, 3e38):
            yield inputs / inputs.abs().max() * factor, targets
        for value in (0.0, 1e-40, 7.0, float("nan"), float("inf"), -float("inf")):
            yield torch.full_like(inputs, value), targets
        odd = inputs.clone()
        odd.view(-1)[0] = float("nan")
        yield odd, targets
    else:
        for token in (0, TOKENS - 1, TOKENS, -1, 2**40):
            yield torch.full_like(inputs, token), targets
    if targets.is_floating_point():
        for value in (1e4, 1e20, -3e38, float("nan"), float("inf")):
            yield inputs, torch.full_like(targets, value)
    else:
        for label in (0, -100, -1, 99, 2**62):
            yield inputs, torch.full_like(targets, label)
    yield inputs[..., :-1], targets  # rows of odd shapes and dtypes
    yield inputs.unsqueeze(0), targets
    yield inputs.double(), targets.to(torch.int32)


def hostile(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model at weights that a hostile server may send."""
    for name in ("fresh", "huge", "cancelling", "tiny", "equal"):
        changed = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in changed.parameters():
                signs = torch.ones(parameter.numel())
                signs[::2] = -1
                signs = signs.view(parameter.shape)
                match name:
                    case "huge":
                        parameter.copy_(1e6 * torch.sign(parameter))
                    case "cancelling":  # rows that cancel but for their last bits
                        parameter.copy_(1e3 * signs + 1e-3 * parameter)
                    case "tiny":
                        parameter.mul_(1e-38)
                    case "equal":
                        parameter.fill_(1e6)
        yield name, changed


def sums(
    method: GradientMethod,
    task: Task,
    full: FullModel,
    examples: Any,
    *,
    clip: float = 1.0,
    steps: int = 2,
) -> Tensor:
    """What noise would have been added to, ``(steps, parameters)``; weights all but stand still."""
    model, draws = copy.deepcopy(full), Silent()
    assert task.loss is not None
    train_private(
        model.preprocess,
        model.model,
        examples,
        task.loss,
        Settings(learning_rate=1e-12),
        PrivatePlan(Charge(1, 1.0, 1.0, steps), clip),
        method=method,
        draws=draws,
    )
    found = torch.stack(draws.sums)
    assert found.shape[0] == steps
    assert torch.isfinite(found).all()
    return found


def lazily(case: Case, row: Row | None) -> Rows:
    rows: list[Row | None] = list(zip(*data_of(case), strict=True))
    rows[PLACE] = row
    return Rows(rows)


def moved(with_it: Tensor, without: Tensor, clip: float = 1.0) -> float:
    """The sensitivity that two data sets show, over the clip norm, in the worst step."""
    return float((with_it - without).norm(dim=1).max()) / clip


def test_the_zoo_is_large_and_has_both_kinds() -> None:
    cases = [*ACCEPTED, *REFUSED]
    assert len({case.name for case in cases}) == len(cases)
    assert len(ACCEPTED) >= 40
    assert len(REFUSED) >= 20
    assert {case.outcome for case in ACCEPTED} == {"chain", "vmap", "alone"}


@pytest.mark.parametrize("case", ACCEPTED, ids=lambda case: case.name)
def test_no_example_moves_a_sum_by_more_than_the_clip_norm(case: Case) -> None:
    task = task_of(case)
    full = build_model(task, RUN)
    method = choose_method(task, full)
    assert method.name == case.outcome, method.why
    if case.name.startswith("large table"):  # gradients by what was looked up, no table an example
        assert method.bytes_per_example < sum(p.numel() for p in full.parameters())
    for name, model in hostile(full.model):
        at = FullModel(full.preprocess, model)
        steps = 2 if name == "fresh" else 1
        without = sums(method, task, at, lazily(case, None), steps=steps)
        if name == "fresh":  # noise is not all that there is
            assert float(without.norm(dim=1).min()) > 1e-3
        rows = list(adversaries(case))
        for number, row in enumerate(rows if name == "fresh" else rows[::5]):
            seen = moved(sums(method, task, at, lazily(case, row), steps=steps), without)
            assert seen <= 1 + ROUNDING, (name, number, seen)
            if name == "fresh" and number == 0:
                assert seen > 1e-6  # the plain example counts


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_what_couples_examples_is_refused_before_a_charge(case: Case) -> None:
    task, charges = task_of(case), []
    client = Client(task, RUN, OPEN_POLICY, SystemEntropy())
    model = build_model(task, RUN)
    asked = Instruction(
        1, pack(model.model), layout_of(model.model).digest, preprocess_bytes(model), 0.0
    )
    with pytest.raises((PrivacyError, UnsupportedLayer), match=r"Nothing was trained") as caught:
        learn(client, "anna", asked, Ledger(), on_spend=charges.append)
    assert case.remedy in str(caught.value)
    assert case.remedy
    assert not charges


def case_named(name: str) -> Case:
    return next(case for case in ACCEPTED if case.name == name)


SOME = ["mlp, cross-entropy", "cnn", "cnn, many filters", "dropout", "lstm"]


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("clip", [1e-30, 1e-6, 1e6])
def test_the_clip_norm_holds_whatever_its_size(name: str, clip: float) -> None:
    case = case_named(name)
    task = task_of(case)
    full = build_model(task, RUN)
    method = choose_method(task, full)
    for _, model in hostile(full.model):
        at = FullModel(full.preprocess, model)
        without = sums(method, task, at, lazily(case, None), clip=clip, steps=1)
        for row in list(adversaries(case))[:6]:
            found = sums(method, task, at, lazily(case, row), clip=clip, steps=1)
            assert moved(found, without, clip) <= 1 + ROUNDING


@pytest.mark.parametrize("name", SOME)
def test_a_data_set_in_memory_is_no_different(name: str) -> None:
    """There, the example that counts as zero is one whose gradient is not finite."""
    case = case_named(name)
    task = task_of(case)
    full = build_model(task, RUN)
    method = choose_method(task, full)
    inputs, targets = data_of(case)
    found = []
    for value in (float("nan"), float("inf"), 3e38, 50.0, 0.0):
        inputs = inputs.clone()
        inputs[PLACE] = value
        found.append(sums(method, task, full, TensorDataset(inputs, targets)))
    assert all(moved(one, found[0]) <= 1 + ROUNDING for one in found)
    # What is not finite leaves the others' gradients as they are, to the bit.
    assert torch.equal(found[0], sums(method, task, full, lazily(case, None)))


@pytest.mark.parametrize("left", [0.0, 1e-4, 0.5, 1.0])
def test_a_gradient_of_rows_that_cancel_is_not_longer_than_its_norm_says(left: float) -> None:
    """What is left of large rows may be smaller than what rounding makes of them."""
    rng = torch.Generator().manual_seed(2)
    count, rows, outs, width = 50, 5, 40, 30
    inputs = torch.randn(1, count, 1, width, generator=rng).expand(-1, -1, rows, -1).contiguous()
    grads = torch.randn(1, count, rows, outs, generator=rng)
    grads[:, :, -1] = left * grads[:, :, -1] - grads[:, :, :-1].sum(dim=2)
    found = example_gradients((inputs, grads, grads), bias=True)
    for place in range(count):
        share = torch.zeros(1, count)
        share[0, place] = 1
        made = found.weighted(share, slice(None))
        product = torch.bmm(made.left.transpose(1, 2), made.right)
        length = float((product.double().square().sum() + made.bias.double().square().sum()).sqrt())
        if bool(found.usable[0, place]):
            assert length <= float(found.squares[0, place].sqrt()) * (1 + ROUNDING)
    assert bool(found.usable.any()) is (left >= 1e-2)


@pytest.mark.parametrize("compiled", [True, False])
def test_rows_that_cancel_do_not_round_the_other_way_in_great_numbers(compiled: bool) -> None:
    """Partial sums just below a power of two, which one example lifts all of them over."""
    model = nn.Sequential(
        nn.Conv2d(16, 1, 1, bias=False), nn.Flatten(), nn.Linear(2, 1, bias=False)
    )
    with torch.no_grad():
        model[0].weight.zero_()
        model[2].weight.fill_(1)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs[:, 0] * targets).mean()

    chain = find_chain(model, torch.randn(4, 16, 1, 2))
    assert chain is not None
    run = compiled_run(chain, model, per_example=True) if compiled else torch_run(chain)
    assert run is not None
    method, unit = chain_method(chain, run, loss), 2.0 ** (math.log2(CANCELLED) - 24)
    rows = torch.zeros(EXACT_ROWS, 16, 1, 2)
    rows[0, 0, 0, 0] = start = math.floor((1 - 8 * unit) / unit) * unit
    with_it, without_it = start, 0.0
    for place in range(1, EXACT_ROWS):
        steps = math.floor((CANCELLED / 2 - 0.5 - without_it) / unit)
        steps -= (round(with_it / unit) + steps) % 2 == 0  # odd: the tie goes up
        up = steps * unit + unit / 2
        down = -round((up - (1 - 2.0**-8) * (1 if place % 2 else -1)) / unit) * unit
        rows[place, 0, 0, 0], rows[place, 0, 0, 1] = up, down
        without_it = float(np.float32(np.float32(without_it + up) + down))
        with_it = float(np.float32(np.float32(with_it + up) + down))
    counted = torch.ones(EXACT_ROWS, dtype=torch.bool)
    found = []
    for first in (True, False):
        counted[0] = first
        batch = Batch(rows, torch.ones(EXACT_ROWS), counted, 0)
        one = clipped_sum(method, nn.Identity(), model, loss, [batch], clip_norm=1.0, physical=64)
        assert one.skipped == 0
        found.append(torch.cat([total.flatten() for total in one.sums]))
    assert moved(*(one.unsqueeze(0) for one in found)) <= 1 + ROUNDING


@pytest.mark.parametrize("value", [0.1, 0.3, 0.7])
def test_norms_of_long_vectors_of_equal_entries_are_not_short(value: float) -> None:
    """Added up in float32, the squares of a million of these come out up to 0.14 % short."""
    for count in (5, 4097, 1_000_000):
        vector = torch.full((1, count), value)
        assert float(norms(vector)) == pytest.approx(float(vector.double().norm()), rel=3e-5)


@given(st.floats(-45, 12), st.floats(-20, 30))
def test_a_share_times_a_length_is_at_most_the_clip_norm(clip: float, length: float) -> None:
    share = clip_factors(torch.tensor([10.0**length], dtype=torch.float64).square(), 10**clip)
    assert share.dtype == torch.float32
    assert float(share.double()) * 10**length <= 10**clip * (1 + 1e-6)


@hypothesis.settings(max_examples=15)
@given(
    widths=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    between=st.lists(st.sampled_from([nn.ReLU, nn.Tanh, nn.GELU, nn.Identity]), min_size=3),
    scale=st.floats(-38, 6),
    size=st.floats(-38, 38),
    clip=st.floats(-6, 6),
)
def test_random_chains(
    widths: list[int], between: list[type[nn.Module]], scale: float, size: float, clip: float
) -> None:
    layers: list[nn.Module] = []
    with global_streams(4):
        for inputs, outs, kind in zip([WIDTH, *widths], widths, between, strict=False):
            layers += [nn.Linear(inputs, outs), kind()]
        model = nn.Sequential(*layers, nn.Linear(widths[-1], CLASSES))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10**scale).clamp_(-1e6, 1e6)
    case = dataclasses.replace(case_named("mlp, cross-entropy"), model=lambda: model)
    task, full = task_of(case), FullModel(nn.Identity(), model)
    method = by_chain_of(full)
    row = torch.full((WIDTH,), float(np.float32(10**size))), torch.tensor(1)
    pair = [
        sums(method, task, full, lazily(case, one), clip=10**clip, steps=1) for one in (row, None)
    ]
    assert moved(*pair, clip=10**clip) <= 1 + ROUNDING


def by_chain_of(full: FullModel) -> GradientMethod:
    chain = find_chain(full.model, torch.zeros(2, WIDTH))
    assert chain is not None
    return chain_method(chain, torch_run(chain), nn.functional.cross_entropy)
