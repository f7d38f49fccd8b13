"""What is wrong with a document that somebody else wrote, in few words."""

from __future__ import annotations

from pydantic import ValidationError

from fedcore.observability.foreign import foreign


def first_fault(error: ValidationError) -> str:
    """Where and why a document is not of its format; short, and safe to print."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(map(str, first["loc"])) or "document"
    return f"{foreign(where, 100)}: {foreign(first['msg'], 300)}"
