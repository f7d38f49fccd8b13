"""Devices evaluate a model that an operator names, where their data are."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from flwr.serverapp import Grid

from fedcore.errors import RoundFailed
from fedcore.files import read_bytes, sha256_hex, write_json
from fedcore.observability.events import Noted
from fedcore.task.model import MAX_CHECKPOINT_BYTES, build_model, load_checkpoint, preprocess_bytes
from fedcore.training.evaluate import output_shape
from fedcore.training.roles import evaluates
from fedcore.updates.frozen import frozen_state
from fedcore.updates.pack import layout_of, pack
from server.evaluation import ClientScores, Evaluation, NoiseStatement
from server.live.deployment import LiveRun
from server.live.network.members import Members
from server.rounds.checkpointing.checkpointer import NoCheckpoints
from server.rounds.cohort import Cohort
from server.rounds.evaluation.evaluate import ask_to_evaluate
from server.rounds.expected import evaluation_of
from server.rounds.peers import Peers
from server.rounds.roles import Roles

EVALUATIONS = "evaluations"
"""Folder in a run's folder with the result of each evaluation, as JSON."""
_FIRST = 10  # round numbers of evaluations begin so far beyond those of rounds and the gate


@dataclass(frozen=True)
class EvaluateOnDevices:
    """Has every connected device evaluate the checkpoint in a file on what it holds back."""

    live: LiveRun
    members: Members
    peers: Peers
    grid: Grid

    def __call__(self, file: Path) -> dict[str, Any]:
        """Returns the result as JSON, with its text and the file that keeps it.

        Raises:
            DataError: the file is no checkpoint of the run's model.
            RoundFailed: no device is connected, or none evaluated the model.
            ResourceError: the result cannot be written.
        """
        live, task, run = self.live, self.live.inputs.task, self.live.run
        raw = read_bytes(file, max_bytes=MAX_CHECKPOINT_BYTES, what="a checkpoint")
        model = build_model(task, run).eval()
        load_checkpoint(raw, model, where=str(file))
        roles = Roles(run.federation, self.peers.client)
        nodes = sorted(roles.evaluating(self.grid.get_node_ids()))
        if not nodes:
            judging = " that judges (federation.holdout_by)" if run.federation.has_judges else ""
            raise RoundFailed(
                f"evaluate: no device{judging} is connected. Nothing was evaluated; see which are "
                "with `fedcore server devices`, and try again."
            )
        spec = evaluation_of(run, task.metrics, output_shape(model, task.example_input))
        folder = live.folder / EVALUATIONS
        number = len(list(folder.glob("*.json"))) if folder.is_dir() else 0
        answers = ask_to_evaluate(
            self.grid,
            Cohort(nodes, self.peers.weights(nodes)),
            pack(model.model),
            layout=layout_of(model.model),
            preprocess=preprocess_bytes(model),
            frozen=frozen_state(model.model),
            number=run.federation.rounds + _FIRST + number,
            spec=spec,
            deadline_s=run.federation.deadline_s,
            checkpointer=NoCheckpoints(),
            peers=self.peers,
            on_note=lambda text: live.emit(Noted(text)),
        )
        noise, metrics = None, task.metrics
        if run.private:
            noise = NoiseStatement.of(run, spec.sums[task.primary.name])
            metrics = metrics[:1]
        limits = noise.limits if noise else None
        silent = {self.peers.client(node) for node in nodes if node not in answers}
        found = Evaluation(
            model=str(file),
            sha256=sha256_hex(raw),
            part="heldout",
            metrics=metrics,
            clients=tuple(
                ClientScores.of(self.peers.client(node), each.measured, metrics, limits)
                for node, each in sorted(answers.items(), key=lambda item: item[1].name)
            ),
            failed=dict.fromkeys(sorted(silent), "it sent no result; the server's log has notes"),
            known=self.members.count(
                drained=live.control.drained, among=partial(evaluates, run.federation)
            ),
        )
        kept = folder / f"{number + 1:04d}-{found.sha256[:12]}.json"
        folder.mkdir(exist_ok=True)
        result = found.as_json() | {"after_round": live.journal.round}
        write_json(kept, result)
        live.emit(Noted(f"{len(answers)} of {len(nodes)} devices evaluated {file}; see {kept}"))
        return {"evaluation": result, "text": str(found), "file": str(kept)}
