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
    from fedcore.config import RunConfig
    from fedcore.errors import FedcoreError
    from fedcore.metrics import ACCURACY, MAE, PERPLEXITY, RMSE, Metric
    from fedcore.partition import by_column, dirichlet, iid, shards
    from fedcore.settings import load_run
    from fedcore.task import Task, load_task

__version__ = "0.1.0"

_LAZY = {
    "ACCURACY": "metrics",
    "FedcoreError": "errors",
    "MAE": "metrics",
    "Metric": "metrics",
    "PERPLEXITY": "metrics",
    "RMSE": "metrics",
    "RunConfig": "config",
    "Task": "task",
    "by_column": "partition",
    "dirichlet": "partition",
    "iid": "partition",
    "load_run": "settings",
    "load_task": "task",
    "shards": "partition",
}

__all__ = [
    "ACCURACY",
    "MAE",
    "PERPLEXITY",
    "RMSE",
    "FedcoreError",
    "Metric",
    "RunConfig",
    "Task",
    "__version__",
    "by_column",
    "dirichlet",
    "iid",
    "load_run",
    "load_task",
    "shards",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'fedcore' has no attribute {name!r}")
    return getattr(import_module(f"fedcore.{_LAZY[name]}"), name)
