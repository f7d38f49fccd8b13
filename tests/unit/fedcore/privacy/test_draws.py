"""Batches and noise of private training, and the grid that noise is added on."""

from __future__ import annotations

import math
import os
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

from fedcore.privacy.draws import SimulatedDraws, SystemDraws, _KeyStream, grid_step
from fedcore.seeds import SystemEntropy, global_streams, torch_rng

MORE_THAN_A_CHUNK = 70_001
CPU = torch.device("cpu")


def fixed(key: int = 7) -> SystemDraws:
    """Draws of a known key, and so reproducible."""
    return SystemDraws(_KeyStream(key.to_bytes(32, "big"), bytes(16)))


def simulated(seed: int = 0) -> SimulatedDraws:
    return SimulatedDraws(torch_rng(seed, "order"), torch_rng(seed, "noise"))


def noised(draws: SystemDraws, sums: Tensor, deviation: float, bound: float) -> Tensor:
    found = sums.clone()
    draws.add_noise([found], deviation=deviation, bound=bound)
    return found


def test_key_and_counter_are_384_bits_of_the_operating_system_for_each_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[bytes] = []
    real = os.urandom

    def urandom(size: int) -> bytes:
        asked.append(real(size))
        return asked[-1]

    monkeypatch.setattr(os, "urandom", urandom)
    runs = [SystemEntropy().draws(CPU, 1, "anna") for _ in range(2)]
    assert [len(each) for each in asked] == [32, 16] * 2
    assert len(set(asked)) == 4
    assert all(isinstance(run, SystemDraws) for run in runs)


def test_no_two_runs_are_alike_and_no_two_draws_of_one() -> None:
    one, other = SystemDraws(), SystemDraws()
    drawn = [one.normal(100), one.normal(100), other.normal(100)]
    assert not any(np.isin(a, b).any() for a, b in ((drawn[0], drawn[1]), (drawn[0], drawn[2])))
    batches = [draws.poisson(400, 0.5) for draws in (one, one, other)]
    assert not torch.equal(batches[0], batches[1])
    assert not torch.equal(batches[0], batches[2])


def test_the_process_wide_generators_are_neither_drawn_from_nor_listened_to() -> None:
    found = []
    for _ in range(2):
        with global_streams(1):
            theirs = torch.get_rng_state(), str(np.random.get_state())
            draws = SystemDraws()
            found.append(draws.normal(10))
            draws.poisson(10, 0.5)
            assert torch.equal(torch.get_rng_state(), theirs[0])
            assert str(np.random.get_state()) == theirs[1]
    assert not np.isin(*found).any()


def test_what_is_printed_of_draws_tells_no_key() -> None:
    key = bytes(range(32))
    said = repr(SystemDraws(_KeyStream(key, bytes(16))))
    assert "key hidden" in said
    assert key.hex() not in said
    assert repr(key) not in said


def test_the_stream_is_aes_256_in_counter_mode() -> None:
    """NIST SP 800-38A, F.5.5: the key stream is ciphertext xor plaintext of the first blocks."""
    key = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
    counter = bytes.fromhex("f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff")
    expected = "0bdf7df1591716335e9a8b15c860c502" + "5a6e699d536119065433863c8f657b94"
    stream = _KeyStream(key, counter)
    got = np.concatenate([stream.words(1), stream.words(3)])
    assert got.tobytes().hex() == expected


@pytest.mark.parametrize("deviation", [1e-6, 0.37, 1.0, 5e7])
@pytest.mark.parametrize("ratio", [1e-3, 1.0, 1e6])
def test_sum_and_noise_are_whole_numbers_of_steps_and_added_without_error(
    deviation: float, ratio: float
) -> None:
    bound = ratio * deviation
    step = grid_step(deviation, bound)
    assert math.frexp(step)[0] == 0.5  # a power of two
    rng = torch_rng(1)
    sums = (2 * torch.rand(2000, generator=rng, dtype=torch.float64) - 1) * bound
    sums[:4] = torch.tensor([bound, -bound, 0.0, -0.0], dtype=torch.float64)
    found = noised(fixed(), sums, deviation, bound)
    noise = np.rint(fixed().normal(2000) * (deviation / step))
    assert np.abs(noise).max() > 1000  # fine enough
    for value, total, steps in zip(found.tolist(), sums.tolist(), noise.tolist(), strict=True):
        assert Fraction(value) / Fraction(step) == round(Fraction(total) / Fraction(step)) + int(
            steps
        )


def test_the_same_noise_is_added_whatever_the_sum_is() -> None:
    step = grid_step(1.0, 100.0)
    rng = torch_rng(2)
    sums = [
        torch.zeros(500, dtype=torch.float64),
        200 * torch.rand(500, generator=rng, dtype=torch.float64) - 100,
        torch.full((500,), 100.0, dtype=torch.float64),
        torch.full((500,), 1e-300, dtype=torch.float64),
    ]
    added = []
    for one in sums:
        found = noised(fixed(), one, 1.0, 100.0) / step
        assert torch.equal(found, found.round())  # exact: the step is a power of two
        added.append(found - (one / step).round())
    assert all(torch.equal(one, added[0]) for one in added)
    assert added[0].unique().numel() == 500


def test_the_step_depends_on_no_data_and_leaves_room_for_the_sum() -> None:
    assert grid_step(1.0, 1.0) == 2.0**-36
    assert grid_step(1.5, 1.0) == 2.0**-36
    assert grid_step(0.75, 1.0) == 2.0**-37
    for deviation, bound in ((1.0, 1e9), (1e-3, 1e6), (1e5, 1.0)):
        assert (bound + 16 * deviation) / grid_step(deviation, bound) <= 2.0**52


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_more_than_a_chunk_of_any_shape_is_noised_in_place(dtype: torch.dtype) -> None:
    shapes = [(MORE_THAN_A_CHUNK,), (3, 1 << 16), (7, 5), (), (0,), (2, 0, 3)]
    sums = [torch.full(shape, 3.0, dtype=dtype) for shape in shapes]
    places = [one.data_ptr() for one in sums]
    fixed().add_noise(sums, deviation=2.0, bound=3.0)
    assert [one.data_ptr() for one in sums] == places
    assert [tuple(one.shape) for one in sums] == shapes
    assert all(one.dtype == dtype for one in sums)
    noise = torch.cat([one.flatten().double() - 3 for one in sums])
    # No chunk and no tensor begins again: hardly any number is there twice, by rounding alone.
    most = 1e-5 if dtype == torch.float64 else 0.05
    assert len(noise) - noise.unique().numel() <= most * len(noise)
    assert abs(noise.std().item() - 2) < 2 * 4.9 / math.sqrt(2 * len(noise))


def test_float32_holds_the_rounded_sum_of_the_grid() -> None:
    sums = torch.randn(1000, generator=torch_rng(3), dtype=torch.float64).float()
    wide = noised(fixed(), sums.double(), 0.5, 10.0)
    assert torch.equal(noised(fixed(), sums, 0.5, 10.0), wide.float())


def test_a_sum_that_lies_apart_in_memory_is_noised_where_it_lies() -> None:
    sums = torch.zeros(40, 50, dtype=torch.float64).t()
    together = torch.zeros(50, 40, dtype=torch.float64)
    fixed().add_noise([sums], deviation=1.0, bound=1.0)
    fixed().add_noise([together], deviation=1.0, bound=1.0)
    assert torch.equal(sums, together)


def test_an_odd_number_of_normals_is_drawn_whole() -> None:
    assert fixed().normal(7).shape == (7,)
    assert fixed().normal(1).shape == (1,)
    assert fixed().normal(0).shape == (0,)


@pytest.mark.parametrize(
    "draws", [fixed(), SystemDraws(), simulated()], ids=["fixed", "fresh", "simulated"]
)
def test_a_batch_is_row_numbers_in_rising_order(draws: SystemDraws | SimulatedDraws) -> None:
    for _ in range(20):
        rows = draws.poisson(100, 0.5)
        assert rows.dtype == torch.int64
        assert rows.dim() == 1
        assert torch.equal(rows, rows.unique())
        assert rows.numel() == 0 or (rows[0] >= 0 and rows[-1] < 100)


def test_a_rate_of_one_takes_every_example_and_a_tiny_one_none() -> None:
    for draws in (SystemDraws(), simulated()):
        assert torch.equal(draws.poisson(1000, 1.0), torch.arange(1000))
        assert draws.poisson(1000, 1e-12).numel() == 0  # but for once in a thousand million runs


def test_each_example_is_taken_at_its_rate_and_by_itself() -> None:
    draws, count, steps = fixed(), 500, 400
    for rate in (0.5, 0.03):
        taken = torch.zeros(steps, count, dtype=torch.float64)
        for step in range(steps):
            taken[step, draws.poisson(count, rate)] = 1
        variance = rate * (1 - rate)
        assert abs(taken.mean().item() - rate) < 4.9 * math.sqrt(variance / (steps * count))
        spread = taken.sum(1).var().item() / (count * variance)
        assert abs(spread - 1) < 4.9 * math.sqrt(2 / (steps - 1))
        centred = taken - rate
        for one, other in ((centred[:, 1:], centred[:, :-1]), (centred[1:], centred[:-1])):
            together = (one * other).mean().item() / variance
            assert abs(together) < 4.9 / math.sqrt(one.numel())


@pytest.mark.parametrize("what", ["sampling", "noise"])
def test_simulated_draws_are_those_of_their_seeds(what: str) -> None:
    def drawn(seeds: dict[str, int]) -> tuple[Tensor, Tensor]:
        draws = SimulatedDraws(
            torch_rng(seeds.get("sampling", 0), "order"), torch_rng(seeds.get("noise", 0), "noise")
        )
        sums = [torch.zeros(50, dtype=torch.float64), torch.zeros(2, 3)]
        rows = draws.poisson(200, 0.5)
        draws.add_noise(sums, deviation=2.0, bound=1.0)
        return rows, torch.cat([one.flatten().double() for one in sums])

    base, again, other = drawn({}), drawn({}), drawn({what: 1})
    assert torch.equal(base[0], again[0])
    assert torch.equal(base[1], again[1])
    assert torch.equal(base[0], other[0]) == (what == "noise")
    assert torch.equal(base[1], other[1]) == (what == "sampling")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no processes are forked off here")
def test_a_process_that_is_forked_off_draws_other_numbers() -> None:
    draws = SystemDraws()
    draws.normal(3)
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.write(write, draws.normal(4).tobytes())
        os._exit(0)
    os.waitpid(child, 0)
    theirs = np.frombuffer(os.read(read, 32))
    os.close(read)
    os.close(write)
    assert len(set(theirs) | set(draws.normal(4))) == 8


@pytest.mark.parametrize("deviation", [0.0, -1.0, 1e-320, 1e155, math.inf, math.nan])
def test_a_deviation_without_room_for_a_grid_is_refused(deviation: float) -> None:
    with pytest.raises(ValueError, match="too large for a float64 grid"):
        SystemDraws().add_noise([torch.zeros(3)], deviation=deviation, bound=1.0)
