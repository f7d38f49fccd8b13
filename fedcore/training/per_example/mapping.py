"""torch's vmap without its performance warnings.

Where torch has no batching rule for an operation (such as attention, LSTMs and bags of tokens),
vmap runs it once per example. The result is correct and slightly slower, but torch warns each time
with internal source code that gives the user nothing to act on.
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
    """Returns `torch.func.vmap` of a function, with the fallback warning off during each call."""
    mapped = func.vmap(function, in_dims=in_dims, randomness=randomness)

    @wraps(mapped)
    def call(*values: Any) -> Any:
        with _without_notes():
            return mapped(*values)

    return call


@contextmanager
def _without_notes() -> Iterator[None]:
    """Turns off torch's vmap fallback warning within the context; other warnings stay on."""
    switch = torch._C._functorch._set_vmap_fallback_warning_enabled  # type: ignore[attr-defined]
    switch(False)
    try:
        yield
    finally:
        switch(True)
