"""What a release of the tests says of where it is from, where no test depends on it."""

from __future__ import annotations

from fedcore.artifacts.manifest import Lineage, Parity, PrivacyStatement

LINEAGE = Lineage(
    run="demo",
    round=3,
    parent_sha256="a" * 64,
    finetuned=True,
    candidate="fp32",
    config_sha256="b" * 64,
    seed=1,
    calibration="none",
)
NO_PRIVACY = PrivacyStatement(unit="none", epsilon=None, target_delta=None, noise="none")
PARITY = Parity(max_abs_error=0, agreement=1, metric="rmse", metric_before=1, metric_after=1)
