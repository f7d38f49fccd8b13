"""fedcore: trains one model on the data of many devices and of the cloud.

Start with `simulate`, which runs a whole federation on this machine; a user supplies a `Task` and
a `RunConfig`. Names are imported on first use, so that a device that only runs inference never
loads torch, and so that Ctrl-C during a slow import still prints a clean message.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

# onnxruntime and Flower send usage reports to their makers unless these variables disable them
# before the import. A device with private data connects only to its server; set the variables
# yourself to enable those reports.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

if TYPE_CHECKING:
    from edge_client.model import EdgeModel, open_model
    from fedcore.artifacts.manifest import Manifest
    from fedcore.config.client_settings import ClientSettings
    from fedcore.config.run import RunConfig
    from fedcore.config.settings import load_run
    from fedcore.errors import FedcoreError
    from fedcore.task.algorithm import Algorithm, ClientUpdate, Round
    from fedcore.task.definition import Task, load_task
    from fedcore.task.metrics import ACCURACY, MAE, PERPLEXITY, RMSE, Metric
    from fedcore.task.partition import by_column, dirichlet, iid, shards
    from server.api.checking import check
    from server.api.evaluating import evaluate
    from server.api.result import History, Result
    from server.api.simulation import simulate
    from server.api.steps import compress, finetune, publish
    from server.check import TaskCheck
    from server.compression.compress import Compressed
    from server.evaluation import ClientScores, Evaluation, MetricSpread
    from server.finetune.launch import Finetuned

__version__ = "0.1.0"

_LAZY = {
    "ACCURACY": "fedcore.task.metrics",
    "Compressed": "server.compression.compress",
    "EdgeModel": "edge_client.model",
    "Algorithm": "fedcore.task.algorithm",
    "ClientScores": "server.evaluation",
    "ClientSettings": "fedcore.config.client_settings",
    "ClientUpdate": "fedcore.task.algorithm",
    "Evaluation": "server.evaluation",
    "FedcoreError": "fedcore.errors",
    "Finetuned": "server.finetune.launch",
    "History": "server.api.result",
    "MAE": "fedcore.task.metrics",
    "Manifest": "fedcore.artifacts.manifest",
    "Metric": "fedcore.task.metrics",
    "MetricSpread": "server.evaluation",
    "PERPLEXITY": "fedcore.task.metrics",
    "RMSE": "fedcore.task.metrics",
    "Result": "server.api.result",
    "Round": "fedcore.task.algorithm",
    "RunConfig": "fedcore.config.run",
    "Task": "fedcore.task.definition",
    "TaskCheck": "server.check",
    "by_column": "fedcore.task.partition",
    "check": "server.api.checking",
    "compress": "server.api.steps",
    "dirichlet": "fedcore.task.partition",
    "evaluate": "server.api.evaluating",
    "finetune": "server.api.steps",
    "iid": "fedcore.task.partition",
    "load_run": "fedcore.config.settings",
    "load_task": "fedcore.task.definition",
    "open_model": "edge_client.model",
    "publish": "server.api.steps",
    "shards": "fedcore.task.partition",
    "simulate": "server.api.simulation",
}

__all__ = [
    "ACCURACY",
    "MAE",
    "PERPLEXITY",
    "RMSE",
    "Algorithm",
    "ClientScores",
    "ClientSettings",
    "ClientUpdate",
    "Compressed",
    "EdgeModel",
    "Evaluation",
    "FedcoreError",
    "Finetuned",
    "History",
    "Manifest",
    "Metric",
    "MetricSpread",
    "Result",
    "Round",
    "RunConfig",
    "Task",
    "TaskCheck",
    "__version__",
    "by_column",
    "check",
    "compress",
    "dirichlet",
    "evaluate",
    "finetune",
    "iid",
    "load_run",
    "load_task",
    "open_model",
    "publish",
    "shards",
    "simulate",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'fedcore' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
