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
    from edge_client.delivery.update import UpdateResult
    from edge_client.live import LiveModel, VersionedOutputs, follow_model
    from edge_client.model import EdgeModel, open_model, update_model
    from fedcore.artifacts.manifest import Manifest
    from fedcore.config.client_settings import ClientSettings
    from fedcore.config.run import RunConfig
    from fedcore.config.settings import load_run
    from fedcore.errors import FedcoreError
    from fedcore.sources.arrays import from_arrays
    from fedcore.sources.client_data import ClientData
    from fedcore.sources.frames import from_frames
    from fedcore.sources.hub import from_datasets
    from fedcore.sources.images import from_folder
    from fedcore.task.adapters import merge_adapters, with_adapters
    from fedcore.task.algorithm import Algorithm, ClientUpdate, Round
    from fedcore.task.definition import Task, load_task
    from fedcore.task.kinds.protocol import Kind
    from fedcore.task.metrics import ACCURACY, MAE, PERPLEXITY, RMSE, Metric
    from fedcore.task.partition import by_column, dirichlet, iid, shards
    from fedcore.task.statistics import Statistics
    from fedcore.task.templates import NewTask, new_task
    from server.api.checking import check
    from server.api.evaluating import evaluate
    from server.api.releases import (
        NewRepository,
        create_repository,
        list_releases,
        refresh_repository,
        roll_back,
        rotate_keys,
    )
    from server.api.replaying import replay
    from server.api.result import History, Result
    from server.api.simulation import simulate
    from server.api.steps import compress, finetune, publish
    from server.checking.findings import TaskCheck
    from server.compression.compress import Compressed
    from server.evaluation import ClientScores, Evaluation, MetricSpread
    from server.finetune.launch import Finetuned
    from server.release.registry.rotation import Rotation
    from server.simulation.replay import Replayed

__version__ = "0.1.0"

_LAZY = {
    "ACCURACY": "fedcore.task.metrics",
    "Algorithm": "fedcore.task.algorithm",
    "ClientData": "fedcore.sources.client_data",
    "ClientScores": "server.evaluation",
    "ClientSettings": "fedcore.config.client_settings",
    "ClientUpdate": "fedcore.task.algorithm",
    "Evaluation": "server.evaluation",
    "Compressed": "server.compression.compress",
    "EdgeModel": "edge_client.model",
    "FedcoreError": "fedcore.errors",
    "Finetuned": "server.finetune.launch",
    "History": "server.api.result",
    "Kind": "fedcore.task.kinds.protocol",
    "LiveModel": "edge_client.live",
    "MAE": "fedcore.task.metrics",
    "Manifest": "fedcore.artifacts.manifest",
    "Metric": "fedcore.task.metrics",
    "MetricSpread": "server.evaluation",
    "NewRepository": "server.api.releases",
    "NewTask": "fedcore.task.templates",
    "PERPLEXITY": "fedcore.task.metrics",
    "RMSE": "fedcore.task.metrics",
    "Replayed": "server.simulation.replay",
    "Result": "server.api.result",
    "Rotation": "server.release.registry.rotation",
    "Round": "fedcore.task.algorithm",
    "RunConfig": "fedcore.config.run",
    "Statistics": "fedcore.task.statistics",
    "Task": "fedcore.task.definition",
    "TaskCheck": "server.checking.findings",
    "UpdateResult": "edge_client.delivery.update",
    "VersionedOutputs": "edge_client.live",
    "by_column": "fedcore.task.partition",
    "check": "server.api.checking",
    "compress": "server.api.steps",
    "create_repository": "server.api.releases",
    "dirichlet": "fedcore.task.partition",
    "evaluate": "server.api.evaluating",
    "finetune": "server.api.steps",
    "follow_model": "edge_client.live",
    "from_arrays": "fedcore.sources.arrays",
    "from_datasets": "fedcore.sources.hub",
    "from_folder": "fedcore.sources.images",
    "from_frames": "fedcore.sources.frames",
    "iid": "fedcore.task.partition",
    "list_releases": "server.api.releases",
    "load_run": "fedcore.config.settings",
    "load_task": "fedcore.task.definition",
    "merge_adapters": "fedcore.task.adapters",
    "new_task": "fedcore.task.templates",
    "open_model": "edge_client.model",
    "publish": "server.api.steps",
    "refresh_repository": "server.api.releases",
    "replay": "server.api.replaying",
    "roll_back": "server.api.releases",
    "rotate_keys": "server.api.releases",
    "shards": "fedcore.task.partition",
    "simulate": "server.api.simulation",
    "update_model": "edge_client.model",
    "with_adapters": "fedcore.task.adapters",
}

__all__ = [
    "ACCURACY",
    "MAE",
    "PERPLEXITY",
    "RMSE",
    "Algorithm",
    "ClientData",
    "ClientScores",
    "ClientSettings",
    "ClientUpdate",
    "Compressed",
    "EdgeModel",
    "Evaluation",
    "FedcoreError",
    "Finetuned",
    "History",
    "Kind",
    "LiveModel",
    "Manifest",
    "Metric",
    "MetricSpread",
    "NewRepository",
    "NewTask",
    "Replayed",
    "Result",
    "Rotation",
    "Round",
    "RunConfig",
    "Statistics",
    "Task",
    "TaskCheck",
    "UpdateResult",
    "VersionedOutputs",
    "__version__",
    "by_column",
    "check",
    "compress",
    "create_repository",
    "dirichlet",
    "evaluate",
    "finetune",
    "follow_model",
    "from_arrays",
    "from_datasets",
    "from_folder",
    "from_frames",
    "iid",
    "list_releases",
    "load_run",
    "load_task",
    "merge_adapters",
    "new_task",
    "open_model",
    "publish",
    "refresh_repository",
    "replay",
    "roll_back",
    "rotate_keys",
    "shards",
    "simulate",
    "update_model",
    "with_adapters",
]


def __getattr__(name: str) -> Any:
    if name == "metrics":  # a module, whose names are not repeated here
        return import_module("fedcore.metrics")
    if name not in _LAZY:
        raise AttributeError(f"module 'fedcore' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
