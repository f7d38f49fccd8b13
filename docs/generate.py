"""Writes the pages that follow from the code: ``python docs/generate.py [--check]``.

``configuration.md`` comes from the models of settings, ``command_line.md`` from the parsers, and
the list of folders in ``architecture.md`` from the docstrings of the packages. ``--check`` writes
nothing, and exits with 1 when a page is not up to date.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import get_args, get_origin

from pydantic import BaseModel, BeforeValidator
from pydantic.fields import FieldInfo

from fedcore.cli import build_parser
from fedcore.config.owner import OwnerPolicy
from fedcore.config.run import RunConfig
from fedcore.config.section import Section

DOCS = Path(__file__).parent

INTRO = """\
# Configuration

One TOML file describes a run, in a simulation and in a deployment alike. Paths in it start from the
file's own folder. `--set section.key=value` overrides a value. Unknown keys, wrong types and values
that contradict each other stop the program before anything runs, with exit code 2.

This page is written by `make docs` from the models in `fedcore/config/run.py` and
`fedcore/config/owner.py`.
"""
OWNER = """\
The owner of a device sets limits in a file on the device, `owner.toml`. It can only tighten what
a server asks. A simulation applies one file to all its clients: `--owner owner.toml`.
"""

COMMANDS = """\
# Command line

`fedcore VERB --help` says the same in a terminal. With `--json` a command prints JSON for programs.
Exit codes are in [Errors and exit codes](errors.md).

This page is written by `make docs` from the parsers of the command line.
"""
FOLDERS = ("<!-- folders: written by `make docs` -->", "<!-- end of folders -->")


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
    if "$ref" in schema:
        return "a kind, a list of numbers, or a table (below)"
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
        if field.exclude or (section_of(field.annotation) and not short_form(field)):
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


def short_form(field: FieldInfo) -> bool:
    """Whether a table may also be given as a single value."""
    return any(isinstance(part, BeforeValidator) for part in field.metadata)


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


def configuration() -> str:
    """The page of all settings."""
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
            short = [section_of(one.annotation) for one in below.model_fields.values()]
            for nested in dict.fromkeys(one for one in short if one is not None):
                name, _, said = (nested.__doc__ or "").strip().partition("``: ")
                text = f"{said[0].upper()}{said[1:]}\n"
                parts += [f"\n### {name.replace('``', '`')}`\n", text, table(nested)]
    return parts


def command_line() -> str:
    """The page of all commands."""
    parser = build_parser(verbs=declared_verbs())
    return "\n".join([COMMANDS, *commands(parser, level=2)]) + "\n"


def declared_verbs() -> list[EntryPoint]:
    """The verbs that this checkout declares, which are installed only after `make setup`."""
    group = "fedcore.commands"
    declared = tomllib.loads((DOCS.parent / "pyproject.toml").read_text())
    verbs = declared["project"]["entry-points"][group]
    return [EntryPoint(name, value, group) for name, value in verbs.items()]


def commands(parser: argparse.ArgumentParser, *, level: int) -> Iterator[str]:
    """A section for each command below a parser, and for each below that."""
    for below in parser._actions:
        if not isinstance(below, argparse._SubParsersAction):
            continue
        for command in below.choices.values():
            yield f"{'#' * level} {command.prog}\n"
            yield f"{sentence(command.description or '')}\n"
            if command.epilog:
                yield f"```\n{command.epilog.removeprefix('example: ')}\n```\n"
            yield from options(command)
            yield from commands(command, level=level + 1)


def options(command: argparse.ArgumentParser) -> Iterator[str]:
    """A row for each argument of a command, positional ones first."""
    formatter = argparse.HelpFormatter(command.prog)
    taken = [
        action
        for action in sorted(command._actions, key=lambda action: bool(action.option_strings))
        if not isinstance(action, argparse._SubParsersAction | argparse._HelpAction)
    ]
    if not taken:
        return
    yield "| argument | required | what it does |\n|---|---|---|"
    for action in taken:
        values = formatter._format_args(action, str(action.metavar or action.dest.upper()))
        name = " ".join(filter(None, [*action.option_strings[-1:], values]))
        required = action.required and action.nargs not in ("?", "*")
        text = cell(formatter._expand_help(action) if action.help else "")
        if action.choices:
            text += f"; one of {', '.join(f'`{choice}`' for choice in action.choices)}"
        yield f"| `{cell(name)}` | {'yes' if required else ''} | {text} |"
    yield ""


def sentence(text: str) -> str:
    """A description with a capital letter and a full stop."""
    return f"{text[:1].upper()}{text[1:].rstrip('.')}."


def cell(text: str) -> str:
    """Text that may stand in a table."""
    return re.sub(r"\s+", " ", text).replace("|", "\\|")


def architecture() -> str:
    """The page on architecture with the folders of today."""
    before, begin, rest = (DOCS / "architecture.md").read_text().partition(FOLDERS[0])
    _, end, after = rest.partition(FOLDERS[1])
    return "".join([before, begin, "\n", *folders(), end, after])


def folders() -> Iterator[str]:
    """A table for each package, with a row for each folder and each file at its top."""
    for top in ("fedcore", "edge_client", "server"):
        yield "\n| folder or file | what it does |\n|---|---|\n"
        for path in sorted((DOCS.parent / top).rglob("__init__.py")):
            said = ast.get_docstring(ast.parse(path.read_text())) or ""
            line = re.sub(r"\s+", " ", said.partition("\n\n")[0]).replace("``", "`")
            yield f"| `{path.parent.relative_to(DOCS.parent)}/` | {cell(line)} |\n"
        for path in sorted((DOCS.parent / top).glob("*.py")):
            said = ast.get_docstring(ast.parse(path.read_text())) or ""
            line = re.sub(r"\s+", " ", said.partition("\n\n")[0]).replace("``", "`")
            if path.stem != "__init__":
                yield f"| `{path.relative_to(DOCS.parent)}` | {cell(line)} |\n"
    yield "\n"


PAGES = {
    "architecture.md": architecture,
    "command_line.md": command_line,
    "configuration.md": configuration,
}


def main(check: bool) -> int:
    """Writes each page, or with ``check`` names those that are not up to date."""
    stale = False
    for name, page in PAGES.items():
        path, text = DOCS / name, page()
        if check and (not path.exists() or path.read_text() != text):
            sys.stderr.write(f"docs/{name} is not up to date: run `make docs`.\n")
            stale = True
        elif not check:
            path.write_text(text)
    return int(stale)


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
