"""The server's side of the app: fedcore's ServerApp for the run that the configuration names."""

import sys
from dataclasses import asdict
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedcore.config.settings import load_run
from fedcore.files import write_atomic
from fedcore.observability.console import plain
from fedcore.observability.events import Noted, RoundFinished, tee
from fedcore.observability.jsonl import json_lines
from fedcore.seeds import Simulated
from fedcore.task.definition import data_folder, load_task
from fedcore.task.model import checkpoint_bytes
from server.cloud import read_cloud_data
from server.report.folder import open_folder
from server.rounds.app import Listener, Outcome, server_app

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    run = load_run(Path(str(context.run_config["run"])))
    task = load_task(run.path(run.task))
    cloud = read_cloud_data(task, data_folder(), holdout=run.finetune.holdout, seed=run.seed)

    def keep(outcome: Outcome) -> None:
        path = folder / "global.safetensors"
        write_atomic(path, checkpoint_bytes(outcome.model))
        emit(Noted(f"round {outcome.federated.best_round} is the best; its model is in {path}"))

    with (
        open_folder(run, Path(str(context.run_config["runs"]))) as folder,
        json_lines(folder / "metrics.jsonl") as lines,
        plain(sys.stdout) as shown,
    ):
        emit = tee(lines, shown)
        listener = Listener(
            on_note=lambda text: emit(Noted(text)),
            on_round=lambda record: emit(RoundFinished(asdict(record))),
            on_end=keep,
        )
        federated = server_app(
            task, run, cloud=cloud, randomness=Simulated(run.seed), listener=listener
        )
        federated(grid, context)
