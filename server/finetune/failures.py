"""What errors of fine-tuning's processes say, and which are consequences of others."""

from __future__ import annotations

_CONSEQUENCES = ("gloo/transport", "DistBackendError", "Connection reset", "Connection closed")


def unknown_failure(rank: int, error: BaseException) -> str:
    """Returns the message for an unexpected exception, usually from the task's code."""
    return (
        f"fine-tuning: process {rank} failed: {type(error).__name__}: {error}. The federated "
        "model is kept; correct the task, or set finetune.epochs to 0."
    )


def is_consequence(message: str) -> bool:
    """Returns whether a process failed only because it lost the connection to another one.

    A process that fails closes its connections before its own error is read, so the error of a
    process that waited for it can arrive first.
    """
    return any(part in message for part in _CONSEQUENCES)
