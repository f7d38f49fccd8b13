"""A ServerApp's rounds over devices that are there."""

from __future__ import annotations

from typing import Any

from fedcore.seeds import Simulated
from fedcore.task.definition import load_task
from server.records import RoundRecord
from server.rounds.app import Listener, server_app


def federate(
    project: Any, served: Any, run: Any, notes: list[str] | None = None
) -> list[RoundRecord]:
    records: list[RoundRecord] = []
    app = server_app(
        load_task(project.task),
        run,
        cloud=None,
        randomness=Simulated(run.seed),
        listener=Listener(
            (notes if notes is not None else []).append, records.append, lambda outcome: None
        ),
        peers=served.listening.peers,
    )
    app(served.listening.grid(), None)  # type: ignore[arg-type]
    return records
