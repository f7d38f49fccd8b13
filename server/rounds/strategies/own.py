"""The user's own strategy: loads its class from a file or takes it from Python, and creates it."""

from __future__ import annotations

import copy
import difflib
import importlib.util
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.serverapp.strategy import Strategy

from fedcore.config.run import RunConfig
from fedcore.errors import ConfigError
from fedcore.files import sha256_hex
from fedcore.observability.words import a_or_an
from fedcore.task.algorithm import Algorithm

UserStrategy = Algorithm | Strategy
"""An `Algorithm`, or an instance of a user's subclass of Flower's ``Strategy``."""
_EXPECTED = "a subclass of fedcore.Algorithm or of flwr.serverapp.strategy.Strategy"


def names_user_strategy(strategy: str) -> bool:
    """Whether ``federation.strategy`` names a user's class, in the form ``FILE.py:CLASS``."""
    return ":" in strategy


def file_of(run: RunConfig) -> Path | None:
    """Returns the file of the run's own strategy; None where it has none or is in memory."""
    file, separator, _ = run.federation.strategy.rpartition(":")
    return run.path(file) if separator and file.endswith(".py") else None


def label_of(own: UserStrategy | type[UserStrategy]) -> str:
    """Returns the display name of a strategy that was passed in from Python: ``MODULE:CLASS``."""
    cls = own if isinstance(own, type) else type(own)
    return f"{cls.__module__}:{cls.__qualname__}"


def user_strategy(run: RunConfig, given: UserStrategy | type[UserStrategy] | None) -> UserStrategy:
    """Returns a new instance of the run's own strategy.

    Args:
        run: The run; ``federation.strategy_options`` are the arguments of a class.
        given: The strategy or class that was passed in from Python; None to load the class that the
            configuration names.

    Raises:
        ConfigError: the file or class does not exist, is not a strategy, or rejects its options.
            Nothing was run.
    """
    federation = run.federation
    where = f"federation.strategy = {federation.strategy!r}"
    if isinstance(given, Strategy | Algorithm):
        if isinstance(given, Algorithm):
            _check_algorithm(given, where)
        try:
            return copy.deepcopy(given)  # other runs may use it, and this one is tried first
        except Exception as error:  # an attribute may be of any class
            raise ConfigError(
                f"{where}: it cannot be copied: {type(error).__name__}: {error}. Nothing was run; "
                "give its class, with federation.strategy_options."
            ) from error
    if given is None:
        given = _load_class(run, where)
        check_user_strategy(given, where)
    if isinstance(given, type):
        given = _construct(given, federation.strategy_options, where)
    if isinstance(given, Algorithm):
        _check_algorithm(given, where)
    return given


def _load_class(run: RunConfig, where: str) -> type[UserStrategy]:
    _, _, name = run.federation.strategy.rpartition(":")
    path = file_of(run)
    if path is None or not name.isidentifier():
        raise ConfigError(
            f"{where}: expected FILE.py:CLASS, e.g. 'mine.py:MyStrategy', with the file relative "
            "to the run's, or the name of a strategy of Flower's. Nothing was run."
        )
    if not path.is_file():
        raise ConfigError(
            f"{where}: there is no file {path}. Nothing was run; a relative path is relative to "
            "the folder of the run's file."
        )
    found = vars(_load_module(path, where))
    if name not in found:
        classes = [one for one, value in found.items() if isinstance(value, type)]
        near = difflib.get_close_matches(name, classes, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{where}: {path} has no class {name!r}.{hint} Nothing was run.")
    cls: type[UserStrategy] = found[name]
    return cls


def _load_module(path: Path, where: str) -> Any:
    name = f"fedcore_strategy_{sha256_hex(str(path).encode())[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None  # the name ends in .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # any error of the user's file: reported with its text
        del sys.modules[name]
        raise ConfigError(
            f"{where}: importing {path} failed: {type(error).__name__}: {error}. Nothing was "
            "run; run `python` on the file to see where."
        ) from error
    finally:
        sys.path.remove(str(path.parent))
    return module


def check_user_strategy(given: object, where: str = "strategy") -> None:
    """Rejects an object that is neither a strategy nor a strategy's class.

    Raises:
        ConfigError: it is something else.
    """
    cls = given if isinstance(given, type) else type(given)
    if not issubclass(cls, Algorithm | Strategy) or inspect.isabstract(cls):
        kind = f"class {cls.__name__}" if given is cls else a_or_an(cls.__name__)
        lacks = ", ".join(sorted(getattr(cls, "__abstractmethods__", ())))
        without = f" without {lacks}" if lacks else ""
        raise ConfigError(f"{where}: it is {kind}{without}, expected {_EXPECTED}. Nothing was run.")


def _construct(cls: type[UserStrategy], options: Mapping[str, Any], where: str) -> UserStrategy:
    try:
        inspect.signature(cls).bind(**options)
    except TypeError as error:
        takes = ", ".join(inspect.signature(cls).parameters)
        raise ConfigError(
            f"{where}: federation.strategy_options = {dict(options)}: {error}. {cls.__name__} "
            f"accepts: {takes or 'none'}. Nothing was run."
        ) from None
    try:
        return cls(**options)
    except (Exception, SystemExit) as error:  # the user's code
        raise ConfigError(
            f"{where}: {cls.__name__} refused federation.strategy_options = {dict(options)}: "
            f"{type(error).__name__}: {error}. Nothing was run."
        ) from error


def _check_algorithm(algorithm: Algorithm, where: str) -> None:
    cls, folds = type(algorithm), algorithm.folds
    if type(folds) is not bool:
        raise ConfigError(
            f"{where}: {cls.__name__}.folds = {folds!r}, expected True or False, which says "
            "whether the next model depends on the mean of the updates only. Nothing was run."
        )
    needed, other = ("step", "aggregate") if folds else ("aggregate", "step")
    if getattr(cls, needed) is getattr(Algorithm, needed):
        has_other = getattr(cls, other) is not getattr(Algorithm, other)
        has = f", but it has {other}" if has_other else ""
        raise ConfigError(
            f"{where}: {cls.__name__} has folds = {folds}, which needs a method {needed}{has}. "
            f"Nothing was run; write {needed}, or set folds = {not folds} and write {other}."
        )
