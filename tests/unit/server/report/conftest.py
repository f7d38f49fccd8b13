from __future__ import annotations

import pytest

from fedcore.artifacts.manifest import FileEntry, Lineage, Manifest, Parity, PrivacyStatement
from server.records import CandidateRecord, ClientRecord, RoundRecord, RunRecord


def _round(number: int) -> RoundRecord:
    return RoundRecord(
        round=number,
        rounds=5,
        seconds=0.5,
        cohort=3,
        updates=3,
        declined=0,
        failed=0,
        train_loss=None,
        metrics={"accuracy": 0.5 + number / 12},
        judged_on="cloud",
        epsilon_max=1.5 * number,
        bytes_up=1000,
        bytes_down=2000,
    )


def _candidate(
    name: str, metric: float, size: int, p50_us: float, reason: str, *missed: str
) -> CandidateRecord:
    return CandidateRecord(
        name=name,
        metric=metric,
        drop=0.96 - metric,
        agreement=0.99,
        max_abs_error=1e-3,
        bytes=size,
        sha256=f"{size:064x}",
        p50_us=p50_us,
        p50_min_us=0.9 * p50_us,
        p50_max_us=1.2 * p50_us,
        admitted=not reason.startswith("refused"),
        reason=reason,
        missed=missed,
    )


@pytest.fixture
def record() -> RunRecord:
    """A run that has everything: privacy, candidates, a release."""
    manifest = Manifest(
        model="digits",
        version=3,
        created="2026-01-02T03:04:05Z",
        kind="classification",
        labels=("a", "b"),
        input_shape=(64,),
        input_dtype="float32",
        onnx=FileEntry(path="models/digits/3/model.onnx", sha256="ab" * 32, length=64_000),
        golden=FileEntry(path="models/digits/3/golden", sha256="cd" * 32, length=400),
        golden_tolerance=0.1,
        lineage=Lineage(
            run="demo",
            round=3,
            parent_sha256="ef" * 32,
            finetuned=True,
            candidate="int8_static",
            config_sha256="9a" * 32,
            seed=7,
            calibration="126 examples of the cloud's data",
        ),
        privacy=PrivacyStatement(unit="example", epsilon=4.5, target_delta=1e-3, noise="simulated"),
        parity=Parity(
            max_abs_error=0.1,
            agreement=0.99,
            metric="accuracy",
            metric_before=0.96,
            metric_after=0.955,
        ),
    )
    return RunRecord(
        name="demo",
        task="digits",
        kind="classification",
        primary="accuracy",
        higher_is_better=True,
        device="cpu",
        noise="simulated",
        rounds=tuple(_round(number) for number in (1, 2, 3)),
        best_round=3,
        epsilon=4.5,
        clients=tuple(
            ClientRecord(f"client-{n}", 10 * (n + 1), 0.7 + n / 20, 4.0 + n / 4, 3)
            for n in range(3)
        ),
        candidates=(
            _candidate("fp32", 0.96, 218_000, 11.0, "admitted: 3.4 times the bytes"),
            _candidate("int8_static", 0.955, 64_000, 9.0, "chosen: the smallest"),
            _candidate(
                "pruned",
                0.90,
                90_000,
                7.0,
                "refused: drops 0.06, 0.05 more than allowed",
                "max_accuracy_drop",
            ),
        ),
        chosen="int8_static",
        manifest=manifest,
        scores={
            "accuracy": {
                "federated": 0.86,
                "cloud_alone": 0.89,
                "finetuned": 0.955,
                "released": 0.95,
            }
        },
        stages={"rounds": 1.5, "compression": 2.5},
        notes=("a note",),
    )
