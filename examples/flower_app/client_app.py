"""The clients' side of the app: fedcore's ClientApp for the run that the configuration names."""

from functools import cache
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedcore.client_app import client_app
from fedcore.config.owner import OPEN_POLICY
from fedcore.config.settings import load_run
from fedcore.seeds import Simulated
from fedcore.task.definition import load_task
from fedcore.training.mods import client_mods

app = ClientApp()


@app.train()
@app.evaluate()
@app.query("statistics")
def answer(message: Message, context: Context) -> Message:
    return build(Path(str(context.run_config["run"])))(message, context)


@cache  # one process answers for many clients, and reads the run and its task once
def build(path: Path) -> ClientApp:
    run = load_run(path)
    return client_app(
        load_task(run.path(run.task)),
        run,
        owner=OPEN_POLICY,
        randomness=Simulated(run.seed),  # a seed is for simulations; devices take SystemEntropy()
        mods=client_mods(run.federation.strategy),
    )
