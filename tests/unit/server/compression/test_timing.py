from __future__ import annotations

import time
from collections import Counter

import pytest
import torch
from torch import nn

from server.compression.export import export_onnx
from server.compression.timing import time_candidates, time_in_turn


def spin(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def test_tells_slow_from_fast() -> None:
    timings = time_in_turn(
        {"fast": lambda: spin(20e-6), "slow": lambda: spin(100e-6)}, runs=200, blocks=10
    )
    assert 20 <= timings["fast"].p50_us < timings["slow"].p50_us
    assert timings["slow"].p50_us >= 100
    for timing in timings.values():
        assert timing.p50_min_us <= timing.p50_us <= timing.p50_max_us


def test_blocks_take_turns_and_begin_with_another_each_time() -> None:
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    time_in_turn(calls, runs=30, blocks=3)
    turns = [name for i, name in enumerate(order) if i == 0 or order[i - 1] != name]
    assert "".join(turns) == "abc" + "bca" + "cab"
    assert len(set(Counter(order).values())) == 1


@pytest.mark.parametrize("training", [True, False])
def test_the_module_and_torch_are_left_as_they_were(training: bool) -> None:
    module = nn.Sequential(nn.Linear(4, 3)).train(training)
    raw = export_onnx(module, torch.zeros(2, 4), labels=(), kind="classification")
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        timings = time_candidates({"fp32": raw}, module, torch.zeros(4), threads=1, runs=100)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert set(timings) == {"fp32", "torch"}
    assert module.training is training
    assert torch.is_grad_enabled()
    assert all(timing.p50_us > 0 for timing in timings.values())
