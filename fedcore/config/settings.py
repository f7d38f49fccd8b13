"""Reads TOML into frozen models; errors name file, key, value and the allowed values.

Start with `load_run` for a run's file and `load` for any other model.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from fedcore.config.patterns import describe_pattern
from fedcore.config.run import RunConfig
from fedcore.errors import ConfigError, DataError
from fedcore.files import read_bytes
from fedcore.observability.foreign import without_credentials

_MAX_FILE_BYTES = 1 << 20
_SHOWN = 60  # characters of a value in a message
Model = TypeVar("Model", bound=BaseModel)


def load_run(path: str | PathLike[str], overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a run's file and applies ``section.key=value`` overrides.

    Example::

        run = fedcore.load_run("churn/run.toml", ["federation.rounds=5"])
        fedcore.simulate("churn/task.py", run)

    Raises:
        ConfigError: the file does not exist or is no TOML; a key is unknown; a value has the wrong
            type, is out of range, or contradicts another. Nothing has run then.
    """
    file = Path(path)
    if file.suffix == ".py":
        beside = file.with_name("run.toml")
        there = f"`{beside}`" if beside.is_file() else "`run.toml` with `name` and `task`"
        raise ConfigError(
            f"{file}: this is a Python file, such as a task's, and the file of a run in TOML was "
            f"expected: {there}. Nothing was run; `fedcore check` takes a task alone, and `fedcore "
            "new NAME` writes both."
        )
    return load(file, RunConfig, overrides, base=file.resolve().parent)


def with_overrides(run: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """Returns a copy of a run with ``section.key=value`` overrides, as of ``--set``.

    Raises:
        ConfigError: an override is no ``section.key=value``; a key is unknown; a value has the
            wrong type, is out of range, or contradicts another.
    """
    return _overridden(run, tuple(_parse(override) for override in overrides))


def load(path: Path, model: type[Model], overrides: Sequence[str] = (), **extra: Any) -> Model:
    """Reads ``path`` as an instance of ``model``; ``extra`` adds fields that the file may not set.

    Raises:
        ConfigError: the file is missing or not valid TOML, or a key or value is wrong.
    """
    try:
        raw = read_bytes(path, max_bytes=_MAX_FILE_BYTES, what="this file")
        values = tomllib.loads(raw.decode())
    except DataError as error:
        hint = " `fedcore new NAME` writes one as a starting point." if model is RunConfig else ""
        raise ConfigError(f"{error} Nothing was run.{hint}") from None
    except (ValueError, RecursionError) as error:  # ValueError covers a number of 5000 digits, too
        raise ConfigError(f"{path}: not valid TOML: {error}. Nothing was run.") from None
    source = _Source(str(path), tuple(_parse(override) for override in overrides))
    for override in source.overrides:
        _apply(values, override, model)
    reserved = sorted(set(extra) & set(values))
    if reserved:
        raise ConfigError(_unknown(source, (reserved[0],), values[reserved[0]], model))
    try:
        return model.model_validate({**_tuples(values), **extra})
    except ValidationError as error:
        raise ConfigError(_explain(source, error, model)) from None
    except RecursionError as error:  # nesting just shallow enough for the TOML parser
        raise ConfigError(f"{path}: {error}. Nothing was run.") from None


def with_settings(run: RunConfig, settings: Mapping[str, Any]) -> RunConfig:
    """Returns a copy of a run with settings from Python code: by name, sections as mappings.

    Raises:
        ConfigError: a key is unknown; a value has the wrong type, is out of range, or contradicts
            another.
    """
    return _overridden(
        run,
        tuple(
            _Override(f"{'.'.join(key)}={value!r}", key, value, option="")
            for key, value in _leaves(settings)
        ),
    )


def _overridden(run: RunConfig, overrides: tuple[_Override, ...]) -> RunConfig:
    values = run.model_dump(exclude_unset=True)  # what is left open stays open
    for override in overrides:
        _apply(values, override, RunConfig)
    try:
        made = RunConfig.model_validate(_tuples(values))
    except ValidationError as error:
        raise ConfigError(_explain(_Source("settings", overrides), error, RunConfig)) from None
    return made.model_copy(update={"base": run.base})


def run_with(run: RunConfig | str | PathLike[str], settings: Mapping[str, Any]) -> RunConfig:
    """Returns a run, or the run in a file, with settings from Python code, see `with_settings`.

    Raises:
        ConfigError: the file cannot be read, or a setting is not valid.
    """
    found = run if isinstance(run, RunConfig) else load_run(Path(run))
    return with_settings(found, settings) if settings else found


def overrides_of(settings: Mapping[str, Any]) -> list[str]:
    """Returns settings from Python code as ``section.key=value`` overrides, for `load_run`.

    Raises:
        ConfigError: a value is of a type that TOML does not have.
    """
    return [f"{'.'.join(key)}={_toml('.'.join(key), value)}" for key, value in _leaves(settings)]


def _toml(key: str, value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return f"[{', '.join(_toml(key, item) for item in value)}]"
    if isinstance(value, Mapping):
        items = (f"{_toml(key, name)} = {_toml(key, item)}" for name, item in value.items())
        return f"{{{', '.join(items)}}}"
    raise ConfigError(
        f"settings {key}={_short(repr(value))}: expected a number, a text, true or false, or a "
        "list of them. Nothing was run; leave out a setting that keeps its default."
    )


def _leaves(
    settings: Mapping[str, Any], above: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*above, name))
        else:
            yield (*above, name), value


@dataclass(frozen=True)
class _Override:
    text: str
    key: tuple[str, ...]
    value: Any
    option: str = "--set "

    @property
    def shown(self) -> str:
        """The override as the user wrote it, shortened if long."""
        return f"{self.option}{_short(self.text)}"


@dataclass(frozen=True)
class _Source:
    """Origin of the values: a file, and the overrides from the command line."""

    path: str
    overrides: tuple[_Override, ...]

    def of(self, key: tuple[str, ...]) -> str:
        """Returns the override that set ``key``, or else the file's path."""
        for override in reversed(self.overrides):
            if override.key[: len(key)] == key[: len(override.key)]:
                return override.shown
        return self.path


def _parse(text: str) -> _Override:
    name, separator, value = text.partition("=")
    key = tuple(name.strip().split("."))
    if not separator or not all(key):
        raise ConfigError(
            f"--set {_short(text)}: expected section.key=value, for example "
            "--set federation.rounds=5. Nothing was run."
        )
    try:
        parsed = tomllib.loads(f"value = {value}")
    except tomllib.TOMLDecodeError:
        return _Override(text, key, value)  # a bare word is a string: --set privacy.unit=example
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"--set {_short(text)}: not valid TOML: {error}. Nothing was run."
        ) from None
    return _Override(text, key, parsed["value"] if len(parsed) == 1 else value)


def _apply(values: dict[str, Any], override: _Override, model: type[BaseModel]) -> None:
    table = values
    for part in override.key[:-1]:
        below = table.setdefault(part, {})
        if below is None:  # an optional table, from a model
            below = table[part] = {}
        if not isinstance(below, dict):
            source = _Source("", (override,))
            raise ConfigError(_unknown(source, override.key, override.value, model))
        table = below
    table[override.key[-1]] = override.value


def _tuples(value: Any) -> Any:
    """Turns lists into tuples recursively: TOML gives lists, the strict models want tuples."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _explain(source: _Source, error: ValidationError, model: type[BaseModel]) -> str:
    problems = error.errors()
    for problem in problems:  # before all others: a misspelt key looks like a missing one, too
        if problem["type"] == "extra_forbidden":
            location = tuple(str(part) for part in problem["loc"])
            return _unknown(source, location, problem["input"], model)
    problem = problems[0]
    key = _key(problem["loc"], model)
    if problem["type"] == "missing":
        return f"{source.path}: {'.'.join(key)} is required and not set. Nothing was run."
    if problem["type"] == "value_error":
        changed = "".join(f" {override.shown}" for override in source.overrides)
        message = problem["msg"].removeprefix("Value error, ")
        return f"{source.path}{changed}: {message} Nothing was run."
    allowed = [_allowed(other) for other in problems if _key(other["loc"], model) == key]
    return (
        f"{source.of(key)}: {'.'.join(key)} = {_shown(problem['input'])}: it should be "
        f"{' or '.join(dict.fromkeys(allowed))}. Nothing was run."
    )


def _allowed(problem: ErrorDetails) -> str:
    """Returns what pydantic expects, in the vocabulary of TOML."""
    kind = problem["type"]
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return "a table"
    if kind == "tuple_type":
        return "an array"
    if kind == "string_pattern_mismatch":
        return describe_pattern(problem["ctx"]["pattern"])
    return problem["msg"].partition(" should be ")[2] or problem["msg"]


def _shown(value: Any) -> str:
    """Returns a value roughly in TOML's notation, shortened if long."""
    if isinstance(value, bool):
        return str(value).lower()
    try:
        text = f"[{', '.join(map(_shown, value))}]" if isinstance(value, tuple) else repr(value)
    except ValueError:  # TOML does not limit the length of a hexadecimal number
        return "a number with thousands of digits"
    return _short(text)


def _short(text: str) -> str:
    text = without_credentials(text)  # before it is cut: a cut address no longer shows its secret
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _key(location: tuple[str | int, ...], model: type[BaseModel]) -> tuple[str, ...]:
    """Returns the keys in an error's location, without pydantic's names for union branches."""
    key: list[str] = []
    current = model
    for place, part in enumerate(location):
        key.append(str(part))
        if isinstance(part, int):
            continue  # an index into an array of tables; the keys follow
        below = _section(current, str(part))
        if below is None:
            field = current.model_fields.get(str(part))
            if field and get_origin(field.annotation) is dict:
                key.extend(map(str, location[place + 1 : place + 2]))
            break
        current = below
    return tuple(key)


def _unknown(source: _Source, location: tuple[str, ...], value: Any, model: type[BaseModel]) -> str:
    current: type[BaseModel] = model
    for part in location[:-1]:
        current = _section(current, part) or current
    near = difflib.get_close_matches(location[-1], _keys(current), n=1, cutoff=0.5)
    found = [".".join((*location[:-1], name)) for name in near] or _elsewhere(location[-1], model)
    hint = f" Did you mean {' or '.join(map(repr, found))}?" if found else ""
    return (
        f"{source.of(location)}: unknown key {_short('.'.join(location))!r} (set to "
        f"{_shown(value)}).{hint} Allowed here: {', '.join(_keys(current))}. Nothing was run."
    )


def _keys(model: type[BaseModel]) -> list[str]:
    return [name for name, field in model.model_fields.items() if not field.exclude]


def _elsewhere(key: str, model: type[BaseModel]) -> list[str]:
    """Returns the key of other sections most similar to ``key``, in each section that has it."""
    inner = {section: _section(model, section) for section in _keys(model)}
    known = {section: _keys(below) for section, below in inner.items() if below is not None}
    names = dict.fromkeys(name for keys in known.values() for name in keys)
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.6)
    return [f"{section}.{name}" for name in near for section in known if name in known[section]]


def _section(model: type[BaseModel], key: str) -> type[BaseModel] | None:
    field = model.model_fields.get(key)
    if field is None:
        return None
    for candidate in (field.annotation, *get_args(field.annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None
