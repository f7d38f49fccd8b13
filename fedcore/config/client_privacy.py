"""``[privacy.client]``: settings of client-level differential privacy."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fedcore.config.section import ClipNorm, Rounds, Section


class ClientPrivacy(Section):
    """``[privacy.client]``: client-level differential privacy, whose noise the server adds."""

    max_epsilon: Annotated[float, Field(ge=0.01, le=1e6)] = 8.0
    """Budget of the whole run, which ends before a round that would exceed it."""
    target_delta: Annotated[float, Field(ge=1e-12, lt=1)] = 1e-5
    """The delta of the epsilon budget; at most a tenth of one over the number of clients."""
    clip_norm: ClipNorm | Literal["adaptive"] = 1.0
    """L2 bound of one client's update, the difference to the weights that the client received;
    ``adaptive`` follows the median of the updates' norms from round to round."""
    noise_multiplier: Annotated[float, Field(ge=0.1, le=1e6)] | Literal["auto"] = "auto"
    """Deviation of the noise on the sum of updates, over ``clip_norm``; ``auto`` uses the least
    that keeps ``federation.rounds`` rounds within ``max_epsilon``."""
    mechanism: Literal["gaussian", "matrix"] = "gaussian"
    """``gaussian``: the server draws each client independently, ``federation.cohort`` of them in
    expectation, and keeps the draw secret; epsilon relies on that. ``matrix``: each round selects
    exactly ``federation.cohort`` clients, participation need not be secret, and noise is correlated
    over rounds so that much of it cancels in the model."""
    separation: Rounds | None = None
    """For ``matrix``: a client is selected at most once in this many consecutive rounds. Larger
    values need less noise. Unset: the number of clients divided by the cohort."""
    accountant: Literal["rdp", "prv"] = "prv"
    """How charges add up: ``prv`` or ``rdp``, see ``accountant`` in ``[privacy]``."""
