"""The reference of a release: bins of the cloud's data, equal for equal seeds."""

from __future__ import annotations

import numpy as np
import torch
from torch.utils.data import TensorDataset

from fedcore.artifacts.feedback import Observation, shifts
from fedcore.artifacts.reference import binned, measured, ragged, reference_bytes
from fedcore.task.definition import Task, size_of
from server.cloud import CloudData
from server.compression.compressed import Compressed
from server.compression.reference import reference_of


def normal_rows(count: int, *, by: float = 0.0, seed: int = 0) -> TensorDataset:
    rows = torch.from_numpy(np.random.default_rng(seed).normal(by, 1, (count, 64)))
    return TensorDataset(rows.float(), torch.zeros(count, dtype=torch.int64))


def test_what_is_released_has_the_clouds_distribution(
    compressed: Compressed, digits_cloud: CloudData
) -> None:
    reference = compressed.golden.reference
    assert reference is not None
    assert [each.label for each in reference.features] == [f"input[{n}]" for n in range(64)]
    assert {sum(each.counts) for each in reference.features} == {size_of(digits_cloud.train)}
    assert len(reference_bytes(reference)) < 20_000


def test_rows_like_the_clouds_are_stable_and_others_are_not(digits: Task) -> None:
    outputs = np.random.default_rng(1).normal(size=(500, 10)).astype(np.float32)
    reference = reference_of(digits, normal_rows(3000), outputs, seed=1)
    assert reference is not None
    assert reference == reference_of(digits, normal_rows(3000), outputs, seed=1)

    def readings(rows: TensorDataset) -> list[str]:
        features = [each for each in reference.features if each.side == "input"]
        tensors = {"input": rows.tensors[0].numpy()}
        values = measured(features, tensors, "label", np.random.default_rng(0))
        edges = [each.edges for each in features]
        counts = ragged(binned(values, edges), edges)
        told = Observation(rows=len(values), counts=counts)
        inputs = reference.model_copy(update={"features": tuple(features)})
        return [each.reading for each in shifts(inputs, told)]

    assert set(readings(normal_rows(1000, seed=2))) == {"stable"}
    assert set(readings(normal_rows(1000, by=1.0, seed=2))) == {"shifted"}


def test_too_few_rows_give_none_and_of_many_a_share_is_taken(digits: Task) -> None:
    outputs = np.eye(10, dtype=np.float32)[np.arange(200) % 10]
    assert reference_of(digits, normal_rows(99), outputs, seed=1) is None
    few = reference_of(digits, normal_rows(100), outputs[:99], seed=1)
    assert few is not None
    assert {each.side for each in few.features} == {"input"}
    many = reference_of(digits, normal_rows(25_000), outputs, seed=1)
    assert many is not None
    assert 19_000 < sum(many.features[0].counts) < 21_000
    assert many.features[-1].label == "output class"
    assert many.features[-1].counts == (*[20] * 10, 0)
