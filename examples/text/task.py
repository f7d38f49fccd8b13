"""Verse or prose? The words of a speech tell, and each play of Shakespeare's is a client."""

import re
import zlib
from functools import cache
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import ConcatDataset, TensorDataset

import fedcore
from fedcore import Task

WORDS, BUCKETS = 48, 4096  # of a speech; words share places by hash, and 0 is padding
TEST = ("asyoulikeit", "hamlet", "kinghenryv", "othello", "tempest", "twelfthnight")
POEMS = ("loverscomplaint", "rapeoflucrece", "sonnets", "various", "venusandadonis")


def plays(folder: Path | None) -> list[str]:
    names = sorted(path.stem for path in (folder / "shakespeare_plays").glob("*.txt"))
    return [name for name in names if name not in (*TEST, *POEMS)]


@cache
def speeches(play: str, folder: Path | None) -> TensorDataset:
    """Words of speeches ``(N, WORDS)``, and 1 where each line begins with a capital: verse."""
    file, rows, verse = folder / "shakespeare_plays" / f"{play}.txt", [], []
    for speech in re.split(r"\n(?=[A-Z][A-Z ]+\t)", file.read_text())[1:]:
        said = re.sub(r"\[[^]]*\]", "", speech.partition("\t")[2])  # without stage directions
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        if len(lines) >= 3:
            words = re.findall(r"[a-z']+", said.lower())[:WORDS]
            places = [1 + zlib.crc32(word.encode()) % (BUCKETS - 1) for word in words]
            rows.append(places + [0] * (WORDS - len(places)))
            verse.append(all(line[0].isupper() or not line[0].isalpha() for line in lines[1:]))
    return TensorDataset(torch.tensor(rows), torch.tensor(verse).float())


class MeanOfWords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(BUCKETS, 16, padding_idx=0), nn.Linear(16, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        count = (x > 0).sum(dim=1, keepdim=True).clamp(min=1)
        return self.head(self.words(x).sum(dim=1) / count)


task = Task(
    name="text",
    kind="binary",
    model=MeanOfWords,
    clients=plays,
    client_data=speeches,
    test_data=lambda folder: ConcatDataset([speeches(play, folder) for play in TEST]),
    example_input=torch.zeros(WORDS, dtype=torch.long),
    metrics=(fedcore.metrics.AUC, fedcore.metrics.accuracy(axis=None)),
    labels=("prose", "verse"),
)
