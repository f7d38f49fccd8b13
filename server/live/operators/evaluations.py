"""Operators' requests to have devices evaluate a model, carried out between two rounds.

A request waits in its own thread; the thread of the rounds carries it out with `run_pending`, so
that devices never have two instructions at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedcore.config.run import RunConfig
from fedcore.errors import ConfigError, FedcoreError, ResourceError
from server.live.operators.protocol import OperatorRequest, Requester

_POLL_S = 0.25
_OVER = ("stopping", "finishing", "ended")  # states after which no round ends any more
EvaluateFile = Callable[[Path], dict[str, Any]]
"""Has devices evaluate the checkpoint in a file; returns the answer for the operator."""


@dataclass
class _Pending:
    file: Path
    answer: dict[str, Any] | None = None
    error: BaseException | None = None
    done: threading.Event = field(default_factory=threading.Event)


class PendingEvaluations:
    """The requests that wait for the end of a round; at most one at a time."""

    def __init__(self) -> None:
        """Starts without requests."""
        self._lock = threading.Lock()
        self._waiting: _Pending | None = None

    def act(
        self,
        run: RunConfig,
        request: OperatorRequest,
        sender: Requester,
        state: Callable[[], str],
        disconnected: Callable[[], bool],
    ) -> Callable[[], dict[str, Any]]:
        """Checks a request, and returns the function that waits until it is carried out.

        Args:
            run: The run.
            request: Names the checkpoint's absolute path on the server's machine.
            sender: Who sent it.
            state: Returns the run's state, as ``status`` shows it.
            disconnected: Whether the sender has disconnected.

        Raises:
            ConfigError: it is not from the server's own machine, or the run's devices hold no data
                back.
            ResourceError: another request waits.
        """
        if not sender.local:
            raise ConfigError(
                "evaluate: it can only be requested on the server's own machine. Nothing was "
                "evaluated; log in there, and pass the server's folder with --identity."
            )
        if not (run.federation.holdout and run.federation.evaluate_cohort):
            raise ConfigError(
                f"evaluate: devices hold no data back in the run {run.name!r}, so there are none "
                "to evaluate a model on. Nothing was evaluated; set federation.holdout and "
                "federation.evaluate_cohort in a new run."
            )

        def act() -> dict[str, Any]:
            wanted = _Pending(Path(request.file or ""))
            with self._lock:
                if self._waiting is not None:
                    raise ResourceError(
                        "evaluate: another evaluation waits for the end of this round, or is under "
                        "way. Nothing was evaluated; try again when it is done."
                    )
                self._waiting = wanted
            try:
                while not wanted.done.wait(_POLL_S):
                    if disconnected() or state() in _OVER:
                        raise ResourceError(
                            f"evaluate: the rounds of {run.name!r} are ending, or you disconnected "
                            "before a round ended. There is no result; evaluate the model once "
                            "another run is up."
                        )
            finally:
                with self._lock:
                    self._waiting = None
            if wanted.error is not None:
                raise wanted.error
            assert wanted.answer is not None
            return wanted.answer

        return act

    def run_pending(self, evaluate: EvaluateFile) -> None:
        """Carries out the request that waits, if any; a failure goes to its sender.

        Raises:
            ServerStopped: the server stops meanwhile.
        """
        with self._lock:
            wanted = self._waiting
        if wanted is None or wanted.done.is_set():
            return
        try:
            wanted.answer = evaluate(wanted.file)
        except FedcoreError as error:
            wanted.error = error
        except BaseException:
            wanted.error = ResourceError(
                "evaluate: the server stopped during the evaluation. There is no result."
            )
            raise
        finally:
            wanted.done.set()
