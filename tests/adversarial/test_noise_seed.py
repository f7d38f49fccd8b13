"""Noise and batches of a seed of 32 bits are stripped by a scan; those of devices are not.

Devices used to draw both from torch's generator on the CPU, a Mersenne Twister of which
``manual_seed`` keeps 32 bits. Here the seed lies below 2**24, so that a test can scan them all; the
scan of all 2**32 takes 256 times as long.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numba
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fedcore.config.run import ClientConfig
from fedcore.privacy.accounting import Charge
from fedcore.privacy.draws import FLOAT_MARGIN, Draws, SimulatedDraws, SystemDraws
from fedcore.privacy.planning import PrivatePlan
from fedcore.seeds import numpy_rng, torch_rng
from fedcore.training.private import train_private
from tests.ways import way_of

SEEDS = 1 << 24
NOISE_SEED, SAMPLING_SEED, KNOWN_SEED = 9_876_543, 16_000_001, 123_456
MULTIPLIER, CLIP, RATE, EXAMPLES = 1.3, 0.7, 0.5, 64
BLANK, OUTS = 32, 16  # inputs that are zero in every example, as a picture's margin is
Words = NDArray[np.uint32]

LANES = 128
_STATES = 397 + 64 + 1


@numba.njit  # type: ignore[untyped-decorator]
def _scan(last: int, question: Words, place: Words, low: Words, high: Words) -> list[Any]:
    """Seeds below ``last`` whose Mersenne Twister gives ``low <= 24 bits < high`` at each place.

    ``LANES`` seeds at a time, side by side, so that one instruction serves eight of them. A row of
    the arguments is a condition; those of one question stand together, and all must hold.

    Returns:
        Pairs of a question and a seed.
    """
    found = [(0, 0)][:0]
    states = np.empty((_STATES, LANES), np.uint32)
    alive = np.ones(LANES, np.uint32)
    for base in range(0, last, LANES):
        for lane in range(LANES):
            states[0, lane] = base + lane
        for row in range(1, _STATES):
            for lane in range(LANES):
                before = states[row - 1, lane]
                mixed = np.uint32(before ^ (before >> np.uint32(30)))
                states[row, lane] = np.uint32(np.uint32(1812433253) * mixed) + np.uint32(row)
        left = np.uint32(1)
        for index in range(len(place)):
            if index == 0 or question[index] != question[index - 1]:
                alive[:] = 1
                left = np.uint32(1)
            if left == 0:
                continue
            row, left = place[index], np.uint32(0)
            for lane in range(LANES):
                mixed = np.uint32(
                    (states[row, lane] & np.uint32(0x80000000))
                    | (states[row + 1, lane] & np.uint32(0x7FFFFFFF))
                )
                odd = np.uint32(states[row + 1, lane] & np.uint32(1)) * np.uint32(0x9908B0DF)
                y = np.uint32(states[row + 397, lane] ^ (mixed >> np.uint32(1)) ^ odd)
                y = np.uint32(y ^ (y >> np.uint32(11)))
                y = np.uint32(y ^ ((y << np.uint32(7)) & np.uint32(0x9D2C5680)))
                y = np.uint32(y ^ ((y << np.uint32(15)) & np.uint32(0xEFC60000)))
                y = np.uint32(y ^ (y >> np.uint32(18))) & np.uint32(0xFFFFFF)
                alive[lane] &= np.uint32(low[index] <= y) & np.uint32(y < high[index])
                left |= alive[lane]
            if left and (index + 1 == len(place) or question[index + 1] != question[index]):
                for lane in range(LANES):
                    if alive[lane]:
                        found.append((question[index], base + lane))
    return found


Question = list[tuple[int, int, int]]
"""Conditions on a stream: place, and the least 24 bits and the first too large there."""


def scan(questions: Sequence[Question]) -> list[list[int]]:
    """For each question all seeds below 2**24 under which its conditions hold; one pass for all."""
    rows = [(number, *one) for number, asked in enumerate(questions) for one in asked]
    columns = [np.array(one, np.uint32) for one in zip(*rows, strict=True)]
    found = _scan(SEEDS, *columns)
    return [
        [seed for number, seed in found if number == wanted] for wanted in range(len(questions))
    ]


def asks_noise(z: Tensor) -> Question:
    """Which torch generator begins with such normal numbers, of at least 16?

    Torch makes of every 16 words 16 numbers: words ``i`` and ``i + 8`` are the radius and the angle
    of numbers ``i`` and ``i + 8``.
    """
    wanted = []
    for place in (0, 1):
        one, other = z[place].item(), z[place + 8].item()
        radius = 1 - math.exp(-(one**2 + other**2) / 2)
        angle = math.atan2(other, one) / (2 * math.pi) % 1
        for word, share in ((place, radius), (place + 8, angle)):
            middle, slack = round(share * 2**24), 1 << 12
            wanted.append((word, max(0, middle - slack), middle + slack))
    return wanted


def draws_noise(seed: int, z: Tensor) -> bool:
    """Whether a seed that the scan found explains every number."""
    drawn = torch.normal(0.0, 1.0, z.shape, generator=torch.Generator().manual_seed(seed))
    return torch.allclose(drawn, z, atol=1e-2)


def asks_batch(rows: Tensor) -> Question:
    """Under which seed is ``torch.rand(EXAMPLES) < RATE`` true for just these rows?"""
    taken, limit = set(rows.tolist()), round(RATE * 2**24)
    return [(r, 0, limit) if r in taken else (r, limit, 1 << 24) for r in range(EXAMPLES)]


@dataclass(frozen=True)
class Watched:
    """Draws whose batches an attacker sees, as whoever knows the examples can find them out."""

    draws: Draws
    batches: list[Tensor] = field(default_factory=list)

    def seed(self) -> int:
        return self.draws.seed()

    def poisson(self, count: int, rate: float) -> Tensor:
        self.batches.append(self.draws.poisson(count, rate))
        return self.batches[-1]

    def add_noise(self, sums: Sequence[Tensor], *, deviation: float, bound: float) -> None:
        self.draws.add_noise(sums, deviation=deviation, bound=bound)


def attacked(draws: Draws) -> tuple[Tensor, Tensor]:
    """One private step, as a server sees it: the noise at blank inputs, and the batch's rows."""
    model = nn.Linear(6 + BLANK, OUTS, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.randn(model.weight.shape, generator=torch_rng(0)) / 10)
    start = model.weight.detach().clone()
    inputs = torch.randn(EXAMPLES, 6 + BLANK, generator=torch_rng(1))
    inputs[:, :BLANK] = 0
    data: Any = TensorDataset(inputs, torch.arange(EXAMPLES) % OUTS)
    loss, watched = nn.functional.cross_entropy, Watched(draws)
    train_private(
        nn.Identity(),
        model,
        data,
        loss,
        ClientConfig(learning_rate=1.0),
        PrivatePlan(Charge(1, MULTIPLIER, RATE, 1), CLIP),
        method=way_of(model, loss, inputs[0]),
        draws=watched,
    )
    moved = (start - model.weight.detach())[0, :BLANK].double()
    noise = moved * (EXAMPLES * RATE) / (MULTIPLIER * CLIP * (1 + FLOAT_MARGIN))
    return noise.float(), watched.batches[0]


def old_draws() -> SimulatedDraws:
    """What devices drew from: torch's generators, of seeds that nobody is told."""
    return SimulatedDraws(
        torch.Generator().manual_seed(SAMPLING_SEED), torch.Generator().manual_seed(NOISE_SEED)
    )


@dataclass(frozen=True)
class Scanned:
    """What one scan found."""

    old_noise: list[int]
    old_batch: list[int]
    new_noise: list[int]
    new_batch: list[int]
    guessed: list[int]
    known: list[int]


@pytest.fixture(scope="module")
def scanned() -> Scanned:
    old, new = attacked(old_draws()), attacked(SystemDraws())
    assert new[0].std().item() > 0.3  # there is noise to look at
    assert 8 < len(new[1]) < 56
    guess = torch.from_numpy(numpy_rng(1, "z").standard_normal(BLANK)).float()
    known = torch.rand(64, generator=torch.Generator().manual_seed(KNOWN_SEED + 7 * 2**32))
    bits = (known.double() * 2**24).long().tolist()
    found = scan(
        [
            *(asks_noise(old[0]), asks_batch(old[1]), asks_noise(new[0]), asks_batch(new[1])),
            *(asks_noise(guess), [(place, one, one + 1) for place, one in enumerate(bits)]),
        ]
    )
    for place, z in ((0, old[0]), (2, new[0]), (4, guess)):
        found[place] = [seed for seed in found[place] if draws_noise(seed, z)]
    return Scanned(*found)


def test_torch_keeps_32_bits_of_a_seed_and_the_scan_knows_its_stream(scanned: Scanned) -> None:
    assert scanned.known == [KNOWN_SEED]


def test_the_seed_of_noise_that_a_torch_generator_drew_is_found(scanned: Scanned) -> None:
    assert scanned.old_noise == [NOISE_SEED]


def test_the_seed_of_a_batch_that_a_torch_generator_drew_is_found(scanned: Scanned) -> None:
    assert scanned.old_batch == [SAMPLING_SEED]


def test_the_scan_finds_nothing_in_what_a_device_draws(scanned: Scanned) -> None:
    assert scanned.new_noise == []
    assert scanned.new_batch == []


def test_the_scan_is_not_one_that_always_answers(scanned: Scanned) -> None:
    assert scanned.guessed == []


@pytest.mark.parametrize("seeded", [torch.manual_seed, np.random.seed])
def test_nor_does_seeding_the_process_make_a_device_repeat_itself(
    seeded: Callable[[int], object],
) -> None:
    state, of_numpy = torch.get_rng_state(), np.random.get_state()
    try:
        seen = []
        for _ in range(2):
            seeded(1)
            seen.append(attacked(SystemDraws()))
    finally:
        torch.set_rng_state(state)
        np.random.set_state(of_numpy)
    assert not torch.isclose(seen[0][0], seen[1][0], rtol=0, atol=1e-6).any()
    assert not torch.equal(seen[0][1], seen[1][1])
