"""MNIST under privacy: 10 clients of 6,000 images, features made by code, a linear classifier.

Fixed features cost no privacy, and beat small networks under noise (Tramer and Boneh 2021,
arXiv:2011.11660). Choosing run.toml's settings on held-out training images isn't in the epsilon.
"""

import gzip
from functools import cache
from pathlib import Path

import torch
from torch import Generator, Tensor, nn, pi
from torch.nn.functional import avg_pool2d, conv2d, layer_norm, normalize
from torch.utils.data import TensorDataset

from fedcore import Task, iid


@cache
def load(folder: Path | None, split: str, parts: int) -> dict[str, TensorDataset]:
    if folder is None:
        raise FileNotFoundError("set FEDCORE_DATA to the folder that holds mnist_by_writer")
    files = sorted(folder.glob(f"mnist_by_writer/{split}-*-ubyte.gz"))  # images, then labels
    pixels, labels = (bytearray(gzip.decompress(file.read_bytes())) for file in files)
    images = torch.frombuffer(pixels, dtype=torch.uint8, offset=16).view(-1, 1, 28, 28)
    digits = torch.frombuffer(labels, dtype=torch.uint8, offset=8).long()
    shares = enumerate(iid(len(digits), parts, seed=0))
    return {f"{number}": TensorDataset(images[rows], digits[rows]) for number, rows in shares}


class Features(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        y, x = torch.meshgrid(*2 * [torch.arange(-3.0, 4.0)], indexing="ij")
        turns = torch.arange(8)[:, None, None] * pi / 8
        bell = torch.exp(-(x.square() + y.square()) / 4.5)
        gabor = bell * torch.exp(0.5j * pi * (x * turns.cos() + y * turns.sin()))
        gabor -= bell * gabor.sum((1, 2), keepdim=True) / bell.sum()  # blind to brightness
        both = torch.cat([gabor.real, gabor.imag])[:, None]
        self.register_buffer("filters", normalize(both, dim=(2, 3)))
        self.register_buffer("mix", torch.randn(392, 1000, generator=Generator().manual_seed(0)))

    def forward(self, x: Tensor) -> Tensor:
        real, imag = conv2d(x.float() / 255, self.filters, padding=3, stride=2).chunk(2, dim=1)
        energy = avg_pool2d((real.square() + imag.square() + 1e-6).sqrt(), 2)  # by direction, place
        strokes = (energy / (energy.norm(dim=1, keepdim=True) + 0.1)).flatten(1)
        mixed = layer_norm(strokes, [392]) @ self.mix / 392**0.5
        return layer_norm((mixed - 0.5).relu(), [1000])  # of one length, for every image


task = Task(
    name="mnist_private",
    kind="classification",
    model=lambda: nn.Linear(1000, 10),
    preprocess=Features,
    clients=lambda folder: list(load(folder, "train", 10)),
    client_data=lambda client, folder: load(folder, "train", 10)[client],
    test_data=lambda folder: load(folder, "t10k", 1)["0"],
    example_input=torch.full((1, 28, 28), 255, dtype=torch.uint8),
)
