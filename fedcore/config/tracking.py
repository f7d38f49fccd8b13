"""Settings of experiment tracking: where the figures of a run go besides its own folder."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field

from fedcore.config.section import Section


def _without_password(uri: str) -> str:
    try:
        named = urlsplit(uri).username
    except ValueError as error:
        raise ValueError(f"tracking.mlflow is no URI: {error}.") from None
    if named is not None:
        raise ValueError(
            "tracking.mlflow has a name or password, which reports would show: leave them out, and "
            "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the environment."
        )
    return uri


TrackingUri = Annotated[
    str, Field(min_length=1, max_length=1024), AfterValidator(_without_password)
]


class Tracking(Section):
    """``[tracking]``: a copy of the run's figures for MLflow; TensorBoard needs no setting."""

    mlflow: TrackingUri | None = None
    """MLflow's tracking URI, such as ``https://mlflow.example.org`` or
    ``sqlite:////srv/mlflow.db``, or a folder relative to this file. Nothing is sent when unset."""
    experiment: Annotated[str, Field(min_length=1, max_length=250)] = "fedcore"
    """MLflow's experiment, which is created if there is none of this name."""
