"""A client's reply to a request to evaluate: sums, values, and metrics that are undefined.

`evaluation_content` encodes what a client measured; `undefined_in` and `check_sums` check what a
client says, for `fedcore.updates.replies`.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from numpy.typing import NDArray

from fedcore.errors import InvalidUpdate
from fedcore.observability.foreign import foreign
from fedcore.task.statistics import FloatVector, SumLimits
from fedcore.updates.messages import ARRAYS, METRICS, NUM_EXAMPLES

if TYPE_CHECKING:  # a server accepts connections before torch, which takes seconds, is imported
    from fedcore.task.measured import Measured

UNDEFINED = "undefined"
"""Name of the record with the reason for each metric that is undefined, as UTF-8 bytes."""
_MAX_REASON = 200  # characters shown of a reason
_SLACK = 1e-9  # relative: a client adds up its examples in any order
_NOT_USED = "It was not used"
_MOST_NOISE = 10.0  # deviations: a device's normal numbers end at 9.3


def evaluation_content(measured: Measured) -> RecordDict:
    """Returns the content of the reply that carries what a client measured."""
    content = RecordDict(
        {METRICS: MetricRecord({NUM_EXAMPLES: measured.examples, **measured.values})}
    )
    if measured.sums:
        content[ARRAYS] = ArrayRecord(
            {name: Array(np.asarray(sums, np.float64)) for name, sums in measured.sums.items()}
        )
    if measured.undefined:
        reasons = {name: why.encode() for name, why in measured.undefined.items()}
        content[UNDEFINED] = ConfigRecord(dict(reasons))
    return content


def undefined_in(record: object, optional: Collection[str], *, where: str) -> dict[str, str]:
    """Returns the reasons in a reply's record for metrics that are undefined, as printable text.

    Args:
        record: The record; None if the reply has none.
        optional: The metrics that may be undefined.
        where: The sender, for errors.

    Raises:
        InvalidUpdate: it is no record of reasons, is empty, or names another metric.
    """
    if record is None:
        return {}
    if not isinstance(record, ConfigRecord) or not len(record):
        raise InvalidUpdate(f"{where}: {UNDEFINED!r} is not a record of reasons. {_NOT_USED}.")
    reasons: dict[str, str] = {}
    for name, why in record.items():
        if name not in optional:
            raise InvalidUpdate(
                f"{where}: it calls a metric undefined that was not requested "
                f"('{foreign(name, 80)}'). {_NOT_USED}; client and server must run the same "
                "version and task."
            )
        if not isinstance(why, bytes):
            raise InvalidUpdate(
                f"{where}: the reason why {name!r} is undefined is a {type(why).__name__}, "
                f"expected text. {_NOT_USED}."
            )
        reasons[name] = foreign(why.decode(errors="replace"), _MAX_REASON) or "no reason given"
    return reasons


def check_sums(
    sums: NDArray[np.float64], limits: SumLimits, examples: int, *, name: str, where: str
) -> None:
    """Checks that a number of examples can have these sums, which are finite.

    Raises:
        InvalidUpdate: a sum, or all together, is beyond what that many examples add up to.
    """
    low, high = _scaled(limits.low, examples), _scaled(limits.high, examples)
    if limits.noise is not None:
        low, high = low - _MOST_NOISE * limits.noise, high + _MOST_NOISE * limits.noise
    beyond = (sums < low - _SLACK * np.abs(low)) | (sums > high + _SLACK * np.abs(high))
    if beyond.any():
        place = int(beyond.argmax())
        raise InvalidUpdate(
            f"{where}: sum {place} of {name} is {sums[place]:.6g} over {examples} examples, "
            f"expected {low[place]:g} to {high[place]:g}. {_NOT_USED}."
        )
    total, most = math.fsum(np.abs(sums).tolist()), limits.total * examples
    if total > most * (1 + _SLACK):
        raise InvalidUpdate(
            f"{where}: the sums of {name} are {total:.6g} together over {examples} examples, "
            f"expected at most {most:g}. {_NOT_USED}."
        )


def _scaled(per_example: FloatVector, examples: int) -> FloatVector:
    """Returns limits over all examples, clipped to numbers whose sums cannot overflow."""
    return np.clip(per_example * examples, -_LARGEST_SUM, _LARGEST_SUM)


_LARGEST_SUM = 1e100
