"""Runs in MLflow: settings, metrics by round and step, and digests of the files.

Start with `mlflow_run`. A thread sends what events say, so that a slow server slows no round; one
that fails is logged, and the run goes on.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from fedcore import __version__
from fedcore.config.run import IN_MEMORY, RunConfig
from fedcore.errors import ConfigError, DataError, FedcoreError, ResourceError
from fedcore.files import disk_errors, read_if_exists, sha256_hex, write_json
from fedcore.observability.events import Event, Sink, nowhere
from fedcore.observability.foreign import foreign
from fedcore.observability.words import counted
from server.report.folder import config_json
from server.report.scalars import scalars_of
from server.report.settings import by_dotted_name

log = logging.getLogger("fedcore")

RUN_FILE = "mlflow.json"
"""Names the MLflow run of a run's folder, so that a resumed run continues it."""
_FILES = ("*.safetensors", "candidates/*.onnx", "summary.json")
_EVERY_S = 1.0
_LAST_S = 30.0
"""How long the end of a run waits for figures that were not sent yet."""
_MOST_WAITING = 100_000
_BATCH = 500  # figures a request; MLflow takes up to 1000
_PARAMS = 100  # settings a request, MLflow's limit
_MAX_NAME, _MAX_VALUE = 250, 500
_UNUSUAL = re.compile(r"[^\w.\- :/]")
"""Characters that MLflow refuses in names."""


@contextmanager
def mlflow_run(
    run: RunConfig, kind: Literal["simulation", "server", "finetune"], folder: Path | None
) -> Iterator[Sink]:
    """Yields a sink that copies a run's figures to MLflow, as ``[tracking]`` says; else drops them.

    When the block ends, the MLflow run is finished, failed or killed. One that is finished has the
    SHA-256 of models, candidates and summary as tags.

    Args:
        run: The run.
        kind: What runs.
        folder: The run's folder, whose MLflow run is continued if there is one; None for a new one.

    Raises:
        ConfigError: MLflow is not installed, or refuses the settings.
        ResourceError: the tracking server does not answer.
    """
    if run.tracking.mlflow is None:
        yield nowhere
        return
    client = _client(run)
    with _refusals(run):
        run_id = _opened(client, run, kind, folder)
    sender = _Sender(client, run_id)
    status = "FAILED"
    try:
        yield sender.take
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit):
        status = "KILLED"
        raise
    finally:
        sender.close(_digests(folder) if status == "FINISHED" else {}, status)


def _client(run: RunConfig) -> Any:
    if find_spec("mlflow") is None:
        raise ConfigError(
            f"tracking.mlflow = {run.tracking.mlflow!r}: MLflow is not installed. Nothing was run; "
            "install it with `pip install 'fedcore[mlflow]'`, or leave the setting out."
        )
    # MLflow reports usage to its makers, and tries for minutes to reach a server that is not there,
    # unless these variables say otherwise. Set them yourself to have that back.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    tracking = import_module("mlflow.tracking")  # a second of imports
    with _refusals(run):
        return tracking.MlflowClient(tracking_uri=_uri(run))


def _uri(run: RunConfig) -> str:
    given = run.tracking.mlflow or ""
    has_scheme = re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", given) or given == "databricks"
    return given if has_scheme else run.path(given).as_uri()


@contextmanager
def _refusals(run: RunConfig) -> Iterator[None]:
    """Turns what MLflow raises before the run into errors that name the setting."""
    where = f"tracking.mlflow = {run.tracking.mlflow!r}"
    try:
        yield
    except FedcoreError:
        raise
    except Exception as error:  # MLflow's stores raise errors of many libraries
        text = foreign(error, 500)
        if _is_network(error):
            raise ResourceError(
                f"{where}: the tracking server does not answer ({text}). Nothing was run; check "
                "the address and that the server runs, or leave the setting out."
            ) from error
        raise ConfigError(
            f"{where}: MLflow refused it: {text} Nothing was run; correct the setting, or leave it "
            "out."
        ) from error


def _is_network(error: BaseException | None) -> bool:
    """Returns whether a lost or refused connection is behind an error."""
    while error is not None:
        if isinstance(error, OSError) and not isinstance(
            error, FileNotFoundError | PermissionError
        ):
            return True
        if "Max retries exceeded" in str(error):
            return True
        error = error.__cause__
    return False


def _opened(client: Any, run: RunConfig, kind: str, folder: Path | None) -> str:
    """Returns the MLflow run to write to: that of the folder, or a new one with all settings."""
    entities = import_module("mlflow.entities")
    uri = _uri(run)
    kept = _kept(folder, uri)
    if kept is not None:
        client.update_run(kept, status="RUNNING")
        return kept
    found = client.get_experiment_by_name(run.tracking.experiment)
    experiment = found.experiment_id if found else client.create_experiment(run.tracking.experiment)
    tags = {
        "fedcore.version": __version__,
        "fedcore.kind": kind,
        "fedcore.config_sha256": sha256_hex(config_json(run)),
    }
    path = run.path(run.task)
    if run.task != IN_MEMORY and path.is_file():
        tags["fedcore.task_sha256"] = sha256_hex(path.read_bytes())
    made = client.create_run(experiment, tags=tags, run_name=run.name)
    run_id = str(made.info.run_id)
    params = [
        entities.Param(name, str(value)[:_MAX_VALUE])
        for name, value in by_dotted_name(run.model_dump(mode="json"))
        if value is not None
    ]
    for first in range(0, len(params), _PARAMS):
        client.log_batch(run_id, params=params[first : first + _PARAMS])
    if folder is not None:
        write_json(folder / RUN_FILE, {"uri": uri, "run_id": run_id})
    return run_id


def _kept(folder: Path | None, uri: str) -> str | None:
    """Returns the MLflow run of a folder; None if it has none at this URI."""
    if folder is None:
        return None
    raw = read_if_exists(folder / RUN_FILE, max_bytes=10_000, what="the name of an MLflow run")
    if raw is None:
        return None
    try:
        kept = json.loads(raw)
        return str(kept["run_id"]) if kept["uri"] == uri else None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder / RUN_FILE}: it does not name an MLflow run. Nothing was run; remove the "
            "file, and a new MLflow run is begun."
        ) from error


def _digests(folder: Path | None) -> dict[str, str]:
    """Returns the SHA-256 of a run's files, by tag."""
    if folder is None:
        return {}
    paths = sorted(path for pattern in _FILES for path in folder.glob(pattern))
    with disk_errors(folder):
        return {
            f"sha256.{path.relative_to(folder)}": sha256_hex(path.read_bytes()) for path in paths
        }


class _Sender:
    """Sends figures from a thread of its own, in batches, in order."""

    def __init__(self, client: Any, run_id: str) -> None:
        self._client, self._run_id = client, run_id
        self._metric = import_module("mlflow.entities").Metric
        self._waiting: list[Any] = []
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._lost, self._warned = 0, False
        self._last: tuple[dict[str, str], str] = ({}, "FAILED")
        self._thread = threading.Thread(target=self._send, name="fedcore-mlflow", daemon=True)
        self._thread.start()

    def take(self, event: Event) -> None:
        """Takes the numbers of an event, to be sent within a second."""
        step, scalars = scalars_of(event)
        now_ms = int(time.time() * 1000)
        made = [
            self._metric(_UNUSUAL.sub("_", name)[:_MAX_NAME], float(value), now_ms, step)
            for name, value in scalars.items()
            if math.isfinite(value)
        ]
        with self._lock:
            room = max(0, _MOST_WAITING - len(self._waiting))
            self._waiting += made[:room]
            self._lost += len(made[room:])

    def close(self, digests: dict[str, str], status: str) -> None:
        """Sends the rest, the digests and the run's state, or gives up after half a minute."""
        self._last = (digests, status)
        self._ended.set()
        self._thread.join(_LAST_S)
        left = self._lost + len(self._waiting)
        if left or self._thread.is_alive():
            log.warning(
                "MLflow: %s did not reach the tracking server, nor perhaps the end of the run. The "
                "run's own folder has all of them.",
                counted(left, "figure"),
            )

    def _send(self) -> None:
        while True:
            ended = self._ended.wait(_EVERY_S)
            try:
                while batch := self._waiting[:_BATCH]:
                    self._client.log_batch(self._run_id, metrics=batch)
                    with self._lock:
                        del self._waiting[: len(batch)]
                if ended:
                    digests, status = self._last
                    for name, digest in digests.items():
                        self._client.set_tag(self._run_id, name, digest)
                    self._client.set_terminated(self._run_id, status)
            except Exception as error:  # MLflow's stores raise errors of many libraries
                if not self._warned:
                    self._warned = True
                    log.warning(
                        "MLflow: figures could not be sent, and are kept for another attempt: %s",
                        foreign(error, 500),
                    )
            if ended:
                return
