"""Every system is asked the same, and fedcore's run files say what peers read from them."""

from __future__ import annotations

import pytest

from benchmarks.campaign import MILLION, PLANS
from benchmarks.workloads import read_workload, run_file
from fedcore.config.settings import load_run

NAMES = [plan.workload for plan in PLANS] + [MILLION]


@pytest.mark.parametrize("name", NAMES)
def test_peers_read_what_fedcore_runs(name: str) -> None:
    run, workload = load_run(run_file(name)), read_workload(name)
    assert workload.cohort == run.federation.cohort
    assert workload.rounds == run.federation.rounds
    assert workload.epochs == run.client.epochs
    assert workload.batch_size == run.client.batch_size
    assert workload.learning_rate == run.client.learning_rate
    assert run.client.momentum == run.client.weight_decay == 0  # peers have neither
    assert run.federation.strategy == "FedAvg"
    assert (workload.noise is not None) == run.private
    if workload.noise:
        assert workload.noise.clip_norm == run.privacy.clip_norm
        assert workload.noise.noise_multiplier == run.privacy.noise_multiplier
        assert workload.noise.target_delta == run.privacy.target_delta
        assert run.privacy.accountant == "rdp"  # as the loop of Opacus


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.workload)
def test_rounds_are_left_to_time_after_the_warm_up(plan: object) -> None:
    assert read_workload(plan.workload).rounds > plan.warmup >= 1  # type: ignore[attr-defined]
