"""Base of all tables of settings, and the number types that several tables share."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Rounds = Annotated[int, Field(ge=1, le=1_000_000)]
Epochs = Annotated[int, Field(ge=1, le=10_000)]
Steps = Annotated[int, Field(ge=1, le=100_000_000)]
BatchSize = Annotated[int, Field(ge=1, le=1_000_000)]
LearningRate = Annotated[float, Field(ge=1e-12, le=1e6)]
WeightDecay = Annotated[float, Field(ge=0, le=1e3)]
Momentum = Annotated[float, Field(ge=0, lt=1)]
ClipNorm = Annotated[float, Field(ge=1e-6, le=1e6)]
MAX_SECONDS = 31 * 86_400.0  # a month: no run needs to wait longer
Seconds = Annotated[float, Field(gt=0, le=MAX_SECONDS)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Optimizer = Literal["sgd", "adam", "adamw"]


class Section(BaseModel):
    """A table of the file: frozen, strict about types, closed to unknown keys."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )
