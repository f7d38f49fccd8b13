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
    from edge_client.enrol import Enrolled, enrol, install_kit
    from edge_client.installed import (
        InstalledModel,
        ModelTiming,
        ServingSummary,
        list_models,
        time_model,
    )
    from edge_client.launch import LiveClient, start_client
    from edge_client.ledger.export import LedgerExport, VerifiedExport
    from edge_client.ledger.reading import (
        export_ledger,
        read_ledger,
        verify_ledger,
        verify_ledger_export,
    )
    from edge_client.ledger.view import LedgerFiles, LedgerView
    from edge_client.live import LiveModel, VersionedOutputs, follow_model
    from edge_client.model import EdgeModel, open_model
    from edge_client.update_model import update_model
    from fedcore.artifacts.feedback import FeatureShift
    from fedcore.artifacts.manifest import Manifest
    from fedcore.config.client_settings import ClientSettings
    from fedcore.config.run import RunConfig
    from fedcore.config.settings import load_run
    from fedcore.crypto.kit import Kit
    from fedcore.doctor import Finding, diagnose
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
    from server.api.copies import export_release, push_release
    from server.api.drift import measure_drift
    from server.api.evaluating import evaluate
    from server.api.releases import (
        NewRepository,
        clean_repository,
        create_repository,
        list_releases,
        list_rollouts,
        promote_canary,
        refresh_repository,
        roll_back,
        rotate_keys,
        verify_repository,
    )
    from server.api.replaying import replay
    from server.api.result import History, Result
    from server.api.scaling import measure_scaling
    from server.api.simulation import simulate
    from server.api.steps import compress, finetune, publish
    from server.checking.findings import TaskCheck
    from server.compression.compressed import Compressed
    from server.delivery.drift import DeviceShift, ModelDrift
    from server.evaluation import ClientScores, Evaluation, MetricSpread
    from server.finetune.launch import Finetuned
    from server.finetune.scaling import ScalingReport
    from server.live.journal.evidence import Evidence
    from server.live.launch import LiveServer, start_server
    from server.live.operators.protocol import BackedUp
    from server.live.operators.server_client import DeviceStatus, ServerClient, ServerStatus
    from server.live.rollback import RolledBack, roll_back_run
    from server.live.verify import verify_run
    from server.privacy.auditing import PrivacyAudit, audit_privacy
    from server.privacy.plan import ExamplePrivacyPlan, plan_example_privacy
    from server.privacy.plan_clients import ClientPrivacyPlan, plan_client_privacy
    from server.provision.authority import (
        Authority,
        SignedRoster,
        create_authority,
        restore_authority,
    )
    from server.provision.backup import Restored
    from server.provision.kits import IssuedKit
    from server.provision.membership import Membership
    from server.records import RoundRecord
    from server.release.export import ExportedModel
    from server.release.push import PushedRepository
    from server.release.registry.rotation import Rotation
    from server.report.compared import ComparedRuns, FoundRun, compare_runs, list_runs
    from server.simulation.replay import Replayed

__version__ = "0.1.0"

_LAZY = {
    "ACCURACY": "fedcore.task.metrics",
    "Algorithm": "fedcore.task.algorithm",
    "Authority": "server.provision.authority",
    "BackedUp": "server.live.operators.protocol",
    "ClientData": "fedcore.sources.client_data",
    "ClientPrivacyPlan": "server.privacy.plan_clients",
    "ClientScores": "server.evaluation",
    "ClientSettings": "fedcore.config.client_settings",
    "ClientUpdate": "fedcore.task.algorithm",
    "ComparedRuns": "server.report.compared",
    "Compressed": "server.compression.compressed",
    "DeviceShift": "server.delivery.drift",
    "DeviceStatus": "server.live.operators.server_client",
    "EdgeModel": "edge_client.model",
    "Enrolled": "edge_client.enrol",
    "Evaluation": "server.evaluation",
    "Evidence": "server.live.journal.evidence",
    "ExamplePrivacyPlan": "server.privacy.plan",
    "ExportedModel": "server.release.export",
    "FedcoreError": "fedcore.errors",
    "FeatureShift": "fedcore.artifacts.feedback",
    "Finding": "fedcore.doctor",
    "Finetuned": "server.finetune.launch",
    "FoundRun": "server.report.compared",
    "History": "server.api.result",
    "InstalledModel": "edge_client.installed",
    "IssuedKit": "server.provision.kits",
    "Kind": "fedcore.task.kinds.protocol",
    "Kit": "fedcore.crypto.kit",
    "LedgerExport": "edge_client.ledger.export",
    "LedgerFiles": "edge_client.ledger.view",
    "LedgerView": "edge_client.ledger.view",
    "LiveClient": "edge_client.launch",
    "LiveModel": "edge_client.live",
    "LiveServer": "server.live.launch",
    "MAE": "fedcore.task.metrics",
    "Manifest": "fedcore.artifacts.manifest",
    "Membership": "server.provision.membership",
    "Metric": "fedcore.task.metrics",
    "MetricSpread": "server.evaluation",
    "ModelDrift": "server.delivery.drift",
    "ModelTiming": "edge_client.installed",
    "NewRepository": "server.api.releases",
    "NewTask": "fedcore.task.templates",
    "PERPLEXITY": "fedcore.task.metrics",
    "PrivacyAudit": "server.privacy.auditing",
    "PushedRepository": "server.release.push",
    "RMSE": "fedcore.task.metrics",
    "Replayed": "server.simulation.replay",
    "Restored": "server.provision.backup",
    "Result": "server.api.result",
    "RolledBack": "server.live.rollback",
    "Rotation": "server.release.registry.rotation",
    "Round": "fedcore.task.algorithm",
    "RoundRecord": "server.records",
    "RunConfig": "fedcore.config.run",
    "ScalingReport": "server.finetune.scaling",
    "ServerClient": "server.live.operators.server_client",
    "ServerStatus": "server.live.operators.server_client",
    "ServingSummary": "edge_client.installed",
    "SignedRoster": "server.provision.authority",
    "Statistics": "fedcore.task.statistics",
    "Task": "fedcore.task.definition",
    "TaskCheck": "server.checking.findings",
    "UpdateResult": "edge_client.delivery.update",
    "VerifiedExport": "edge_client.ledger.export",
    "VersionedOutputs": "edge_client.live",
    "audit_privacy": "server.privacy.auditing",
    "by_column": "fedcore.task.partition",
    "check": "server.api.checking",
    "clean_repository": "server.api.releases",
    "compare_runs": "server.report.compared",
    "compress": "server.api.steps",
    "create_authority": "server.provision.authority",
    "create_repository": "server.api.releases",
    "diagnose": "fedcore.doctor",
    "dirichlet": "fedcore.task.partition",
    "enrol": "edge_client.enrol",
    "evaluate": "server.api.evaluating",
    "export_ledger": "edge_client.ledger.reading",
    "export_release": "server.api.copies",
    "finetune": "server.api.steps",
    "follow_model": "edge_client.live",
    "from_arrays": "fedcore.sources.arrays",
    "from_datasets": "fedcore.sources.hub",
    "from_folder": "fedcore.sources.images",
    "from_frames": "fedcore.sources.frames",
    "iid": "fedcore.task.partition",
    "install_kit": "edge_client.enrol",
    "list_models": "edge_client.installed",
    "list_releases": "server.api.releases",
    "list_rollouts": "server.api.releases",
    "list_runs": "server.report.compared",
    "load_run": "fedcore.config.settings",
    "load_task": "fedcore.task.definition",
    "measure_drift": "server.api.drift",
    "measure_scaling": "server.api.scaling",
    "merge_adapters": "fedcore.task.adapters",
    "new_task": "fedcore.task.templates",
    "open_model": "edge_client.model",
    "plan_client_privacy": "server.privacy.plan_clients",
    "plan_example_privacy": "server.privacy.plan",
    "promote_canary": "server.api.releases",
    "publish": "server.api.steps",
    "push_release": "server.api.copies",
    "read_ledger": "edge_client.ledger.reading",
    "refresh_repository": "server.api.releases",
    "replay": "server.api.replaying",
    "restore_authority": "server.provision.authority",
    "roll_back": "server.api.releases",
    "roll_back_run": "server.live.rollback",
    "rotate_keys": "server.api.releases",
    "shards": "fedcore.task.partition",
    "simulate": "server.api.simulation",
    "start_client": "edge_client.launch",
    "start_server": "server.live.launch",
    "time_model": "edge_client.installed",
    "update_model": "edge_client.update_model",
    "verify_ledger": "edge_client.ledger.reading",
    "verify_ledger_export": "edge_client.ledger.reading",
    "verify_repository": "server.api.releases",
    "verify_run": "server.live.verify",
    "with_adapters": "fedcore.task.adapters",
}

__all__ = [
    "ACCURACY",
    "MAE",
    "PERPLEXITY",
    "RMSE",
    "Algorithm",
    "Authority",
    "BackedUp",
    "ClientData",
    "ClientPrivacyPlan",
    "ClientScores",
    "ClientSettings",
    "ClientUpdate",
    "ComparedRuns",
    "Compressed",
    "DeviceShift",
    "DeviceStatus",
    "EdgeModel",
    "Enrolled",
    "Evaluation",
    "Evidence",
    "ExamplePrivacyPlan",
    "ExportedModel",
    "FeatureShift",
    "FedcoreError",
    "Finding",
    "Finetuned",
    "FoundRun",
    "History",
    "InstalledModel",
    "IssuedKit",
    "Kind",
    "Kit",
    "LedgerExport",
    "LedgerFiles",
    "LedgerView",
    "LiveClient",
    "LiveModel",
    "LiveServer",
    "Manifest",
    "Membership",
    "Metric",
    "MetricSpread",
    "ModelDrift",
    "ModelTiming",
    "NewRepository",
    "NewTask",
    "PrivacyAudit",
    "PushedRepository",
    "Replayed",
    "Restored",
    "Result",
    "RolledBack",
    "Rotation",
    "Round",
    "RoundRecord",
    "RunConfig",
    "ScalingReport",
    "ServerClient",
    "ServerStatus",
    "ServingSummary",
    "SignedRoster",
    "Statistics",
    "Task",
    "TaskCheck",
    "UpdateResult",
    "VerifiedExport",
    "VersionedOutputs",
    "__version__",
    "audit_privacy",
    "by_column",
    "check",
    "clean_repository",
    "compare_runs",
    "compress",
    "create_authority",
    "create_repository",
    "diagnose",
    "dirichlet",
    "enrol",
    "evaluate",
    "export_ledger",
    "export_release",
    "finetune",
    "follow_model",
    "from_arrays",
    "from_datasets",
    "from_folder",
    "from_frames",
    "iid",
    "install_kit",
    "list_models",
    "list_releases",
    "list_rollouts",
    "list_runs",
    "load_run",
    "load_task",
    "measure_drift",
    "measure_scaling",
    "merge_adapters",
    "new_task",
    "open_model",
    "plan_client_privacy",
    "plan_example_privacy",
    "promote_canary",
    "publish",
    "push_release",
    "read_ledger",
    "refresh_repository",
    "replay",
    "restore_authority",
    "roll_back",
    "roll_back_run",
    "rotate_keys",
    "shards",
    "simulate",
    "start_client",
    "start_server",
    "time_model",
    "update_model",
    "verify_ledger",
    "verify_ledger_export",
    "verify_repository",
    "verify_run",
    "with_adapters",
]


def __getattr__(name: str) -> Any:
    if name == "metrics":  # a module, whose names are not repeated here
        return import_module("fedcore.metrics")
    if name not in _LAZY:
        raise AttributeError(f"module 'fedcore' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
