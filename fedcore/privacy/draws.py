"""Random numbers of one private training run: Poisson-sampled batches and Gaussian noise.

On devices both come from AES-256 in counter mode, under a key that the operating system generates
for one training run and that is then discarded. There is no seed. A torch generator would not
suffice: on CPUs it retains 32 bits of its seed, which a brute-force search finds in minutes, and
its normal numbers end at 5.77 standard deviations.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray
from torch import Tensor

FLOAT_MARGIN = 1e-4
"""Relative increase of the noise, to cover what rounding adds to a sum's sensitivity: that of
float32 arithmetic in gradients, norms and sums, and that of the grid."""

_CHUNK = 1 << 15  # words per chunk: with as many zeros, 512 KiB in a core's cache
_GRID_BITS = 36  # the grid's step is deviation * 2**-36, rounded down to a power of two
_MIN_DEVIATION = 1e-100  # from it to its inverse, float64 represents the grid with a wide margin
_EXACT_BITS = 51  # sums and noise stay below 2**51 steps, so that the shift that rounds them fits


class Draws(Protocol):
    """Source of the random numbers of one private training run."""

    def seed(self) -> int:
        """Returns a seed below 2**62 for dropout and augmentation, which protect nobody."""

    def poisson(self, count: int, rate: float) -> Tensor:
        """Returns one Poisson sample of ``count`` examples.

        Args:
            count: Examples to choose from.
            rate: Probability of each one, in (0, 1].

        Returns:
            The chosen row numbers in ascending order, int64, shape ``(B,)`` with B from 0 to count.
        """

    def add_noise(self, sums: Sequence[Tensor], *, deviation: float, bound: float) -> None:
        """Adds independent Gaussian noise to every entry, in place.

        Args:
            sums: Tensors of any shape, on any device, float32 or float64.
            deviation: Standard deviation, > 0, in the unit of ``sums``.
            bound: Upper bound on every entry's absolute value before noise; chosen independently of
                the data.
        """


@dataclass(frozen=True)
class SimulatedDraws:
    """Draws from torch generators: reproducible from their seeds, and so without any protection."""

    sampling: torch.Generator
    """Generator for batches, on the CPU."""
    noise: torch.Generator
    """Generator for noise, on the device of the sums."""

    def seed(self) -> int:
        """Returns the seed of the sampling generator, reduced below 2**62."""
        return self.sampling.initial_seed() & (2**62 - 1)

    def poisson(self, count: int, rate: float) -> Tensor:
        """Returns one Poisson sample of ``count`` examples, as ascending row numbers."""
        return (torch.rand(count, generator=self.sampling) < rate).nonzero().flatten()

    def add_noise(self, sums: Sequence[Tensor], *, deviation: float, bound: float) -> None:
        """Adds torch's normal numbers to every entry, in place; ignores ``bound``."""
        for tensor in sums:
            tensor += torch.normal(
                0.0, deviation, tensor.shape, generator=self.noise, device=tensor.device
            )


@dataclass(frozen=True)
class SystemDraws:
    """Draws from a cryptographic stream under a secret key, for real devices.

    Guarantee:
        The key has 256 bits from the operating system, and the initial counter another 128; both
        are drawn for this object only and never written anywhere. Distinguishing its numbers from
        ideal ones requires breaking AES-256.

        Noise is a Gaussian number rounded to a grid, whose step, a power of two near
        ``deviation * 2**-36``, does not depend on the data. The sum is rounded to the same grid
        first, and both are added as integers, without error. So the result is the rounded output of
        a Gaussian mechanism, for any data: every grid point can result from every sum, and the
        low-order bits reveal nothing about the sum. The attacks of Mironov 2012 and Haney et al.
        2022 recover the sum from those bits.

        Tails reach 9.3 standard deviations: uniform numbers have 63 bits, and logarithm, root and
        cosine are computed in float64, whose step is 2**16 times finer than the grid's.

    Source:
        Box and Muller 1958; Mironov 2012, 10.1145/2382196.2382264; Haney et al. 2022,
        arXiv:2207.13793; the grid follows the discrete Gaussian of Canonne, Kamath, Steinke 2020,
        arXiv:2004.00010.
    """

    _stream: _KeyStream = field(default_factory=lambda: _KeyStream(os.urandom(32), os.urandom(16)))

    def seed(self) -> int:
        """Returns a fresh seed below 2**62."""
        return int(self._stream.words(1)[0] >> np.uint64(2))

    def poisson(self, count: int, rate: float) -> Tensor:
        """Returns one Poisson sample as ascending row numbers; the rate is exact to 2**-53."""
        uniform = (self._stream.words(count) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        return torch.from_numpy(np.flatnonzero(uniform < rate))

    def add_noise(self, sums: Sequence[Tensor], *, deviation: float, bound: float) -> None:
        """Adds Gaussian noise on a grid to every entry, in place.

        Args:
            sums: Tensors of any shape, on any device, float32 or float64.
            deviation: Standard deviation, > 0, in the unit of ``sums``.
            bound: Upper bound on every entry's absolute value before noise; chosen independently of
                the data.

        Raises:
            ValueError: ``deviation`` is outside 1e-100 to 1e100, where float64 cannot represent the
                grid.
        """
        if not _MIN_DEVIATION <= deviation <= 1 / _MIN_DEVIATION:
            raise ValueError(f"a deviation of {deviation:g}: too large for a float64 grid")
        step = grid_step(deviation, bound)
        shift = 1.5 * 2.0 ** (_EXACT_BITS + 1) * step  # where float64's spacing is one step
        exact = [one if _is_plain(one) else one.to("cpu", torch.float64) for one in sums]
        exact = [one if one.is_contiguous() else one.contiguous() for one in exact]
        self._add([one.detach().numpy().reshape(-1) for one in exact], deviation, shift)
        for tensor, one in zip(sums, exact, strict=True):
            if one is not tensor:
                tensor.copy_(one)

    def normal(self, count: int) -> NDArray[np.float64]:
        """Returns independent standard normal numbers, float64, ``(count,)``, without rounding."""
        found = np.zeros(count)
        self._add([found], 1.0, 0.0)
        return found

    def _add(self, sums: Sequence[NDArray[np.float64]], deviation: float, shift: float) -> None:
        """Adds normal numbers to each ``(N,)`` array by `fedcore.kernels.normal.add_normals`."""
        from fedcore.kernels.normal import add_normals  # compiles on first use

        parts = [part for one in sums for part in _in_chunks(one)]
        left = sum(len(part) + len(part) % 2 for part in parts)
        words = np.empty(0, np.uint64)
        room = np.empty(min(left, _CHUNK), np.uint64)
        for part in parts:
            half = (len(part) + 1) // 2
            if len(words) < 2 * half:  # the rest of a chunk stays unused
                words = room[: max(2 * half, min(left, _CHUNK))]
                self._stream.fill(words)
            angles, radii, words = words[:half], words[half : 2 * half], words[2 * half :]
            add_normals(angles, radii, part[:half], part[half:], deviation, shift)
            left -= 2 * half


def _is_plain(one: Tensor) -> bool:
    return one.dtype is torch.float64 and one.is_cpu


def _in_chunks(one: NDArray[np.float64]) -> Iterator[NDArray[np.float64]]:
    for start in range(0, len(one), _CHUNK):
        yield one[start : start + _CHUNK]


def grid_step(deviation: float, bound: float) -> float:
    """Returns the grid step at which sums up to ``bound`` and their noise add up without error."""
    finest = math.floor(math.log2(deviation)) - _GRID_BITS
    needed = math.ceil(math.log2(bound + 16 * deviation)) - _EXACT_BITS
    return 2.0 ** max(finest, needed)


class _KeyStream:
    """AES-256 in counter mode, as 64-bit words; only the cipher object keeps the key.

    A forked process gets its own key, as it would otherwise draw this process's numbers.
    """

    def __init__(self, key: bytes, counter: bytes) -> None:
        self._zeros = memoryview(bytes(_CHUNK * 8))
        self._begin(key, counter)

    def _begin(self, key: bytes, counter: bytes) -> None:
        self._process = os.getpid()
        self._cipher = Cipher(algorithms.AES256(key), modes.CTR(counter)).encryptor()

    def __repr__(self) -> str:
        return "_KeyStream(key hidden)"

    def words(self, count: int) -> NDArray[np.uint64]:
        """Returns the next words of the stream, shape ``(count,)``."""
        filled = np.empty(count, np.uint64)
        self.fill(filled)
        return filled

    def fill(self, words: NDArray[np.uint64]) -> None:
        """Overwrites ``words`` with the next words of the stream."""
        if os.getpid() != self._process:
            self._begin(os.urandom(32), os.urandom(16))
        target, size = words.view(np.uint8).data, len(self._zeros)
        for start in range(0, len(target), size):
            part = target[start : start + size]
            self._cipher.update_into(self._zeros[: len(part)], part)
