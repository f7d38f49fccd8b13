"""Writes docs/configuration.md from the models themselves: ``python docs/generate.py``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fedcore.config.owner import OwnerPolicy
from fedcore.config.run import RunConfig, Section

INTRO = """\
# Configuration

One TOML file describes a run, in a simulation and in a deployment alike. Paths in it start from the
file's own folder. `--set section.key=value` overrides a value. Unknown keys, wrong types and values
that contradict each other stop the program before anything runs, with exit code 2.

This page is written by `make docs` from the models in `fedcore/config/run.py`.
"""
OWNER = """\
What belongs to the owner of a device stands in a file on the device, `owner.toml`, and only
tightens what a server asks. A simulation takes one for all its clients: `--owner owner.toml`.
"""


def section_of(annotation: object) -> type[Section] | None:
    """The model behind a field that is a table of its own."""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None


def kind(schema: dict[str, object]) -> str:
    """What a value may be, from its JSON schema."""
    if "anyOf" in schema:
        parts = [kind(part) for part in schema["anyOf"] if part.get("type") != "null"]  # type: ignore[attr-defined]
        return " or ".join(parts)
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])  # type: ignore[attr-defined]
    if "const" in schema:
        return f"`{schema['const']}`"
    if schema.get("type") == "array":
        return f"list of {kind(schema['items'])}"  # type: ignore[arg-type]
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {schema[key]:g}" for key, sign in signs.items() if key in schema]
    words = {
        "boolean": "true or false",
        "integer": "whole number",
        "number": "number",
        "object": "table",
        "string": "text",
    }
    return " ".join([words[str(schema["type"])], *([", ".join(bounds)] if bounds else [])])


def table(model: type[BaseModel]) -> str:
    """A row for each key of a table."""
    properties = model.model_json_schema(ref_template="{model}")["properties"]
    lines = ["| key | default | allowed | what it does |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        if field.exclude or section_of(field.annotation):
            continue
        default = field.get_default(call_default_factory=True)
        shown = (
            "required"
            if field.is_required()
            else "unset"
            if default is None
            else f"`{plain(default)}`"
        )
        text = one_line(field)
        lines.append(f"| `{name}` | {shown} | {kind(properties[name])} | {text} |")
    return "\n".join(lines)


def one_line(field: FieldInfo) -> str:
    """A field's description."""
    return re.sub(r"\s+", " ", (field.description or "").replace("``", "`"))


def plain(value: object) -> str:
    """A default as TOML would have it."""
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, tuple):
        return "[" + ", ".join(map(plain, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    return "{}" if value == {} else str(value)


def page() -> str:
    """The whole page."""
    parts = [INTRO, "## The run\n", table(RunConfig)]
    for name, field in RunConfig.model_fields.items():
        section = section_of(field.annotation)
        if section:
            _, _, rest = (section.__doc__ or "").strip().partition("``: ")
            parts += [f"\n## `[{name}]`\n", rest[0].upper() + rest[1:] + "\n", table(section)]
            parts += tables_in(section, f"{name}.")
    parts += ["\n## `owner.toml`\n", OWNER, table(OwnerPolicy), *tables_in(OwnerPolicy, "")]
    return "\n".join(parts) + "\n"


def tables_in(section: type[Section], prefix: str) -> list[str]:
    """The tables and arrays of tables in a table, each with what it is."""
    parts = []
    for key, inner in section.model_fields.items():
        if below := section_of(inner.annotation):
            _, _, rest = (below.__doc__ or "").strip().partition("``: ")
            told = f"{rest[0].upper()}{rest[1:]} {one_line(inner)}\n"
            many = get_origin(inner.annotation) is tuple
            head = f"[[{prefix}{key}]]" if many else f"[{prefix}{key}]"
            parts += [f"\n### `{head}`\n", told, table(below)]
    return parts


if __name__ == "__main__":
    Path(__file__).with_name("configuration.md").write_text(page())
