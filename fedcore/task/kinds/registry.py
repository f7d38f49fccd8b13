"""The built-in kinds of problem by name."""

from __future__ import annotations

import re
from typing import Literal

from fedcore.errors import TaskError
from fedcore.task.kinds.binary import Binary
from fedcore.task.kinds.classification import Classification
from fedcore.task.kinds.multilabel import Multilabel
from fedcore.task.kinds.next_token import NextToken
from fedcore.task.kinds.protocol import Kind
from fedcore.task.kinds.regression import Regression
from fedcore.task.kinds.segmentation import Segmentation
from fedcore.task.kinds.sequence import Sequence

KindName = Literal[
    "classification",
    "regression",
    "next_token",
    "binary",
    "multilabel",
    "segmentation",
    "sequence",
]

_BUILT_IN: tuple[Kind, ...] = (
    Classification(),
    Regression(),
    NextToken(),
    Binary(),
    Multilabel(),
    Segmentation(),
    Sequence(),
)
_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")


def kind_of(given: str | Kind, *, task: str) -> Kind:
    """Returns the built-in kind of a name, or a user's own kind after a check of its name.

    Raises:
        TaskError: there is no such kind, or the object is not one.
    """
    by_name = {kind.name: kind for kind in _BUILT_IN}
    if isinstance(given, str):
        if given in by_name:
            return by_name[given]
        raise TaskError(
            f"task {task!r}: kind = {given!r}; allowed: {', '.join(by_name)}, or an object of a "
            "subclass of fedcore.Kind. Nothing was run; correct the task file."
        )
    if isinstance(given, type) or not isinstance(given, Kind):
        raise TaskError(
            f"task {task!r}: kind is {getattr(given, '__name__', type(given).__name__)}, expected "
            "a name or an object of a subclass of fedcore.Kind, such as kind=MyKind(). Nothing "
            "was run; correct the task file."
        )
    name = getattr(given, "name", None)
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise TaskError(
            f"task {task!r}: its kind {type(given).__name__} has the name {name!r}, expected up to "
            "64 lower-case letters, digits and '_', with a letter first, because released models "
            "carry it. Nothing was run; correct the kind's `name`."
        )
    if name in by_name and given != by_name[name]:
        raise TaskError(
            f"task {task!r}: its own kind {type(given).__name__} has the name of the built-in kind "
            f"{name!r}. Nothing was run; give it another `name`."
        )
    return given
