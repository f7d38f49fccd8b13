"""The prepared partition and the models, for peers that train with torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.tasks.models import cnn, logistic
from benchmarks.workloads import Workload


@dataclass(frozen=True)
class Partition:
    """Clients' examples, one client after the other."""

    images: Tensor
    labels: Tensor
    offsets: list[int]
    test_images: Tensor
    test_labels: Tensor

    @property
    def clients(self) -> int:
        """How many there are."""
        return len(self.offsets) - 1

    def of(self, client: int) -> tuple[Tensor, Tensor]:
        """Images and labels of one client; views, nothing is copied."""
        rows = slice(self.offsets[client], self.offsets[client + 1])
        return self.images[rows], self.labels[rows]


@cache
def load(path: Path) -> Partition:
    """Maps the file: processes that read it share its pages."""
    parts = load_file(path)
    return Partition(
        parts["images"],
        parts["labels"],
        parts["offsets"].tolist(),
        parts["test_images"],
        parts["test_labels"],
    )


def make_model(workload: Workload, seed: int) -> nn.Module:
    """The workload's model with torch's usual initial weights."""
    torch.manual_seed(seed)
    return logistic() if workload.partition == "w2" else cnn()


@torch.inference_mode()
def accuracy(model: nn.Module, partition: Partition) -> float:
    """The share of test images that the model gets right."""
    model.eval()
    found = [model(images).argmax(1) for images in partition.test_images.split(1000)]
    return float((torch.cat(found) == partition.test_labels).float().mean())
