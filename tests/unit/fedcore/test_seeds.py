from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from fedcore.seeds import Simulated, SystemEntropy, derive, global_streams, numpy_rng, torch_rng


def test_streams_do_not_change_from_one_version_to_the_next() -> None:
    # What a seed gives is part of what a released model's lineage promises.
    assert derive(1, "cohort", 3) == 4767687484990445701
    assert derive(0) == 5254295370254170289


def test_a_name_is_more_than_its_letters() -> None:
    assert len({derive(0, "ab"), derive(0, "a", "b"), derive(0, 1), derive(0, "1")}) == 4


def test_generators_of_one_name_draw_alike() -> None:
    assert numpy_rng(1, "a").random() == numpy_rng(1, "a").random()
    assert numpy_rng(1, "a").random() != numpy_rng(1, "b").random()
    assert torch.equal(*(torch.rand(3, generator=torch_rng(1, "a")) for _ in range(2)))


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.random()), torch.rand(()).item()


def test_process_wide_streams_are_pinned_and_then_go_on_as_before() -> None:
    random.seed(9)
    np.random.seed(9)
    torch.manual_seed(9)
    before = draws()
    expected = draws()
    random.seed(9)
    np.random.seed(9)
    torch.manual_seed(9)
    assert draws() == before
    with global_streams(1, "library"):
        first = draws()
    with global_streams(1, "library"):
        assert draws() == first
    assert draws() == expected


def test_process_wide_streams_are_restored_after_an_error() -> None:
    random.seed(9)
    expected = random.random()
    random.seed(9)
    with pytest.raises(KeyError), global_streams(1):
        raise KeyError
    assert random.random() == expected


def test_a_simulation_repeats_itself_and_a_device_never_does() -> None:
    cpu = torch.device("cpu")

    def drawn(source: Simulated | SystemEntropy) -> torch.Tensor:
        return torch.rand(8, generator=source.generator(cpu, "noise", 1))

    assert torch.equal(drawn(Simulated(3)), drawn(Simulated(3)))
    assert not torch.equal(drawn(Simulated(3)), drawn(Simulated(4)))
    assert not torch.equal(drawn(SystemEntropy()), drawn(SystemEntropy()))
    assert (Simulated(3).origin, SystemEntropy().origin) == ("simulated", "system")
