"""Wrapper of a user's `Algorithm` that validates everything its methods return."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from fedcore.config.client_settings import RUN_SETTINGS, ClientSettings, settings_with
from fedcore.config.in_round import client_in_round
from fedcore.config.run import RunConfig
from fedcore.files import sha256_hex
from fedcore.observability.words import a_or_an
from fedcore.seeds import derive
from fedcore.task.algorithm import Algorithm, ClientUpdate, Round
from fedcore.updates.pack import Vector

State = dict[str, Any]
_PLAIN = (bool, int, float, str)
_DTYPES = "bool, int8 to int64, uint8 to uint64, float16 to float64"
_STORED = frozenset(
    np.dtype(name)
    for name in (
        *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("float16", "float32", "float64"),
    )
)


class AlgorithmRefused(Exception):
    """Violation of the `Algorithm` contract; the text begins with the method's name."""


@dataclass(frozen=True)
class RoundSettings:
    """Training settings of a round's clients."""

    common: ClientSettings
    """Settings of every client that is not in ``own``."""
    own: Mapping[str, ClientSettings]
    """Settings of clients that have their own, by name."""


@dataclass(frozen=True)
class CheckedAlgorithm:
    """An algorithm in its run. Methods raise only `AlgorithmRefused`."""

    algorithm: Algorithm
    run: RunConfig
    _before: dict[str, tuple[Any, object]] = field(init=False)
    """The algorithm's attributes at the start, which no method may change."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "_before", _attributes(self.algorithm))

    def round(self, number: int) -> Round:
        """Returns the description of a round that the algorithm's methods get."""
        run = self.run
        seed = derive(run.seed, "strategy", number)
        return Round(number, run.federation.rounds, client_in_round(run, number), seed)

    def initial(self, weights: Vector) -> State:
        """Returns the state before the first round."""
        return _state(self._call("initial", _read_only(weights)), "initial")

    def configure(self, number: int, clients: Sequence[str], state: State) -> RoundSettings:
        """Returns the settings of a round's clients, checked against the bounds of ``[client]``."""
        shown = () if self.run.client_private else tuple(clients)
        settings = self._call("configure", self.round(number), shown, _read_only_copy(state))
        if isinstance(settings, ClientSettings):
            self._check(settings, number, "configure asks for")
            return RoundSettings(settings, {})
        if not isinstance(settings, Mapping):
            raise AlgorithmRefused(
                f"configure returned {_kind(settings)}, expected ClientSettings, or a mapping of "
                "clients' names to ClientSettings"
            )
        if settings and self.run.client_private:
            raise AlgorithmRefused(
                "configure returned settings of single clients, expected one ClientSettings for "
                "all: under client-level privacy the noise hides one client's update, but not "
                "its effect on the settings of others"
            )
        for name, one in settings.items():
            if not isinstance(one, ClientSettings):
                raise AlgorithmRefused(
                    f"configure returned {_kind(one)} for client {name!r}, expected ClientSettings"
                )
            self._check(one, number, f"configure asks client {name!r} for")
        return RoundSettings(
            RUN_SETTINGS, {name: settings[name] for name in clients if name in settings}
        )

    def step(
        self, number: int, weights: Vector, mean: Vector, state: State
    ) -> tuple[Vector, State]:
        """Returns the next weights and state, from the mean of a round's updates."""
        both = (_read_only(weights), _read_only(mean))
        result = self._call("step", self.round(number), *both, _read_only_copy(state))
        return _next(result, weights, "step")

    def aggregate(
        self, number: int, weights: Vector, updates: Sequence[ClientUpdate], state: State
    ) -> tuple[Vector, State]:
        """Returns the next weights and state, from all of a round's updates."""
        given = (_read_only(weights), updates, _read_only_copy(state))
        result = self._call("aggregate", self.round(number), *given)
        return _next(result, weights, "aggregate")

    def _check(self, settings: ClientSettings, number: int, what: str) -> None:
        try:
            settings_with(client_in_round(self.run, number), settings, private=self.run.private)
        except ValueError as error:
            raise AlgorithmRefused(f"{what} {error}") from None

    def _call(self, method: str, *arguments: object) -> Any:
        work: Callable[..., Any] = getattr(self.algorithm, method)
        try:
            result = work(*arguments)
        except (Exception, SystemExit) as error:  # the user's code may raise anything
            where = _line(error, type(self.algorithm))
            raise AlgorithmRefused(
                f"{method} raised {type(error).__name__}: {error}{where}"
            ) from error
        now = _attributes(self.algorithm)
        changed = [
            name
            for name in now.keys() | self._before.keys()
            if not _same(now.get(name), self._before.get(name))
        ]
        if changed:
            raise AlgorithmRefused(
                f"{method} changed self.{min(changed)}, expected it to be unchanged: a resumed "
                "run would lose it. Keep it in the state"
            )
        return result


def _same(one: tuple[Any, object] | None, other: tuple[Any, object] | None) -> bool:
    if one is None or other is None:
        return False
    return one[0] is other[0] and one[1] == other[1]


def _mark(value: Any) -> object:
    """Returns what changes with the contents of an array or container; None for other values."""
    if isinstance(value, np.ndarray):
        return value.shape, sha256_hex(np.ascontiguousarray(value).tobytes())
    return repr(value) if isinstance(value, list | dict | set | bytearray) else None


def _attributes(algorithm: Algorithm) -> dict[str, tuple[Any, object]]:
    """Returns an algorithm's attributes and their marks, without cached properties of its class."""
    cls = type(algorithm)
    return {
        name: (value, _mark(value))
        for name, value in vars(algorithm).items()
        if not isinstance(getattr(cls, name, None), cached_property)
    }


def _next(result: Any, weights: Vector, method: str) -> tuple[Vector, State]:
    if not isinstance(result, tuple) or len(result) != 2:
        raise AlgorithmRefused(f"{method} returned {_kind(result)}, expected (weights, state)")
    made, state = result
    if not isinstance(made, np.ndarray) or made.dtype.kind != "f":
        raise AlgorithmRefused(
            f"{method} returned weights that are {_kind(made)}, expected a float32 array"
        )
    if made.shape != weights.shape:
        raise AlgorithmRefused(
            f"{method} returned weights of shape {made.shape}, expected {weights.shape}, the "
            "shape of the weights that it was given"
        )
    with np.errstate(over="ignore"):  # a float64 out of range becomes an infinity
        found = made.astype(np.float32, copy=False)
    if not np.isfinite(found).all():
        raise AlgorithmRefused(
            f"{method} returned weights that are not all finite, expected finite ones"
        )
    return found, _state(state, method)


def _state(value: Any, method: str) -> State:
    """Validates a returned state and copies it, with arrays as read-only views."""
    if not isinstance(value, Mapping):
        raise AlgorithmRefused(f"{method} returned a state that is {_kind(value)}, expected a dict")
    kept: State = {}
    for name, one in value.items():
        if type(name) is not str:
            raise AlgorithmRefused(
                f"{method} returned a state with the name {name!r}, expected text"
            )
        fits = one.dtype in _STORED if isinstance(one, np.ndarray | np.generic) else False
        if not fits and type(one) not in _PLAIN:
            raise AlgorithmRefused(
                f"{method} returned a state in which {name!r} is {_kind(one)}, which cannot be "
                f"stored: expected a NumPy array or number ({_DTYPES}), or a bool, int, float or "
                "str"
            )
        kept[name] = one
    return _read_only_copy(kept)


def _read_only_copy(state: State) -> State:
    """Returns a copy of the state to hand to an algorithm, with arrays as read-only views."""
    return {
        name: _read_only(one) if isinstance(one, np.ndarray) else one for name, one in state.items()
    }


def _read_only(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    view = values.view()
    view.flags.writeable = False
    return view


def _kind(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype} {value.shape}"
    return "None" if value is None else a_or_an(type(value).__name__)


def _line(error: BaseException, cls: type) -> str:
    """Returns a text with the line in the file of ``cls`` that raised an error; else empty."""
    module = sys.modules.get(cls.__module__)
    file, number = getattr(module, "__file__", None), 0
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == file:
            number = trace.tb_lineno
        trace = trace.tb_next
    return f" (line {number} of its file)" if number else ""
