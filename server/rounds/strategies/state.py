"""State of a Flower strategy between rounds: extract it, and restore it into a new instance.

Flower's strategies cannot be saved. Their state (moments, the clipping norm, the previous round's
weights) is in their attributes, which this module walks.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray

from fedcore.errors import ConfigError, DataError

_PLAIN = (type(None), bool, int, float, str)
_STORED_KINDS = "biuf"  # kinds of NumPy dtypes: booleans, integers, floats


@dataclass(frozen=True)
class StrategyState:
    """Attributes of a strategy, and of the strategies that it wraps."""

    tree: Any
    """JSON values; an array is an object with its index in ``arrays``."""
    arrays: tuple[NDArray[Any], ...]


def strategy_state_of(strategy: Strategy) -> StrategyState:
    """Returns the current state of ``strategy``.

    Arrays of Flower's own strategies are not copied, since these replace them; a user's may change
    them in place, and are copied.

    Raises:
        ConfigError: an attribute cannot be stored. Nothing is left out silently.
    """
    arrays: list[NDArray[Any]] = []
    tree = _encode(strategy, type(strategy).__name__, arrays)
    if not type(strategy).__module__.startswith("flwr."):
        arrays = [array.copy() for array in arrays]
    return StrategyState(tree, tuple(arrays))


def restore_strategy(strategy: Strategy, what: StrategyState) -> None:
    """Restores the state ``what`` into a new strategy with the original's class and options.

    Raises:
        DataError: the two are not the same strategy.
    """
    _restore(strategy, what.tree, what.arrays, type(strategy).__name__)


def _encode(value: Any, where: str, arrays: list[NDArray[Any]]) -> Any:
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind is dict:
        pairs = [[key, _encode(item, f"{where}[{key!r}]", arrays)] for key, item in value.items()]
        if all(type(key) in _PLAIN for key in value):
            return {"dict": pairs}
    elif kind in (list, tuple):
        return {kind.__name__: [_encode(item, f"{where}[]", arrays) for item in value]}
    elif isinstance(value, np.ndarray | np.generic) and value.dtype.kind in _STORED_KINDS:
        # A NumPy number is not a Python one: the type decides in which precision it multiplies.
        form = "scalar" if isinstance(value, np.generic) else "array"
        return {form: _store_array(np.asarray(value, order="C"), arrays)}
    elif kind is Array:
        data = np.frombuffer(value.data, np.uint8)
        return {"Array": [value.dtype, list(value.shape), value.stype, _store_array(data, arrays)]}
    elif kind is ArrayRecord:
        items = [[name, _encode(array, where, arrays)] for name, array in value.items()]
        return {"ArrayRecord": items}
    elif isinstance(value, Strategy):
        stored = [
            [name, _encode(v, f"{where}.{name}", arrays)]
            for name, v in _stored_attributes(value).items()
        ]
        return {"strategy": kind.__name__, "holds": stored}
    elif inspect.isroutine(value):
        return {"function": _name(value)}
    raise ConfigError(
        f"federation.strategy: {where} is a {kind.__name__}, which a checkpoint cannot store. "
        "Nothing was lost; use arrays, numbers and text in your own class, or choose another "
        "strategy, or a version of Flower that fedcore supports."
    )


def _stored_attributes(strategy: Strategy) -> dict[str, Any]:
    """Returns the attributes to store: all, unless the class names them in ``REMEMBERS``."""
    names: Sequence[str] | None = getattr(type(strategy), "REMEMBERS", None)
    stored = vars(strategy)
    return stored if names is None else {name: stored[name] for name in names}


def _store_array(array: NDArray[Any], arrays: list[NDArray[Any]]) -> int:
    arrays.append(array)
    return len(arrays) - 1


def _name(function: Any) -> str:
    return f"{function.__module__}.{function.__qualname__}"


def _restore(strategy: Strategy, tree: Any, arrays: Sequence[NDArray[Any]], where: str) -> Strategy:
    if tree["strategy"] != type(strategy).__name__:
        raise _mismatch(where, tree["strategy"], type(strategy).__name__)
    stored, current = dict(tree["holds"]), _stored_attributes(strategy)
    if set(stored) != set(current):
        raise _mismatch(where, f"attributes {sorted(stored)}", f"attributes {sorted(current)}")
    for name, item in stored.items():
        setattr(strategy, name, _decode(item, current[name], arrays, f"{where}.{name}"))
    return strategy


def _decode(tree: Any, current: Any, arrays: Sequence[NDArray[Any]], where: str) -> Any:
    """Returns the value that ``tree`` encodes; ``current`` is the new strategy's own."""
    match tree:
        case {"dict": pairs}:
            stored = current if isinstance(current, dict) else {}
            return {key: _decode(item, stored.get(key), arrays, where) for key, item in pairs}
        case {"list": items} | {"tuple": items}:
            given = list(current) if isinstance(current, list | tuple) else []
            given += [None] * (len(items) - len(given))
            made = [_decode(item, given[at], arrays, where) for at, item in enumerate(items)]
            return made if "list" in tree else tuple(made)
        case {"array": place}:
            return arrays[place].copy()
        case {"scalar": place}:
            return arrays[place][()]
        case {"Array": [dtype, shape, stype, place]}:
            return Array(dtype, tuple(shape), stype, arrays[place].tobytes())
        case {"ArrayRecord": items}:
            return ArrayRecord({name: _decode(item, None, arrays, where) for name, item in items})
        case {"strategy": name}:
            if not isinstance(current, Strategy):
                raise _mismatch(where, name, type(current).__name__)
            return _restore(current, tree, arrays, where)
        case {"function": name}:  # never looked up by name: the new strategy has it
            if not inspect.isroutine(current) or _name(current) != name:
                raise _mismatch(where, name, repr(current))
            return current
    return tree


def _mismatch(where: str, got: str, expected: str) -> DataError:
    return DataError(
        f"checkpoint: {where}: got {got}, expected {expected}: it was written by another "
        "strategy or another version of Flower. Nothing was run; resume with the version that "
        "started the run, or start over with --fresh (in Python fresh=True)."
    )
