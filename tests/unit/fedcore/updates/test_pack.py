from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fedcore.errors import InvalidUpdate, TaskError
from fedcore.updates.pack import layout_of, pack, unpack


class Tied(nn.Module):
    """A head that shares the embedding's weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight


class Scalar(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(1.5))


def test_a_vector_holds_the_tensors_in_the_order_of_the_state() -> None:
    model = nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2.0]]))
        model.bias.fill_(3.0)
    assert pack(model).tolist() == [1.0, 2.0, 3.0]
    assert layout_of(model).names == ("weight", "bias")
    assert layout_of(model).shapes == ((1, 2), (1,))
    assert layout_of(model).size == 3


def test_a_packed_vector_is_a_copy() -> None:
    model = nn.Linear(2, 1)
    vector = pack(model)
    vector[:] = 7.0
    assert (pack(model) != 7.0).all()
    unpack(vector, model)
    vector[:] = 8.0
    assert (pack(model) == 7.0).all()


def test_batch_norm_carries_its_running_statistics_and_not_its_counter() -> None:
    source, target = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    source(torch.randn(16, 3))
    assert "num_batches_tracked" not in layout_of(source).names
    unpack(pack(source), target)
    assert torch.equal(target.running_mean, source.running_mean)  # type: ignore[arg-type]
    assert torch.equal(target.running_var, source.running_var)  # type: ignore[arg-type]
    assert target.num_batches_tracked == 0


class Counting(nn.Module):
    """State of every kind that a module registers."""

    def __init__(self, **buffers: torch.Tensor) -> None:
        super().__init__()
        for name, values in buffers.items():
            self.register_buffer(name, values)
        self.weight = nn.Parameter(torch.ones(2))


def test_integers_and_booleans_follow_the_other_numbers() -> None:
    model = Counting(steps=torch.tensor([3, -4]), seen=torch.tensor(True), rate=torch.tensor(0.5))
    layout = layout_of(model)
    assert layout.names == ("weight", "rate", "steps", "seen")
    assert (layout.integers, layout.whole, layout.size) == (2, 3, 6)
    assert pack(model).tolist() == [1.0, 1.0, 0.5, 3.0, -4.0, 1.0]
    plain = Counting(steps=torch.tensor([0.0, 0.0]), seen=torch.tensor(0.0), rate=torch.tensor(0.0))
    assert layout.digest != layout_of(plain).digest


@pytest.mark.parametrize(
    ("dtype", "value", "becomes"),
    [
        (torch.int64, 2.5, 2),
        (torch.int64, 3.5, 4),
        (torch.int64, -0.5, 0),
        (torch.int32, 2.0**24, 2**24),
        (torch.int64, 1e30, 2**24),
        (torch.uint8, 300.0, 255),
        (torch.uint8, -7.0, 0),
        (torch.int8, float("nan"), 0),
        (torch.bool, 0.5, False),
        (torch.bool, 0.50001, True),
    ],
)
def test_a_mean_becomes_the_nearest_integer_that_the_type_holds(
    dtype: torch.dtype, value: float, becomes: int | bool
) -> None:
    model = Counting(counter=torch.zeros((), dtype=dtype))
    unpack(np.array([1.0, 1.0, value], np.float32), model)
    assert model.counter.dtype == dtype
    assert model.counter.item() == becomes  # type: ignore[operator]


def test_an_integer_that_float32_would_change_is_refused_by_name() -> None:
    model = Counting(hashes=torch.tensor([1, 2**24 + 1]))
    with pytest.raises(TaskError, match=r"'hashes' holds 16777217, expected at most 2\*\*24"):
        pack(model)
    assert pack(Counting(hashes=torch.tensor([1, -(2**24)]))).tolist()[-1] == -(2.0**24)
    model.register_buffer("hashes", torch.tensor([1, 2**24 + 1]), persistent=False)
    assert pack(model).tolist() == [1.0, 1.0]


def test_complex_tensors_travel_as_pairs() -> None:
    source, target = (Counting(phase=torch.tensor([1 + 2j]) * scale) for scale in (1, 0))
    source.spectrum = nn.Parameter(torch.tensor([[3 - 4j]]))
    target.spectrum = nn.Parameter(torch.zeros(1, 1, dtype=torch.complex64))
    unpack(pack(source), target)
    assert torch.equal(target.phase, source.phase)  # type: ignore[arg-type]
    assert torch.equal(target.spectrum, source.spectrum)


def test_only_a_counter_that_nothing_reads_stays_behind() -> None:
    class Own(nn.BatchNorm1d):
        """May read the counter, like any code of a user's."""

    kinds = [nn.BatchNorm1d(3), nn.BatchNorm1d(3, momentum=None), Own(3)]
    assert [layout_of(kind).integers for kind in kinds] == [0, 1, 1]
    assert layout_of(nn.InstanceNorm1d(3, track_running_stats=True)).integers == 0
    assert layout_of(nn.BatchNorm1d(3, track_running_stats=False)).integers == 0


def test_tied_weights_travel_once_and_stay_tied_and_equal() -> None:
    source, target = Tied(), Tied()
    assert layout_of(source).names == ("embed.weight",)
    assert len(pack(source)) == 15
    unpack(pack(source), target)
    assert target.head.weight is target.embed.weight
    assert torch.equal(target.embed.weight, source.embed.weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_travel_as_float32_and_come_back(dtype: torch.dtype) -> None:
    source, target = nn.Linear(4, 4).to(torch.bfloat16).to(dtype), nn.Linear(4, 4).to(dtype)
    vector = pack(source)
    assert vector.dtype == np.float32
    unpack(vector, target)
    assert target.weight.dtype == dtype
    assert torch.equal(target.weight, source.weight)


def test_a_scalar_parameter_is_packed() -> None:
    source, target = Scalar(), Scalar()
    with torch.no_grad():
        source.temperature.fill_(-2.0)
    assert pack(source).tolist() == [-2.0]
    unpack(pack(source), target)
    assert target.temperature.shape == ()
    assert target.temperature.item() == -2.0


def test_a_model_without_floating_point_tensors_is_an_empty_vector() -> None:
    assert pack(nn.ReLU()).shape == (0,)
    unpack(np.zeros(0, np.float32), nn.ReLU())


def test_a_read_only_vector_is_unpacked() -> None:
    vector = np.frombuffer(np.arange(3, dtype=np.float32).tobytes(), np.float32)
    model = nn.Linear(2, 1)
    unpack(vector, model)
    assert pack(model).tolist() == [0.0, 1.0, 2.0]


def test_another_length_is_refused_with_both_lengths() -> None:
    with pytest.raises(InvalidUpdate, match=r"got shape \(4,\), expected \(3,\) for this model"):
        unpack(np.zeros(4, np.float32), nn.Linear(2, 1))


@pytest.mark.parametrize(
    "other",
    [nn.Linear(2, 1, bias=False), nn.Linear(1, 2, bias=False), nn.Sequential(nn.Linear(2, 1))],
    ids=["without a bias", "another shape", "another name"],
)
def test_a_digest_tells_models_apart(other: nn.Module) -> None:
    assert layout_of(other).digest != layout_of(nn.Linear(2, 1)).digest
    assert layout_of(nn.Linear(2, 1)).digest == layout_of(nn.Linear(2, 1)).digest
