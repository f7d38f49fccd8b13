"""Randomness as an explicit argument: every random stream derives from a seed and a name.

Pass a `Randomness` to training code: `Simulated` in simulations, `SystemEntropy` on real devices.
"""

from __future__ import annotations

import hashlib
import random
import secrets
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

if TYPE_CHECKING:
    import torch

    from fedcore.privacy.draws import Draws


def derive(seed: int, *words: str | int) -> int:
    """Returns a 63-bit seed for the stream named by ``words``, independent of all other streams.

    >>> derive(1, "cohort", 3) == derive(1, "cohort", 3) != derive(1, "cohort", 4)
    True
    """
    digest = hashlib.sha256(repr((seed, *words)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def numpy_rng(seed: int, *words: str | int) -> np.random.Generator:
    """Returns a NumPy generator for the stream named by ``words``."""
    return np.random.default_rng(derive(seed, *words))


def torch_rng(seed: int, *words: str | int, device: str = "cpu") -> torch.Generator:
    """Returns a torch generator for the stream named by ``words``."""
    import torch

    return torch.Generator(device=device).manual_seed(derive(seed, *words))


@contextmanager
def global_streams(seed: int, *words: str | int) -> Iterator[None]:
    """Seeds the process-wide streams for library code without a generator, then restores them.

    Flower's strategies draw from ``random`` and ``numpy.random``, torch's initialisers and dropout
    from torch's default generator. fedcore itself never draws from these.
    """
    with kept_streams():
        pin_streams(derive(seed, *words))
        yield


@contextmanager
def kept_streams() -> Iterator[None]:
    """Restores the process-wide random streams when the block ends."""
    import torch

    kept_python, kept_numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(kept_python)
            np.random.set_state(kept_numpy)


def pin_streams(seed: int) -> None:
    """Seeds the process-wide random streams."""
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    # Not torch.manual_seed: on a machine without GPUs it queues calls for four device types,
    # each with a traceback, and takes a hundred times as long.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(seed)


def drawn_outside_torch() -> tuple[object, ...]:
    """Returns a value that changes when Python's or NumPy's process-wide stream is drawn from."""
    state: Any = np.random.get_state()
    return random.getstate(), state[1].tobytes(), *state[2:]


class Randomness(Protocol):
    """Source of the random numbers for training."""

    @property
    def origin(self) -> Literal["simulated", "system"]:
        """The kind of source, recorded in the manifest of every model trained with it."""

    def generator(self, device: torch.device, *words: str | int) -> torch.Generator:
        """Returns a generator on ``device`` for the stream named by ``words``."""

    def draws(self, device: torch.device, *words: str | int) -> Draws:
        """Returns batches and noise of the private training named by ``words``, on ``device``."""

    def library_streams(self, *words: str | int) -> AbstractContextManager[None]:
        """Returns a context for library code that draws from process-wide streams."""


@dataclass(frozen=True)
class Simulated:
    """Reproducible randomness from one seed; anyone with the seed can remove its noise."""

    seed: int
    origin: Literal["simulated"] = "simulated"

    def generator(self, device: torch.device, *words: str | int) -> torch.Generator:
        """Returns a generator on ``device``; equal words give equal streams."""
        return torch_rng(self.seed, *words, device=str(device))

    def draws(self, device: torch.device, *words: str | int) -> Draws:
        """Returns batches and noise from the seed; equal words give equal draws."""
        import torch

        from fedcore.privacy.draws import SimulatedDraws

        return SimulatedDraws(
            self.generator(torch.device("cpu"), "order", *words),
            self.generator(device, "noise", *words),
        )

    def library_streams(self, *words: str | int) -> AbstractContextManager[None]:
        """Returns a context that seeds the process-wide streams, then restores them."""
        return global_streams(self.seed, *words)


@dataclass(frozen=True)
class SystemEntropy:
    """Fresh entropy from the operating system for every stream, for real devices."""

    origin: Literal["system"] = "system"

    def generator(self, device: torch.device, *words: str | int) -> torch.Generator:
        """Returns a freshly seeded generator for orders that need no secrecy.

        Its state keeps only 32 bits of the seed; batches and noise of private training come from
        `draws` instead.
        """
        import torch

        return torch.Generator(device=device).manual_seed(secrets.randbits(63))

    def draws(self, device: torch.device, *words: str | int) -> Draws:
        """Returns batches and noise from a cryptographic stream with a fresh 256-bit key."""
        from fedcore.privacy.draws import SystemDraws

        return SystemDraws()

    def library_streams(self, *words: str | int) -> AbstractContextManager[None]:
        """Returns a context that leaves the process-wide streams unchanged."""
        return nullcontext()
