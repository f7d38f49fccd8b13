"""Executor with worker processes, one thread each."""

from __future__ import annotations

import multiprocessing
import signal
import time
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkContext, SpawnContext
from multiprocessing.process import BaseProcess

import torch

from fedcore.errors import FedcoreError, RoundFailed
from fedcore.flower.identity import assume_identity
from server.process.memory import reuse_large_blocks
from server.process.parent import die_with_parent
from server.process.signals import signals_blocked, unblock_signals
from server.process.spawn import main_script_hidden
from server.rounds.aggregation.exact_mean import ExactMean
from server.simulation.virtual.nodes import RUN_ID
from server.simulation.workers.executor import MakeWorker, gathered, pieces
from server.simulation.workers.messages import ClientOutcome, ClientRef, RoundTask

_KILLED = " This usually means that memory ran out: use fewer simulation.workers."
_END_S = 0.5  # longer than an idle process needs to exit


class ProcessPool:
    """Worker processes, forked from this one to share what it has loaded.

    A chunk of clients goes to the next free worker. Each worker keeps its sum until the task ends.
    Threads and GPUs do not survive a fork: a forked process computes in one thread. With ``gpus``,
    processes are spawned instead, and assigned to the GPUs in turn.
    """

    def __init__(self, make: MakeWorker, size: int, *, gpus: int = 0) -> None:
        context: ForkContext | SpawnContext
        if gpus:
            context = multiprocessing.get_context("spawn")
        else:
            context = multiprocessing.get_context("fork")
        self._connections: list[Connection] = []
        self._processes: list[BaseProcess] = []
        for number in range(size):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve,
                args=(there, [] if gpus else [*self._connections, here], make),
                kwargs={"gpu": number % gpus if gpus else None},
                name=f"fedcore-worker-{number}",
                daemon=False,  # a daemon could not start processes, as a task's loader may
            )
            # Until the process has set its signal handlers.
            with signals_blocked(), main_script_hidden():
                process.start()
            there.close()
            self._connections.append(here)
            self._processes.append(process)

    @property
    def size(self) -> int:
        """Number of processes."""
        return len(self._processes)

    def run_task(
        self, order: RoundTask, clients: Sequence[ClientRef]
    ) -> tuple[list[ClientOutcome], ExactMean]:
        """Sends clients to workers in chunks; returns outcomes and the sum of folded updates.

        Raises:
            RoundFailed: a worker died, or had an error that is not a client's.
            FedcoreError: a worker raised it.
        """
        waiting = list(pieces(order, clients, self.size))[::-1]
        answers: list[ClientOutcome] = []
        sums: list[ExactMean] = []
        held: dict[Connection, Sequence[ClientRef]] = {}
        for connection in self._connections:
            if waiting:
                self._send(connection, held, order, waiting.pop())
        while held:
            for ready in wait(list(held)):
                connection = next(one for one in held if one is ready)
                done = self._receive(connection, held)
                if isinstance(done, ExactMean):
                    sums.append(done)
                    continue
                answers += done
                if waiting:
                    self._send(connection, held, None, waiting.pop())
                else:
                    self._send(connection, held, None, ())
        return gathered(answers, sums, clients)

    def close(self) -> None:
        """Stops the processes."""
        for connection in self._connections:
            connection.close()
        until = time.monotonic() + _END_S
        for process in self._processes:
            process.join(max(0.0, until - time.monotonic()))
            if process.is_alive():  # in the middle of a client
                process.kill()
                process.join()

    def _send(
        self,
        connection: Connection,
        held: dict[Connection, Sequence[ClientRef]],
        order: RoundTask | None,
        piece: Sequence[ClientRef],
    ) -> None:
        held[connection] = piece
        try:
            connection.send((order, piece))
        except OSError:
            raise self._died(connection, piece) from None

    def _receive(
        self, connection: Connection, held: dict[Connection, Sequence[ClientRef]]
    ) -> list[ClientOutcome] | ExactMean:
        piece = held.pop(connection)
        try:
            got = connection.recv()
        except (EOFError, OSError):
            raise self._died(connection, piece) from None
        if isinstance(got, FedcoreError):
            raise got
        if isinstance(got, str):
            raise RoundFailed(
                f"simulation: a worker failed while it trained {_named(piece)}. The round was "
                f"dropped. Its error: {got}"
            )
        return got  # type: ignore[no-any-return]

    def _died(self, connection: Connection, piece: Sequence[ClientRef]) -> RoundFailed:
        process = self._processes[self._connections.index(connection)]
        process.join(_END_S)
        code = process.exitcode
        how = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
        return RoundFailed(
            f"simulation: worker {process.name} died ({how}) while it trained {_named(piece)}. The "
            f"round was dropped.{_KILLED if code == -signal.SIGKILL else ''} `fedcore simulate "
            "--resume` (in Python resume=True) continues from the last checkpoint."
        )


def _named(piece: Sequence[ClientRef]) -> str:
    names = [repr(one.name) for one in piece]
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"clients {', '.join(names[:5])}{more}" if names else "nobody"


def _serve(
    connection: Connection, others: Sequence[Connection], make: MakeWorker, *, gpu: int | None
) -> None:
    """Main loop of a worker process; returns when the other end of its connection is closed."""
    die_with_parent()
    for other in others:  # an inherited copy would keep the connection open
        other.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends Ctrl-C to every process
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    unblock_signals()
    torch.set_num_threads(1)
    if gpu is not None and torch.cuda.is_available():
        torch.cuda.set_device(gpu)
    reuse_large_blocks()
    assume_identity(RUN_ID)
    worker = None
    while True:
        try:
            order, piece = connection.recv()
        except (EOFError, OSError):
            return
        try:
            if worker is None:
                worker = make()
            if order is not None:
                worker.start_task(order)
            answer: object = worker.work(piece) if piece else worker.partial_sum()
        except FedcoreError as error:
            answer = error
        except Exception:  # the parent raises it
            answer = traceback.format_exc()
        try:
            connection.send(answer)
        except OSError:
            return
