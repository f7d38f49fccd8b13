"""Where the random numbers of one private training run come from: batches and noise.

On devices both come from AES-256 in counter mode under a key that the operating system draws for
one training run and that is then forgotten. There is no seed. A torch generator would not do: on
CPUs it keeps 32 bits of its seed, which a scan finds in minutes, and its normal numbers stop at
5.77 standard deviations.
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
"""Noise is drawn larger by this share, and so covers what rounding adds to a sum's sensitivity: of
float32 arithmetic in gradients, norms and sums, and of the grid."""

_CHUNK = 1 << 16  # normal numbers at a time: their buffers stay in a core's cache
_GRID_BITS = 36  # the grid's step is deviation * 2**-36, rounded down to a power of two
_EXACT_BITS = 51  # sums and noise are below 2**51 steps, so that what is added to round them fits
_TO_UNIT = 2.0**-63


class Draws(Protocol):
    """The random numbers of one private training run."""

    def seed(self) -> int:
        """Below 2**62: where dropout and augmentation of data begin, which protect nobody."""

    def poisson(self, count: int, rate: float) -> Tensor:
        """One Poisson sample of ``count`` examples.

        Args:
            count: Examples to choose from.
            rate: Probability of each one, in (0, 1].

        Returns:
            The chosen row numbers in rising order, int64, shape ``(B,)`` with B from 0 to count.
        """

    def add_noise(self, sums: Sequence[Tensor], *, deviation: float, bound: float) -> None:
        """Adds independent Gaussian noise to every entry, in place.

        Args:
            sums: Tensors of any shape, on any device, float32 or float64.
            deviation: Standard deviation, > 0, in the unit of ``sums``.
            bound: No entry's absolute value exceeds it before; chosen without looking at data.
        """


@dataclass(frozen=True)
class SimulatedDraws:
    """Draws from torch generators: reproducible from their seeds, and so no protection at all."""

    sampling: torch.Generator
    """On the CPU."""
    noise: torch.Generator
    """On the device of the sums."""

    def seed(self) -> int:
        """The seed that batches are drawn from, see `Draws.seed`."""
        return self.sampling.initial_seed() & (2**62 - 1)

    def poisson(self, count: int, rate: float) -> Tensor:
        """One Poisson sample, see `Draws.poisson`."""
        return (torch.rand(count, generator=self.sampling) < rate).nonzero().flatten()

    def add_noise(self, sums: Sequence[Tensor], *, deviation: float, bound: float) -> None:
        """Adds torch's own normal numbers, see `Draws.add_noise`."""
        for tensor in sums:
            tensor += torch.normal(
                0.0, deviation, tensor.shape, generator=self.noise, device=tensor.device
            )


@dataclass(frozen=True)
class SystemDraws:
    """Draws from a cryptographic stream whose key nobody knows: what real devices use.

    Guarantee:
        The key has 256 bits from the operating system, and the initial counter 128 more; both are
        drawn for this object alone and never written anywhere. To tell its numbers from ideal ones
        is to break AES-256.

        Noise is a Gaussian number rounded to a grid. Its step, a power of two near
        ``deviation * 2**-36``, depends on no data. The sum is rounded to the same grid before, and
        both are added as whole numbers, without error. So the result is the rounding of a Gaussian
        mechanism's output, whatever the data are: every grid point can be the result of every sum,
        and the low-order bits of the result hold nothing of the sum. The attacks of Mironov 2012
        and Haney et al. 2022 read the sum off those bits.

        Tails reach 9.3 standard deviations: uniform numbers have 63 bits, logarithm, root and
        cosine are taken in float64, whose step is 2**16 times finer than the grid's.

    Source:
        Box and Muller 1958; Mironov 2012, 10.1145/2382196.2382264; Haney et al. 2022,
        arXiv:2207.13793; a grid as for the discrete Gaussian of Canonne, Kamath, Steinke 2020,
        arXiv:2004.00010.
    """

    _stream: _KeyStream = field(default_factory=lambda: _KeyStream(os.urandom(32), os.urandom(16)))

    def seed(self) -> int:
        """Fresh, see `Draws.seed`."""
        return int(self._stream.words(1)[0] >> np.uint64(2))

    def poisson(self, count: int, rate: float) -> Tensor:
        """One Poisson sample, see `Draws.poisson`; the rate holds within 2**-53."""
        uniform = (self._stream.words(count) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        return torch.from_numpy(np.flatnonzero(uniform < rate))

    def add_noise(self, sums: Sequence[Tensor], *, deviation: float, bound: float) -> None:
        """Adds Gaussian noise on a grid, see `Draws.add_noise`."""
        step = grid_step(deviation, bound)
        shift = 1.5 * 2.0 ** (_EXACT_BITS + 1) * step  # where float64 numbers lie a step apart
        cpu = torch.device("cpu")
        exact = [tensor.detach().to(cpu, torch.float64).reshape(-1) for tensor in sums]
        chunks = self._normals(sum(map(len, exact)), deviation, -shift)
        for parts, steps in zip(_in_chunks(exact), chunks, strict=True):
            torch._foreach_add_(parts, shift)  # rounds to the grid, as noise is; the rest is exact
            torch._foreach_add_(parts, torch.split(steps, [len(part) for part in parts]))
        for tensor, one in zip(sums, exact, strict=True):
            if one.data_ptr() != tensor.data_ptr():
                tensor.copy_(one.view(tensor.shape))

    def normal(self, count: int) -> NDArray[np.float64]:
        """Independent standard normal numbers, float64, shape ``(count,)``, not yet on a grid."""
        chunks = [chunk.clone() for chunk in self._normals(count, 1.0, 0.0)]
        return torch.cat([torch.empty(0, dtype=torch.float64), *chunks]).numpy()

    def _normals(self, count: int, deviation: float, mean: float) -> Iterator[Tensor]:
        """Independent normal numbers, float64, in chunks; each overwrites the one before."""
        most = min(_CHUNK, count + count % 2)
        filled, pair = np.empty(most, np.uint64), torch.empty(most, dtype=torch.float64)
        half, middle = torch.tensor([_TO_UNIT / 2, mean], dtype=torch.float64).unbind()
        for start in range(0, count, _CHUNK):
            size = min(_CHUNK, count - start)
            words = filled[: size + size % 2]
            self._stream.fill(words)
            angle, radius = pair[: len(words)].view(2, -1).unbind()
            of_angle, of_radius = torch.from_numpy(words.view(np.int64)).view(2, -1).unbind()
            angle.copy_(of_angle).mul_(math.pi * _TO_UNIT)  # in [-pi, pi)
            torch.add(half, radius.copy_(of_radius).abs_(), alpha=_TO_UNIT, out=radius)  # (0, 1]
            numbers = radius.numpy()
            np.log(numbers, out=numbers)  # three times as fast as torch's, the root twice
            np.multiply(numbers, -2 * deviation * deviation, out=numbers)
            np.sqrt(numbers, out=numbers)
            found = torch.from_numpy(words.view(np.float64))  # over the words, which have served
            cosines, sines = found.view(2, -1).unbind()
            torch.addcmul(middle, torch.cos(angle, out=cosines), radius, out=cosines)
            torch.addcmul(middle, torch.sin(angle, out=sines), radius, out=sines)
            yield found[:size]


def _in_chunks(flat: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Views of all entries in turn, ``_CHUNK`` of them at a time."""
    parts: list[Tensor] = []
    room = _CHUNK
    for tensor in flat:
        while len(tensor):
            parts.append(tensor[:room])
            tensor, room = tensor[room:], room - len(parts[-1])
            if not room:
                yield parts
                parts, room = [], _CHUNK
    if parts:
        yield parts


def grid_step(deviation: float, bound: float) -> float:
    """The step of the grid on which sums up to ``bound`` and their noise add up without error."""
    finest = math.floor(math.log2(deviation)) - _GRID_BITS
    needed = math.ceil(math.log2(bound + 16 * deviation)) - _EXACT_BITS
    return 2.0 ** max(finest, needed)


class _KeyStream:
    """AES-256 in counter mode, as 64-bit words; the key is nowhere but in the cipher."""

    def __init__(self, key: bytes, counter: bytes) -> None:
        self._cipher = Cipher(algorithms.AES256(key), modes.CTR(counter)).encryptor()
        self._zeros = memoryview(bytes(_CHUNK * 8))

    def __repr__(self) -> str:
        return "_KeyStream(key hidden)"

    def words(self, count: int) -> NDArray[np.uint64]:
        """The next words of the stream, shape ``(count,)``."""
        filled = np.empty(count, np.uint64)
        self.fill(filled)
        return filled

    def fill(self, words: NDArray[np.uint64]) -> None:
        """Overwrites ``words`` with the next ones of the stream."""
        target, size = words.view(np.uint8).data, len(self._zeros)
        for start in range(0, len(target), size):
            part = target[start : start + size]
            self._cipher.update_into(self._zeros[: len(part)], part)
