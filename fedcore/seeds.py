"""Randomness as an argument: every stream is derived from one seed and the words that name it."""

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
    """A 63-bit seed for the stream that ``words`` name, independent of all other streams.

    >>> derive(1, "cohort", 3) == derive(1, "cohort", 3) != derive(1, "cohort", 4)
    True
    """
    digest = hashlib.sha256(repr((seed, *words)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def numpy_rng(seed: int, *words: str | int) -> np.random.Generator:
    """A NumPy generator for the stream that ``words`` name."""
    return np.random.default_rng(derive(seed, *words))


def torch_rng(seed: int, *words: str | int, device: str = "cpu") -> torch.Generator:
    """A torch generator for the stream that ``words`` name."""
    import torch

    return torch.Generator(device=device).manual_seed(derive(seed, *words))


@contextmanager
def global_streams(seed: int, *words: str | int) -> Iterator[None]:
    """Pins the process-wide streams for library code that takes no generator, then restores them.

    Flower's strategies draw from ``random`` and ``numpy.random``, torch's initialisers and dropout
    from torch's default generator. Nothing of ours draws from these.
    """
    with kept_streams():
        pin_streams(derive(seed, *words))
        yield


@contextmanager
def kept_streams() -> Iterator[None]:
    """Restores the process-wide streams afterwards."""
    import torch

    kept_python, kept_numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(kept_python)
            np.random.set_state(kept_numpy)


def pin_streams(seed: int) -> None:
    """Has the process-wide streams begin at a seed."""
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    # Not torch.manual_seed: on a machine without GPUs it queues calls for four kinds of them,
    # each with a traceback, and takes a hundred times as long.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(seed)


def drawn_outside_torch() -> tuple[object, ...]:
    """Something that differs once Python's or NumPy's process-wide stream was drawn from."""
    state: Any = np.random.get_state()
    return random.getstate(), state[1].tobytes(), *state[2:]


class Randomness(Protocol):
    """Where the random numbers of training come from."""

    @property
    def origin(self) -> Literal["simulated", "system"]:
        """Named in the manifest of whatever is trained with it."""

    def generator(self, device: torch.device, *words: str | int) -> torch.Generator:
        """A generator on ``device`` for the stream that ``words`` name."""

    def draws(self, device: torch.device, *words: str | int) -> Draws:
        """Batches and noise of the private training run that ``words`` name, on ``device``."""

    def library_streams(self, *words: str | int) -> AbstractContextManager[None]:
        """Stands around library code that draws from process-wide streams."""


@dataclass(frozen=True)
class Simulated:
    """Everything from one seed, reproducible, and so no protection to anyone."""

    seed: int
    origin: Literal["simulated"] = "simulated"

    def generator(self, device: torch.device, *words: str | int) -> torch.Generator:
        """The same generator for the same words."""
        return torch_rng(self.seed, *words, device=str(device))

    def draws(self, device: torch.device, *words: str | int) -> Draws:
        """Draws from the seed, the same for the same words."""
        import torch

        from fedcore.privacy.draws import SimulatedDraws

        return SimulatedDraws(
            self.generator(torch.device("cpu"), "order", *words),
            self.generator(device, "noise", *words),
        )

    def library_streams(self, *words: str | int) -> AbstractContextManager[None]:
        """Pins the process-wide streams."""
        return global_streams(self.seed, *words)


@dataclass(frozen=True)
class SystemEntropy:
    """Fresh entropy from the operating system for every stream: what real devices use."""

    origin: Literal["system"] = "system"

    def generator(self, device: torch.device, *words: str | int) -> torch.Generator:
        """A generator seeded afresh, for orders that protect nobody: it keeps 32 bits of its seed.

        Batches and noise of private training come from `draws` instead.
        """
        import torch

        return torch.Generator(device=device).manual_seed(secrets.randbits(63))

    def draws(self, device: torch.device, *words: str | int) -> Draws:
        """Draws from a cryptographic stream under a fresh 256-bit key."""
        from fedcore.privacy.draws import SystemDraws

        return SystemDraws()

    def library_streams(self, *words: str | int) -> AbstractContextManager[None]:
        """Leaves the process-wide streams alone."""
        return nullcontext()
