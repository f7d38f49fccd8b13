from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from fedcore.artifacts.golden import golden_bytes, parse_golden
from fedcore.task.named import NamedInputs
from server.compression import golden as of
from server.compression.golden import golden_count, golden_inputs, stored, tolerance


def examples(inputs: torch.Tensor) -> TensorDataset:
    return TensorDataset(inputs, torch.zeros(len(inputs)))


def test_features_stay_in_their_own_ranges() -> None:
    inputs = torch.rand(100, 3) * torch.tensor([1.0, 1000.0, 0.0]) + torch.tensor([0.0, 500.0, 7.0])
    golden = golden_inputs(torch.zeros(3), examples(inputs), seed=0)
    assert golden.shape == (32, 3)
    assert golden.dtype == np.float32
    assert (golden >= inputs.amin(dim=0).numpy()).all()
    assert (golden <= inputs.amax(dim=0).numpy()).all()
    assert golden[:, 1].std() > 100


def test_no_input_is_anybodys_data() -> None:
    inputs = torch.randn(200, 8)
    golden = torch.from_numpy(golden_inputs(torch.zeros(8), examples(inputs), seed=0))
    assert torch.cdist(golden, inputs).min() > 0.1


@pytest.mark.parametrize("data", [None, examples(torch.full((1, 4), 40.0))])
def test_little_data_gives_no_range(data: TensorDataset | None) -> None:
    golden = golden_inputs(torch.full((4,), 5.0), data, seed=0)
    assert ((golden >= 4) & (golden <= 6)).all()
    assert golden.std() > 0.3


def test_tokens_are_tokens() -> None:
    tokens = torch.randint(0, 9, (50, 6))
    tokens[0, 0] = 8
    golden = golden_inputs(torch.zeros(6, dtype=torch.int64), examples(tokens), seed=0)
    assert golden.dtype == np.int64
    assert set(np.unique(golden)) == set(range(9))
    alone = golden_inputs(torch.tensor([0, 3]), None, seed=0)
    assert set(np.unique(alone)) == {0, 1, 2, 3}


def test_each_named_input_keeps_its_type_and_range() -> None:
    example = {"x": torch.zeros(2), "word": torch.tensor(3), "flag": torch.tensor(False)}
    named = NamedInputs.of(example, task="x")
    batch = {
        "x": torch.rand(50, 2),
        "word": torch.randint(2, 9, (50,)),
        "flag": torch.arange(50) % 2 == 0,
    }
    packed = named.pack(batch)
    golden = golden_inputs(named.vector(example), examples(packed), seed=0, named=named)
    assert golden.dtype == np.float64  # as the vector
    assert np.array_equal(named.pack(named.unpack(torch.from_numpy(golden))), golden)
    assert set(golden[:, 2]) == set(range(2, 9))
    assert set(golden[:, 3]) == {0, 1}
    few = golden_inputs(named.vector(example), None, seed=0, named=named)
    assert set(few[:, 2]) == {0, 1, 2, 3}  # no word that an embedding may lack
    assert few[:, :2].std() > 0.3


def test_the_seed_fixes_them() -> None:
    one, same, other = (golden_inputs(torch.zeros(5), None, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


def test_a_tolerance_follows_the_largest_output() -> None:
    outputs = np.array([[0.5, -20.0]], dtype=np.float32)
    assert tolerance(outputs, relative=1e-3) == pytest.approx(0.02)
    assert tolerance(np.zeros((2, 2), dtype=np.float32), relative=1e-3) > 0


def test_large_inputs_and_outputs_are_fewer() -> None:
    assert golden_count(256, 40) == 32
    assert golden_count(4 << 20, 40) == 4  # large images
    assert golden_count(512, 64 * 9000 * 4) == 29  # a large vocabulary
    assert golden_count(1 << 30, 1 << 30) == 1


def test_outputs_of_a_large_vocabulary_are_stored_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of, "_MAX_OUTPUT_BYTES", 1000)
    inputs = np.zeros((3, 4), np.int64)
    outputs = np.arange(3 * 5 * 40, dtype=np.float32).reshape(3, 5, 40)
    golden = stored(inputs, outputs, seed=1)
    raw = golden_bytes(golden.inputs, golden.outputs, golden.places)
    assert len(raw) < 2500
    again = parse_golden(raw)
    assert again.places is not None
    assert again.outputs.shape == (3, 83)
    part = again.stored_part(outputs)
    assert part is not None
    np.testing.assert_array_equal(part, again.outputs)
    for other in (outputs[:2], outputs[:, :1, :5]):
        assert again.stored_part(other) is None
    same, another = (stored(inputs, outputs, seed=seed).places for seed in (1, 2))
    assert np.array_equal(again.places, same)  # type: ignore[arg-type]
    assert not np.array_equal(again.places, another)  # type: ignore[arg-type]
    assert stored(inputs, outputs[:, :, :10], seed=1).places is None
