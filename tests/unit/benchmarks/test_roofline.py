"""Operations and bytes of a round, against a count by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.roofline import Machine, Need, floor_s, need_of, workload_need
from benchmarks.workloads import read_workload


def test_a_dense_layer_multiplies_forward_and_for_its_weights() -> None:
    need = need_of(nn.Linear(784, 10), torch.zeros(784), examples=60, clients=10)
    # Forward and the gradient of the weights; inputs need none. Each 784 x 10 products and sums.
    assert need.operations == 600 * 2 * (2 * 784 * 10)
    assert need.bytes == 4 * (600 * 784 + 10 * 2 * 7850)


def test_the_cnn_by_hand() -> None:
    first, second = 2 * 26 * 26 * 32 * 9, 2 * 11 * 11 * 64 * 32 * 9
    dense = 2 * 1600 * 64 + 2 * 64 * 10
    need = workload_need(read_workload("w1"))
    assert need.operations == 50 * 50 * (2 * first + 3 * (second + dense))


@pytest.mark.parametrize(("operations", "bytes_", "floor"), [(4e9, 1e3, 2.0), (1e3, 6e9, 3.0)])
def test_the_floor_is_what_takes_longer(operations: float, bytes_: float, floor: float) -> None:
    machine = Machine(gemm_flops_1=1e9, gemm_flops_all=2e9, copy_bytes_per_s=2e9, threads=2)
    assert floor_s(Need(operations=operations, bytes=bytes_), machine) == pytest.approx(floor)
