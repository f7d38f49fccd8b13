"""Sets the task identity that Flower requires of a process that creates a `Message`."""

from __future__ import annotations

from flwr.app import Context, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.supercore.task_identity import TaskIdentity

SERVER_NODE_ID: int = SUPERLINK_NODE_ID


def assume_identity(run_id: int) -> None:
    """Gives this process the identity of the server of run ``run_id``."""
    TaskIdentity.task_id = 1
    TaskIdentity.run_id = run_id
    TaskIdentity.node_id = SERVER_NODE_ID


def server_context(run_id: int) -> Context:
    """Returns the context of a ServerApp of run ``run_id``."""
    return Context(
        run_id=run_id,
        node_id=SERVER_NODE_ID,
        node_config={},
        state=RecordDict(),
        run_config={},
    )
