"""Reading TOML into frozen models, with errors that name file, key, value and what is allowed."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from fedcore.config import RunConfig
from fedcore.errors import ConfigError
from fedcore.files import read_bytes

_MAX_FILE_BYTES = 1 << 20
Model = TypeVar("Model", bound=BaseModel)


def load_run(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a run's file and applies ``section.key=value`` overrides.

    Raises:
        ConfigError: the file does not exist or is no TOML; a key is unknown; a value has the wrong
            type, is out of range, or contradicts another. Nothing has run then.
    """
    return load(path, RunConfig, overrides, base=path.resolve().parent)


def load(path: Path, model: type[Model], overrides: Sequence[str] = (), **extra: Any) -> Model:
    """Reads ``path`` as an instance of ``model``; ``extra`` is set beside what the file holds."""
    if not path.exists():
        raise ConfigError(
            f"{path}: this file does not exist. Nothing was run. "
            "`fedcore new NAME` writes one to start from."
        )
    raw = read_bytes(path, max_bytes=_MAX_FILE_BYTES, what="a TOML file")
    try:
        values = tomllib.loads(raw.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}. Nothing was run.") from None
    for override in overrides:
        _apply(values, override, model)
    reserved = sorted(set(extra) & set(values))
    if reserved:
        raise ConfigError(_unknown(str(path), (reserved[0],), model))
    try:
        return model.model_validate({**_tuples(values), **extra})
    except ValidationError as error:
        raise ConfigError(_explain(str(path), error, model)) from None


def _apply(values: dict[str, Any], override: str, model: type[BaseModel]) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise ConfigError(
            f"--set {override}: expected section.key=value, for example "
            "--set federation.rounds=5. Nothing was run."
        )
    parts = tuple(key.strip().split("."))
    table = values
    for part in parts[:-1]:
        below = table.setdefault(part, {})
        if not isinstance(below, dict):
            raise ConfigError(_unknown(f"--set {override}", parts, model))
        table = below
    try:
        table[parts[-1]] = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        table[parts[-1]] = text  # a bare word is a string: --set privacy.unit=example


def _tuples(value: Any) -> Any:
    """TOML knows arrays only; the frozen models hold tuples."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _explain(where: str, error: ValidationError, model: type[BaseModel]) -> str:
    problem = error.errors()[0]
    location = tuple(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return _unknown(where, location, model)
    if problem["type"] == "missing":
        return f"{where}: {'.'.join(location)} is required and not set. Nothing was run."
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{where}: {message} Nothing was run."
    key = _key(location, model)
    return (
        f"{where}: {'.'.join(key)} = {problem['input']!r}: {message[0].lower()}{message[1:]}. "
        "Nothing was run."
    )


def _key(location: tuple[str, ...], model: type[BaseModel]) -> tuple[str, ...]:
    """The part of a location that names keys, without pydantic's names for branches of a union."""
    key: list[str] = []
    current: type[BaseModel] | None = model
    for part in location:
        if current is None:
            break
        key.append(part)
        current = _section(current, part)
    return tuple(key)


def _unknown(where: str, location: tuple[str, ...], model: type[BaseModel]) -> str:
    current: type[BaseModel] = model
    for part in location[:-1]:
        current = _section(current, part) or current
    near = difflib.get_close_matches(location[-1], _keys(current), n=1, cutoff=0.5)
    elsewhere = [] if near else _elsewhere(location[-1], model)
    hint = f" Did you mean {'.'.join((*location[:-1], near[0]))!r}?" if near else ""
    hint = f" Did you mean {elsewhere[0]!r}?" if elsewhere else hint
    allowed = ", ".join(_keys(current))
    return (
        f"{where}: unknown key {'.'.join(location)!r}.{hint} Allowed here: {allowed}. "
        "Nothing was run."
    )


def _keys(model: type[BaseModel]) -> list[str]:
    return [name for name, field in model.model_fields.items() if not field.exclude]


def _elsewhere(key: str, model: type[BaseModel]) -> list[str]:
    """Keys of other sections that look like ``key``."""
    places: Mapping[str, str] = {
        name: f"{section}.{name}"
        for section in _keys(model)
        if (inner := _section(model, section)) is not None
        for name in _keys(inner)
    }
    return [places[name] for name in difflib.get_close_matches(key, places, n=1, cutoff=0.6)]


def _section(model: type[BaseModel], key: str) -> type[BaseModel] | None:
    field = model.model_fields.get(key)
    if field is None:
        return None
    for candidate in (field.annotation, *get_args(field.annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None
