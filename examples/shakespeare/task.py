"""The next character of Shakespeare's plays: a small GPT, with roles as clients."""

import re
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from fedcore import Task, metrics

CHARACTERS = "\n !'(),-.:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
CLOUD = ("cymbeline", "juliuscaesar", "kinglear", "muchadoaboutnothing", "othello")
TEST = ("asyoulikeit", "hamlet", "macbeth", "tempest", "twelfthnight")
LEAST = 4_000  # characters of a role that is a client


@cache
def spoken(folder: Path, play: str) -> dict[str, str]:
    """What each role of a play says."""
    found, role = dict[str, list[str]](), ""
    for line in (folder / "shakespeare_plays" / f"{play}.txt").read_text("utf-8").splitlines():
        who, _, text = line.partition("\t")
        role = who if re.fullmatch(r"[A-Z][A-Z' ]+", who) else role if not who and text else ""
        if role and not text.startswith("["):
            found.setdefault(role, []).append(text.strip())
    return {who: "\n".join(lines) for who, lines in found.items()}


@cache
def roles(folder: Path) -> dict[str, str]:
    """What the larger roles say, of plays that are neither the cloud's nor the test's."""
    plays = sorted(path.stem for path in (folder / "shakespeare_plays").glob("*.txt"))
    return {
        f"{play}.{who.replace(' ', '-')}": text
        for play in plays
        if play not in CLOUD + TEST
        for who, text in spoken(folder, play).items()
        if len(text) >= LEAST
    }


class Block(nn.Module):
    """Attention to earlier places, then a layer for each place."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.look, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.think = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        parts = self.look(self.before(x)).unflatten(-1, (3, self.heads, -1)).transpose(1, 3)
        query, key, value = parts.unbind(2)
        seen = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.mix(seen.transpose(1, 2).flatten(2))
        return x + self.think(self.between(x))


class GPT(nn.Module):
    """Takes character numbers (batch, length), gives (batch, length, characters)."""

    def __init__(self, length: int, width: int, heads: int, blocks: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(len(CHARACTERS), width)
        self.places = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(blocks)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(CHARACTERS)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(x) + self.places))


def made(name: str, *, length: int, width: int, heads: int, blocks: int) -> Task:
    """The task, with a GPT of this size over windows of ``length`` characters."""

    def windows(texts: list[str]) -> TensorDataset:
        place = {character: number for number, character in enumerate(CHARACTERS)}
        numbers = [[place.get(one, 1) for one in text] for text in texts]  # 1 is a space
        rows = [
            row[start : start + length + 1]
            for row in numbers
            for start in range(0, len(row) - length, length)
        ]
        pieces = torch.tensor(rows)
        return TensorDataset(pieces[:, :-1], pieces[:, 1:])

    def plays(folder: Path, names: tuple[str, ...]) -> TensorDataset:
        return windows(["\n".join(spoken(folder, play).values()) for play in names])

    return Task(
        name=name,
        kind="next_token",
        model=lambda: GPT(length, width, heads, blocks),
        clients=lambda folder: [*roles(folder)],
        client_data=lambda client, folder: windows([roles(folder)[client]]),
        cloud_data=lambda folder: plays(folder, CLOUD),
        test_data=lambda folder: plays(folder, TEST),
        example_input=torch.zeros(length, dtype=torch.long),
        labels=tuple(CHARACTERS),
        metrics=(metrics.PERPLEXITY, metrics.ACCURACY),
    )


task = made("shakespeare", length=256, width=384, heads=6, blocks=6)  # 10.8 million parameters
