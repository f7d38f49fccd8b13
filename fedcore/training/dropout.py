"""Runs models without dropout, to compare what they compute otherwise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional

from fedcore.training.function_mode import FunctionMode


class WithoutDropout(FunctionMode):
    """Torch function mode in which nothing is dropped."""

    def call(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        kwargs = dict(kwargs)
        if func in _WHOLE:
            return args[0] if args else kwargs["input"]
        if func in _PLACES:
            place = _PLACES[func]
            if func in _RECURRENT and not isinstance(args[3], bool):
                place += 1  # of packed sequences, whose lengths come second
            args = tuple(0.0 if at == place else value for at, value in enumerate(args))
            kwargs |= {"dropout_p": 0.0} if "dropout_p" in kwargs else {}
        return func(*args, **kwargs)


_WHOLE = (functional.dropout, functional.dropout1d, functional.dropout2d, functional.dropout3d)
_RECURRENT = (torch.gru, torch.lstm, torch.rnn_tanh, torch.rnn_relu)
_PLACES = {
    functional.scaled_dot_product_attention: 4,
    functional.multi_head_attention_forward: 10,
    **dict.fromkeys(_RECURRENT, 5),
}
"""Functions with a probability of dropping values, and its place among their arguments."""
