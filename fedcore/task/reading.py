"""Calls a task's loaders, and turns their failures into errors that name the data."""

from __future__ import annotations

import os
from collections.abc import Callable, Sized
from pathlib import Path
from typing import cast

from torch import Tensor
from torch.utils.data import Dataset

from fedcore.errors import DataError, DataFolderMissing, FedcoreError

Folder = Path | None
Examples = Dataset[tuple[Tensor, Tensor]]


def size_of(examples: Examples) -> int:
    """Returns the number of examples."""
    return len(cast(Sized, examples))


def data_folder() -> Folder:
    """Returns the data folder of a server or a simulation: ``FEDCORE_DATA``, or ``None``.

    Raises:
        DataError: the variable names a folder that does not exist.
    """
    value = os.environ.get("FEDCORE_DATA")
    if not value:
        return None
    folder = Path(value)
    if not folder.is_dir():
        raise DataError(f"FEDCORE_DATA = {value}: this folder does not exist. Nothing was run.")
    return folder


def read_examples(
    load: Callable[[], Examples], *, what: str, folder: Folder, least: int = 1
) -> Examples:
    """Calls a task's loader, and turns its failures into errors that name the data.

    Args:
        load: The loader, with its arguments.
        what: The data, for errors.
        folder: The folder that the loader receives. If it is None and the loader fails, the error
            says so.
        least: Smallest number of examples, 0 or 1.

    Raises:
        DataError: the loader failed, or returned fewer than ``least`` examples.
        DataFolderMissing: it failed because ``folder`` is None.
    """
    try:
        examples = load()
    except FedcoreError:
        raise
    except (Exception, SystemExit) as error:  # user code: any failure counts as one of the data
        require_folder(what, folder, error)
        raise DataError(
            f"{what}: reading it failed: {told(error)}. {without_folder(folder)}"
            "Nothing was trained on it; fix the file or the task's loader."
        ) from error
    try:
        count = len(cast(Sized, examples))
    except (Exception, SystemExit) as error:
        raise DataError(
            f"{what}: the task's loader returned a {type(examples).__name__} whose length is not "
            f"known: {told(error)}. Nothing was trained on it; return a torch Dataset with a "
            "length."
        ) from error
    if count < least:
        raise DataError(
            f"{what}: got no examples, expected at least 1. Nothing was trained on it; leave "
            "this client out, or give it data."
        )
    return examples


def told(error: BaseException) -> str:
    """Returns kind and text of an error, without a full stop at its end."""
    return f"{type(error).__name__}: {error}".rstrip(". ")


def lacks_folder(folder: Folder, error: BaseException) -> bool:
    """Returns whether a loader failed because it used a missing data folder as a path."""
    if folder is not None:
        return False
    text = str(error)
    as_path = isinstance(error, TypeError | AttributeError) and "NoneType" in text
    file = error.filename if isinstance(error, OSError) else None
    as_text = file is not None and "None" in Path(str(file)).parts
    demanded = isinstance(error, AssertionError) and not text  # `assert folder`
    return as_path or as_text or demanded


def require_folder(what: str, folder: Folder, error: BaseException) -> None:
    """Raises an error that asks for a data folder, if a loader failed for lack of one.

    Args:
        what: What the loader reads.
        folder: What the loader received.
        error: What it raised.

    Raises:
        DataFolderMissing: ``folder`` is None, and the loader used it as a path.
    """
    if lacks_folder(folder, error):
        raise DataFolderMissing(
            f"{what}: the task reads files from a folder, and none is set. Nothing was run; set "
            "the environment variable FEDCORE_DATA to the folder that holds the data; on a device, "
            "`data` in its owner.toml."
        ) from error


def without_folder(folder: Folder) -> str:
    """Returns a sentence for a loader that failed without a data folder; else nothing."""
    if folder is not None:
        return ""
    return (
        "Its folder was None, as FEDCORE_DATA is not set, nor `data` in an owner's owner.toml: set "
        "it if the loader reads files. "
    )
