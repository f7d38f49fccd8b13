"""`from_folder`: images in folders, by client and class."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from fedcore.errors import ConfigError, DataError
from fedcore.observability.words import counted
from fedcore.sources.client_data import ClientData, split_by_client

_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
_HEADERS = 10_000  # read in about a second


def from_folder(
    root: str | PathLike[str],
    *,
    size: tuple[int, int] | None = None,
    mode: Literal["RGB", "L"] = "RGB",
    test_share: float = 0.2,
    seed: int = 0,
) -> ClientData:
    """Reads images at ``root/client/class/image.png``, as they are needed; needs Pillow.

    Inputs are uint8 ``(C, H, W)``, and the model receives them divided by 255.

    Example::

        data = fedcore.from_folder("photos", size=(64, 64))
        task = data.task("photos", model=network)

    Args:
        root: The folder; hidden files and folders are ignored.
        size: Height and width that every image is resized to; None if all have one size.
        mode: ``RGB`` for three channels, ``L`` for grey.
        test_share: Share of each client's images that no training reads, drawn at random.
        seed: Determines the split.

    Returns:
        The data, with `ClientData.task` for a task; classes are the names of folders, sorted.

    Raises:
        ConfigError: Pillow is not installed.
        DataError: there are no images, a client has none, an image cannot be read, or images differ
            in size and ``size`` is None.
    """
    _pillow()
    folder = Path(root)
    if not folder.is_dir():
        raise DataError(f"{folder}: this folder does not exist. Nothing was read.")
    files = {client.name: _images(client) for client in _folders(folder)}
    labels = tuple(sorted({name for found in files.values() for name, _ in found}))
    if not labels:
        raise DataError(
            f"{folder}: found no images in {counted(len(files), 'folder')}, expected files at "
            "client/class/image.png. Nothing was read."
        )
    parts = {
        client: ImageFiles(
            [path for _, path in found], [labels.index(name) for name, _ in found], size, mode
        )
        for client, found in files.items()
    }
    if size is None:
        check_one_size([path for found in files.values() for _, path in found])
    train, test = split_by_client(parts, test_share=test_share, seed=seed)
    first = next(iter(parts.values()))[0][0]
    count = sum(map(len, parts.values()))
    return ClientData(
        kind="classification",
        train=train,
        test=test,
        example_input=torch.zeros_like(first),
        preprocess=ScalePixels,
        labels=labels,
        notes=(
            f"{counted(count, 'image', ',')} of {counted(len(parts), 'client')}, "
            f"{'resized to' if size else 'of'} {first.shape[1]} x {first.shape[2]} pixels",
        ),
    )


def check_one_size(paths: Sequence[Path]) -> None:
    """Checks from their headers that images have one size; of very many, some thousands.

    Raises:
        DataError: they differ, or one cannot be read.
    """
    first: tuple[int, int] | None = None
    step = max(1, len(paths) // _HEADERS)
    for path in paths[::step]:
        try:
            with _pillow().open(path) as image:
                found = image.size
        except (OSError, ValueError, SyntaxError) as error:  # what Pillow raises for broken files
            raise _unreadable(path, error) from error
        first = first or found
        if found != first:
            (width, height), (other_width, other_height) = first, found
            raise DataError(
                f"{path}: this image is {other_height} x {other_width} pixels (height x width), "
                f"and {paths[0]} is {height} x {width}: a model takes one size. Nothing was read; "
                f"pass size=({height}, {width}), or another one, to resize every image."
            )


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(
        f"{path}: cannot read this image: {type(error).__name__}: {error}. It was not used; "
        "replace or remove the file."
    )


class ScalePixels(nn.Module):
    """Divides bytes 0 to 255 by 255."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps uint8 to float32 of the same shape."""
        return x.float() / 255


class ImageFiles(Dataset[tuple[Tensor, Tensor]]):
    """Image files with class numbers, read when they are needed."""

    def __init__(
        self,
        paths: Sequence[Path],
        targets: Sequence[int],
        size: tuple[int, int] | None,
        mode: str,
    ) -> None:
        self._paths, self._targets = paths, torch.as_tensor(list(targets), dtype=torch.long)
        self._size, self._mode = size, mode

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self._paths)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        """Returns one image ``(C, H, W)`` and its class number."""
        path = self._paths[row]
        try:
            with _pillow().open(path) as image:
                made = image.convert(self._mode)
                if self._size is not None:
                    made = made.resize((self._size[1], self._size[0]))
                return image_tensor(made), self._targets[row]
        except (OSError, ValueError, SyntaxError) as error:  # what Pillow raises for broken files
            raise _unreadable(path, error) from error


def image_tensor(image: Any) -> Tensor:
    """Returns an image of Pillow as uint8 ``(C, H, W)``."""
    pixels = np.array(image if image.mode in ("L", "RGB") else image.convert("RGB"))
    made = torch.from_numpy(pixels)
    return made[None] if made.dim() == 2 else made.permute(2, 0, 1).contiguous()


def _folders(folder: Path) -> list[Path]:
    return sorted(one for one in folder.iterdir() if one.is_dir() and one.name[0] != ".")


def _images(client: Path) -> list[tuple[str, Path]]:
    return [
        (group.name, path)
        for group in _folders(client)
        for path in sorted(group.iterdir())
        if path.suffix.lower() in _SUFFIXES and path.name[0] != "."
    ]


def _pillow() -> Any:
    try:
        return import_module("PIL.Image")
    except ImportError:
        raise ConfigError(
            "from_folder needs Pillow, which is not installed. Nothing was read; run `pip install "
            "pillow`."
        ) from None
