"""What the documentation names exists: files, modules, commands, options, settings, errors."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import re
import runpy
import shlex
from collections.abc import Iterator
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from pydantic import BaseModel

import fedcore
from fedcore import errors
from fedcore.cli import build_parser
from fedcore.config.run import RunConfig

ROOT = Path(__file__).parents[2]
GENERATED = {"command_line.md", "configuration.md"}
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TOPS = ("fedcore", "edge_client", "server", "tests", "benchmarks", "examples", "deploy", "docs")
PATH = re.compile(rf"(?:{'|'.join(TOPS)}|\.ci)/[\w./-]*|[\w/]+\.py")
DOTTED = re.compile(r"(?:fedcore|edge_client|server|flwr)(?:\.\w+)+")
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
OTHERS_OPTIONS = {
    *("--no-deps", "--strict", "--help", "--user", "--role"),  # pip, mypy, argparse
    *("--run-config", "--federation-config", "--stream"),  # flwr
}
USERS_FILES = re.compile(r"(?:churn/)?task\.py|fedcore/x\.py|tests/unit/fedcore/test_x\.py")
USERS_OWN = {"benchmarks/tasks/NAME.toml", "churn/mine.py"}


def label(page: Path) -> str:
    return str(page.relative_to(ROOT))


def code(page: Path) -> list[str]:
    """Everything in single backticks outside of blocks."""
    running = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    return [re.sub(r"\s+", " ", found) for found in re.findall(r"`([^`]+)`", running)]


def command_lines(page: Path) -> Iterator[str]:
    """Each call of fedcore in a block, without what the shell does with it."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.M | re.S)
    for block in (block for language, block in blocks if language in ("", "bash", "sh")):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r"\s*(?:;|&&|(?<!\S)&)\s*", line.strip()):
                found = re.match(r"(?:until |while )?(fedcore .*)", part)
                if found:
                    yield found[1]


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from parsers(below)


@cache
def file_names() -> set[str]:
    return {path.name for top in TOPS for path in (ROOT / top).rglob("*.py")}


@cache
def options_of_programs() -> set[str]:
    """Options of benchmarks, campaigns and other programs of this repository."""
    programs = [*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "tests").rglob("*.py")]
    programs.append(ROOT / "docs" / "generate.py")
    return {option for path in programs for option in OPTION.findall(path.read_text())}


@pytest.fixture(scope="module")
def cli() -> argparse.ArgumentParser:
    pages = runpy.run_path(str(ROOT / "docs" / "generate.py"))
    return build_parser(verbs=pages["declared_verbs"]())


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_each_path_that_is_named_exists(page: Path) -> None:
    missing = []
    for word in code(page):
        if not PATH.fullmatch(word) or USERS_FILES.fullmatch(word) or word in USERS_OWN:
            continue
        if not (ROOT / word).exists() and ("/" in word or word not in file_names()):
            missing.append(word)
    assert not missing


def defined(path: Path) -> set[str]:
    """The names at the top of a module, also those that it offers on first use."""
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found | (set(fedcore.__all__) if path == ROOT / "fedcore" / "__init__.py" else set())


def is_ours(dotted: str) -> bool:
    parts = dotted.split(".")
    for end in range(len(parts), 0, -1):
        module, rest = ROOT.joinpath(*parts[:end]), parts[end:]
        for path in (module.with_suffix(".py"), module / "__init__.py"):
            if path.exists():
                return not rest or rest[0] in defined(path)
    return False


def is_flowers(dotted: str) -> bool:
    """Whether a module is there, or its parent holds the name; nothing but parents is imported."""
    try:
        if importlib.util.find_spec(dotted):
            return True
    except ModuleNotFoundError:
        pass
    parent, _, name = dotted.rpartition(".")
    return hasattr(importlib.import_module(parent), name)


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_each_module_that_is_named_exists(page: Path) -> None:
    named = {word.partition("(")[0] for word in code(page)}
    groups = set(entry_points().groups)
    dotted = sorted(word for word in named - groups if DOTTED.fullmatch(word))
    missing = [
        word for word in dotted if not (is_flowers if word.startswith("flwr.") else is_ours)(word)
    ]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_each_command_line_is_one_that_parses(page: Path, cli: argparse.ArgumentParser) -> None:
    for line in command_lines(page):
        words = shlex.split(line, comments=True)[1:]
        found = cli.parse_args([re.sub(r"\$\w+|\$\(.*\)", "x", word) for word in words])
        assert any(map(callable, vars(found).values())), line  # the function that does it


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_each_command_and_option_in_the_text_exists(
    page: Path, cli: argparse.ArgumentParser
) -> None:
    every = list(parsers(cli))
    verbs = {parser.prog for parser in every}
    groups = {verb for verb in verbs if any(other.startswith(f"{verb} ") for other in verbs)}
    actions = [action for parser in every for action in parser._actions]
    options = {option for action in actions for option in action.option_strings}
    options |= options_of_programs() | OTHERS_OPTIONS
    for word in code(page):
        if named := re.match(r"fedcore ([a-z]+)(?: ([a-z]+))?", word):
            verb = f"fedcore {named[1]}"
            assert verb in verbs, word
            assert verb not in groups or not named[2] or f"{verb} {named[2]}" in verbs, word
        assert set(OPTION.findall(word)) <= options, word


def settings(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        for part in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from settings(part, f"{prefix}{name}.")


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_each_setting_that_is_named_exists(page: Path) -> None:
    every = set(settings(RunConfig))
    tables = "|".join(name for name in RunConfig.model_fields if f"{name}." in " ".join(every))
    named = [
        found[1]
        for word in code(page)
        if (found := re.fullmatch(rf"((?:{tables})(?:\.[a-z_]+)+)(?: = .*)?", word))
    ]
    assert not set(named) - every


def test_each_error_is_listed_with_its_exit_code() -> None:
    rows = re.findall(r"^\| (\d+) \| ([^|]*) \|", (ROOT / "docs" / "errors.md").read_text(), re.M)
    listed = {name: int(number) for number, names in rows for name in re.findall(r"`(\w+)`", names)}
    kinds = [errors.FedcoreError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    ours = {kind.__name__: kind.exit_code for kind in kinds if kind.__module__ == errors.__name__}
    assert listed == ours


def test_the_reference_has_each_public_name() -> None:
    documented = re.findall(r"^::: fedcore\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), re.M)
    assert sorted(documented) == sorted(fedcore.__all__)


def test_the_modules_of_flower_are_those_that_are_imported() -> None:
    public = ("flwr.app", "flwr.clientapp", "flwr.serverapp")
    imported = {
        f"{node.module}.{alias.name}" if node.module == "flwr.superlink.servicer" else node.module
        for path in (ROOT / "fedcore" / "flower").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flwr.")
        for alias in node.names
    } - set(public)
    section = (ROOT / "docs" / "flower.md").read_text().partition("## Flower's private modules")[2]
    assert set(re.findall(r"`(flwr\.[\w.]+)`", section)) == imported


@pytest.mark.parametrize("name", ["architecture.md", "command_line.md", "configuration.md"])
def test_each_generated_page_is_up_to_date(name: str) -> None:
    pages = runpy.run_path(str(ROOT / "docs" / "generate.py"))["PAGES"]
    assert pages[name]() == (ROOT / "docs" / name).read_text(), "run `make docs`"


def test_each_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").rglob("*.md"):
        assert f": {page.relative_to(ROOT / 'docs')}\n" in navigation
