"""Continues a sequence of tokens with a model that gives the next token at each position."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from edge_client.inference.decoder import Decoder
from edge_client.inference.token_cache import TokenCache
from fedcore.artifacts.golden import AnyArray
from fedcore.artifacts.parity import FloatArray
from fedcore.errors import DataError, DeviceError
from fedcore.observability.foreign import foreign


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn from logits."""

    temperature: float = 1.0
    """Divides the logits, >= 0; 0 takes the most likely token."""
    top_k: int | None = None
    """Draws from this many of the most likely tokens alone; from all when None."""
    seed: int | None = None
    """Seed of the sampling: equal seeds give equal tokens on one machine. Random when None."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf or (self.top_k is not None and self.top_k < 1):
            raise DataError(
                f"generate: expected temperature >= 0 and top_k >= 1, got {self.temperature} and "
                f"{self.top_k}. Nothing was generated."
            )

    def generator(self) -> np.random.Generator:
        """Returns the source of the draws."""
        seed = secrets.randbits(128) if self.seed is None else self.seed
        return np.random.Generator(np.random.PCG64(seed))


def prompt_tokens(prompt: str | Sequence[int], labels: Sequence[str]) -> list[int]:
    """Returns the tokens of a prompt.

    Args:
        prompt: Token numbers; or text, where each label is a character.
        labels: Names of the tokens; empty if they have none.

    Raises:
        DataError: the prompt is empty, or has what is no token.
    """
    given: Sequence[object] = prompt
    if isinstance(prompt, str):
        place = {label: number for number, label in enumerate(labels)}
        given = [place.get(one, foreign(repr(one))) for one in prompt]
    most = len(labels) or math.inf
    for one in given:
        if isinstance(one, bool) or not isinstance(one, int | np.integer) or not 0 <= one < most:
            among = f"one of the {len(labels)} labels or their numbers" if labels else "a number"
            raise DataError(f"prompt: {one} is no token, expected {among}. Nothing was generated.")
    if not len(given):
        raise DataError("prompt: expected at least one token, got none. Nothing was generated.")
    return [int(one) for one in given]  # type: ignore[call-overload]


def generated(
    logits_of: Callable[[AnyArray], FloatArray],
    prompt: Sequence[int],
    sampling: Sampling,
    *,
    window: int,
    dtype: str,
) -> Iterator[int]:
    """Yields tokens that continue ``prompt``, without end.

    The model sees the last ``window`` tokens. While there are fewer, the places after them are
    filled with zeros, which a causal model does not look at.

    Args:
        logits_of: The model: ``(window,)`` tokens to logits ``(window, V)``.
        prompt: At least one token.
        sampling: How tokens are drawn.
        window: Tokens that the model takes.
        dtype: The type of its tokens.

    Raises:
        DeviceError: the model does not give logits at each position.
    """
    rng = sampling.generator()
    tokens = list(prompt)
    while True:
        seen = tokens[-window:]
        given = np.zeros(window, dtype)
        given[: len(seen)] = seen
        logits = logits_of(given)
        if logits.ndim != 2 or len(logits) != window or not logits.shape[1]:
            raise DeviceError(
                f"the model gives outputs of shape {logits.shape} for {window} tokens, expected "
                f"({window}, V): logits at each position. Nothing was generated."
            )
        token = drawn(logits[len(seen) - 1], sampling, rng)
        tokens = [*seen, token]
        yield token


def generated_in_steps(
    cache: TokenCache, prompt: Sequence[int], sampling: Sampling, *, window: int
) -> Iterator[int]:
    """Yields tokens that continue ``prompt``, without end; each costs the work of one token.

    The model sees all tokens, up to ``window``. When these are full, it goes on from the last half
    of them: positions in the window change for all tokens then, so the cache is computed anew.

    Args:
        cache: Of no tokens.
        prompt: At least one token; the model sees the last ``window``.
        sampling: How tokens are drawn.
        window: Tokens that the model takes, at least 2.

    Raises:
        DataError: a token is no number of the model's type.
        DeviceError: onnxruntime fails, for example because the model does not know a token.
    """
    rng = sampling.generator()
    seen = fresh = list(prompt)[-window:]
    while True:
        if cache.length + len(fresh) > window:
            cache.clear()
            seen = fresh = seen[-(window // 2) :]
        token = drawn(cache.append(fresh), sampling, rng)
        fresh = [token]
        seen = [*seen[1 - window :], token]
        yield token


def continued(
    decoder: Decoder,
    logits_of: Callable[[AnyArray], FloatArray],
    prompt: Sequence[int],
    sampling: Sampling,
    *,
    window: int,
    dtype: str,
) -> Iterator[int]:
    """Yields tokens by `generated_in_steps` where a model has a decode graph, or by `generated`."""
    cache = decoder.start()
    if cache is not None:
        yield from generated_in_steps(cache, prompt, sampling, window=window)
    yield from generated(logits_of, prompt, sampling, window=window, dtype=dtype)


def drawn(logits: FloatArray, sampling: Sampling, rng: np.random.Generator) -> int:
    """Draws a token from logits ``(V,)``.

    Args:
        logits: One number for each token.
        sampling: Temperature, and of how many tokens.
        rng: Makes the draw.

    Raises:
        DeviceError: a logit is not finite.
    """
    top_k = sampling.top_k
    wide = logits.astype(np.float64)
    if not np.isfinite(wide).all():
        raise DeviceError("the model gives logits that are not finite. No token was drawn.")
    if sampling.temperature == 0 or top_k == 1:
        return int(wide.argmax())
    if top_k is not None and top_k < len(wide):
        kept = np.argsort(-wide, kind="stable")[:top_k]  # of equal logits the first
    else:
        kept = np.arange(len(wide))
    scaled = (wide[kept] - wide[kept].max()) / sampling.temperature
    weights = np.exp(scaled)
    return int(kept[rng.choice(len(kept), p=weights / weights.sum())])
