"""Short descriptions of errors in documents from other parties."""

from __future__ import annotations

from pydantic import ValidationError

from fedcore.observability.foreign import foreign


def first_fault(error: ValidationError) -> str:
    """Returns where and why a document does not match its format; short, and safe to print."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(map(str, first["loc"])) or "document"
    return f"{foreign(where, 100)}: {foreign(first['msg'], 300)}"
