"""fedcore: one model over devices' data and the cloud's.

Names are imported on first use, so that a device that only infers never loads torch, and a command
that is stopped while it loads can say so.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

# onnxruntime and Flower report how they are used to their makers unless they are told not to before
# they are loaded. A device that holds private data calls nobody but its server; whoever wants those
# reports sets the variables.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

if TYPE_CHECKING:
    from fedcore.config.client_settings import ClientSettings
    from fedcore.config.run import RunConfig
    from fedcore.config.settings import load_run
    from fedcore.errors import FedcoreError
    from fedcore.task.algorithm import Algorithm, ClientUpdate, Round
    from fedcore.task.definition import Task, load_task
    from fedcore.task.metrics import ACCURACY, MAE, PERPLEXITY, RMSE, Metric
    from fedcore.task.partition import by_column, dirichlet, iid, shards
    from server.api import History, Result, simulate

__version__ = "0.1.0"

_LAZY = {
    "ACCURACY": "fedcore.task.metrics",
    "Algorithm": "fedcore.task.algorithm",
    "ClientSettings": "fedcore.config.client_settings",
    "ClientUpdate": "fedcore.task.algorithm",
    "FedcoreError": "fedcore.errors",
    "History": "server.api",
    "MAE": "fedcore.task.metrics",
    "Metric": "fedcore.task.metrics",
    "PERPLEXITY": "fedcore.task.metrics",
    "RMSE": "fedcore.task.metrics",
    "Result": "server.api",
    "Round": "fedcore.task.algorithm",
    "RunConfig": "fedcore.config.run",
    "Task": "fedcore.task.definition",
    "by_column": "fedcore.task.partition",
    "dirichlet": "fedcore.task.partition",
    "iid": "fedcore.task.partition",
    "load_run": "fedcore.config.settings",
    "load_task": "fedcore.task.definition",
    "shards": "fedcore.task.partition",
    "simulate": "server.api",
}

__all__ = [
    "ACCURACY",
    "MAE",
    "PERPLEXITY",
    "RMSE",
    "Algorithm",
    "ClientSettings",
    "ClientUpdate",
    "FedcoreError",
    "History",
    "Metric",
    "Result",
    "Round",
    "RunConfig",
    "Task",
    "__version__",
    "by_column",
    "dirichlet",
    "iid",
    "load_run",
    "load_task",
    "shards",
    "simulate",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'fedcore' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
