"""A small GPT over characters, random tokens for it, and a bare training loop to compare with."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from fedcore.training.batches import BatchReader

CHARACTERS = 65


class GptSizes(Protocol):
    """What a model and its batches need to know."""

    @property
    def layers(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def context(self) -> int: ...
    @property
    def batch(self) -> int: ...
    @property
    def steps(self) -> int: ...


class GptBlock(nn.Module):
    """Causal self-attention and a feed-forward layer, each with a residual connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_forward = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.forward_layers = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(B, T, C)`` to ``(B, T, C)``."""
        b, t, c = x.shape
        parts = self.attention(self.norm_attention(x)).view(b, t, 3, self.heads, c // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        seen = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.output(seen.transpose(1, 2).reshape(b, t, c))
        return x + self.forward_layers(self.norm_forward(x))  # type: ignore[no-any-return]


class GPT(nn.Module):
    """Predicts the next character at each place of a text."""

    def __init__(self, layers: int, width: int, context: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(CHARACTERS, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList([GptBlock(width, 4) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CHARACTERS)

    def forward(self, x: Tensor) -> Tensor:
        """Maps tokens ``(B, T)`` to logits ``(B, T, CHARACTERS)``."""
        h = self.tokens(x) + self.places(torch.arange(x.shape[1], device=x.device))
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))  # type: ignore[no-any-return]


class Tokens(BatchReader):
    """Texts in which each character follows from the one before, with noise."""

    def __init__(self, count: int, context: int) -> None:
        generator = torch.Generator().manual_seed(1)
        text = torch.randint(CHARACTERS, (count, context + 1), generator=generator)
        copied = torch.rand(text.shape, generator=generator) < 0.8
        for place in range(1, context + 1):
            follows = (text[:, place - 1] * 3 + 1) % CHARACTERS
            text[:, place] = torch.where(copied[:, place], follows, text[:, place])
        self.text = text

    def __len__(self) -> int:
        return len(self.text)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        return self.text[row, :-1], self.text[row, 1:]

    def rows(self, rows: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """Returns the inputs and targets of the given rows."""
        text = self.text[torch.as_tensor(rows)]
        return text[:, :-1], text[:, 1:]


def bare_loop(sizes: GptSizes, warm: int) -> float:
    """Trains as nanoGPT's loop does; returns the CPU seconds of the steps after the first ``warm``.

    Source:
        karpathy/nanoGPT, train.py: AdamW, the gradient of one batch a step.
    """
    torch.manual_seed(0)
    model = GPT(sizes.layers, sizes.width, sizes.context)
    data = Tokens(sizes.steps * sizes.batch, sizes.context)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    started = time.process_time()
    for step in range(sizes.steps):
        if step == warm:
            started = time.process_time()
        x, y = data.rows(range(step * sizes.batch, (step + 1) * sizes.batch))
        loss = nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return time.process_time() - started
