"""Provenance of a model and its privacy statement, from the rounds that trained it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from fedcore.artifacts.manifest import (
    ClientStatement,
    CloudStatement,
    EvaluationStatement,
    PrivacyStatement,
)
from fedcore.config.run import RunConfig
from fedcore.files import read_if_exists, sha256_hex
from fedcore.privacy.evaluation_noise import evaluation_charge
from fedcore.privacy.ledger import Ledger
from fedcore.task.model import MAX_CHECKPOINT_BYTES
from server.records import ClientRecord, epsilon_spent
from server.release.draft import Origin
from server.report.folder import config_json
from server.rounds.app import Outcome
from server.rounds.client_privacy.mechanism import statement


def origin_of(
    run: RunConfig,
    outcome: Outcome,
    clients: Sequence[ClientRecord],
    parent: bytes,
    cloud: CloudStatement | None = None,
    *,
    noise: Literal["none", "simulated", "system"],
    evaluations: int = 0,
) -> Origin:
    """Returns the provenance of a run's model.

    A checkpoint does not state what training it has cost. So with ``federation.initial`` the
    figures are those of this run alone, and the statement says that the rest is not known.

    Args:
        run: The run.
        outcome: The result of its rounds.
        clients: Records of its clients; empty for devices.
        parent: The checkpoint of the best model.
        cloud: What private fine-tuning has spent on the cloud's data; None without.
        noise: Source of the privacy noise.
        evaluations: Number of models that clients were asked to evaluate after the rounds.
    """
    initial, warm = None, run.federation.initial
    if warm is not None:
        what = "the initial checkpoint"
        raw = read_if_exists(run.path(warm), max_bytes=MAX_CHECKPOINT_BYTES, what=what)
        initial = raw and sha256_hex(raw)  # a run goes on without the file that it started from
    return Origin(
        run=run.name,
        round=outcome.federated.best_round,
        parent_sha256=sha256_hex(parent),
        config_sha256=sha256_hex(config_json(run)),
        seed=run.seed,
        privacy=PrivacyStatement(
            unit=run.privacy.unit,
            epsilon=_epsilon(run, outcome, clients),
            target_delta=run.privacy.target_delta if run.private else None,
            noise=noise,
            before="not known" if warm and run.privacy.unit != "none" else "nothing",
            client=_client_statement(run, outcome),
            evaluation=_evaluation_statement(run, evaluations),
            cloud=cloud,
        ),
        initial_sha256=initial or None,
    )


def with_cloud(origin: Origin, statement: CloudStatement) -> Origin:
    """Returns the provenance of a model that was fine-tuned privately in a call of its own."""
    privacy = origin.privacy.model_copy(update={"cloud": statement})
    return replace(origin, privacy=privacy)


def _epsilon(run: RunConfig, outcome: Outcome, clients: Sequence[ClientRecord]) -> float | None:
    """Returns the largest epsilon that any client may have spent over the whole run."""
    budget, federated = run.privacy.max_epsilon if run.private else None, outcome.federated
    over, patience = len(federated.rounds), run.federation.patience
    stopped = bool(patience) and over - federated.best_round >= patience
    return epsilon_spent(
        federated.rounds,
        clients,
        budget=budget,
        dropped=over < run.federation.rounds and not stopped,  # spent budgets ended the run
    )


def _evaluation_statement(run: RunConfig, evaluations: int) -> EvaluationStatement | None:
    """Returns the guarantee of held-out examples; None if they are not protected or used."""
    if not (run.evaluates_privately and evaluations):
        return None
    one = evaluation_charge(run, round=0, split="")
    spent = Ledger((replace(one, steps=evaluations),)).epsilon(run.privacy)
    return EvaluationStatement(
        epsilon=min(spent, run.privacy.max_epsilon),  # a client declines what exceeds its budget
        target_delta=run.privacy.target_delta,
        noise_multiplier=one.noise_multiplier,
        evaluations=evaluations,
    )


def _client_statement(run: RunConfig, outcome: Outcome) -> ClientStatement | None:
    """Returns the client-level guarantee for all models of the run; None if it is off."""
    federated = outcome.federated
    if federated.protection is None:
        return None
    return statement(run, federated.protection, rounds=len(federated.rounds))
