"""torch's vmap, without what it prints of itself.

An operation for which torch has no batching rule is run once for each example: attention, LSTMs and
bags of tokens are. That is right and a little slower, and torch says so with a page of its own
sources each time, which tells nobody what to do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import func


def vmap(
    function: Callable[..., Any],
    in_dims: Any = 0,
    *,
    randomness: str = "error",
) -> Callable[..., Any]:
    """As `torch.func.vmap`; see the module."""
    mapped = func.vmap(function, in_dims=in_dims, randomness=randomness)

    @wraps(mapped)
    def call(*values: Any) -> Any:
        with _without_notes():
            return mapped(*values)

    return call


@contextmanager
def _without_notes() -> Iterator[None]:
    """Torch's own switch for this one warning: other warnings are shown as ever."""
    switch = torch._C._functorch._set_vmap_fallback_warning_enabled  # type: ignore[attr-defined]
    switch(False)
    try:
        yield
    finally:
        switch(True)
