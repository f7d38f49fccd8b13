"""Small files in which a device keeps what it knows about releases."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from fedcore.errors import DataError
from fedcore.files import read_if_exists

State = TypeVar("State", bound=BaseModel)


def read_state(
    path: Path, kind: type[State], *, max_bytes: int, what: str, remedy: str = ""
) -> State | None:
    """Reads a state file; None if there is none.

    Args:
        path: The file, JSON.
        kind: What it holds.
        max_bytes: Most bytes that it may have.
        what: Description of its content, for an error, such as "the versions seen".
        remedy: Sentence for an error: what its owner does if it is damaged.

    Raises:
        DataError: the file is damaged.
    """
    raw = read_if_exists(path, max_bytes=max_bytes, what=what)
    try:
        return None if raw is None else kind.model_validate_json(raw)
    except ValidationError:
        raise DataError(
            f"{path}: its content is not what was written; the disk may be failing. Nothing "
            f"was installed; the previous version keeps serving. {remedy}".rstrip()
        ) from None
