"""Looks at the data of many clients: rows that do not fit, and clients that differ from the others.

In: the clients' names. Out: a `ClientsLooked`. Start with `look_at_clients`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.utils.data import Subset, TensorDataset

from fedcore.errors import DataFolderMissing, FedcoreError
from fedcore.observability.words import counted
from fedcore.task.definition import Examples, Folder, Task, read_examples, size_of
from fedcore.training.batches import gather
from fedcore.training.examples import canonical_inputs
from server.checking.features import MOST_FEATURES, ClientRanges, FeatureRanges
from server.checking.looking import DataFault, Expected, Looked, look_at, position_text
from server.checking.progress import StepProgress

BUDGET_S = 10.0
"""Time for all rows of clients that were not asked for, and again for first and last rows."""

_MOST_ROWS = 10_000_000  # more than that time allows


@dataclass(frozen=True)
class ClientFault:
    """A fault in the data of one client."""

    client: str
    fault: DataFault


@dataclass
class ClientsLooked:
    """What was seen of the clients' data."""

    total: int
    faults: list[ClientFault] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)
    """Examples of each client that was read."""
    rows: int = 0
    whole: int = 0
    """Clients whose rows were all looked at."""
    ends: int = 0
    """Clients of whom only the first rows and the last one were looked at."""
    form: str = ""

    @property
    def text(self) -> str:
        """Says what was looked at, in one line."""
        sizes = sorted(self.sizes.values()) or [0]
        each = f"{sizes[0]:,} to {sizes[-1]:,}" if sizes[0] != sizes[-1] else f"{sizes[0]:,}"
        parts = [f"{counted(sum(sizes), 'example', ',')}, {each} a client", self.form]
        seen = [f"every row of {counted(self.whole, 'client', ',')}"] if self.whole else []
        if self.ends:
            seen.append(f"first and last rows of {counted(self.ends, 'client', ',')}")
        parts.append(f"looked at {' and '.join(seen) or 'nothing'}")
        left = self.total - self.whole - self.ends
        if self.total > self.whole:
            rest = f"{left:,} not read; " if left else ""
            parts.append(f"{rest}--clients all looks at every row")
        return "; ".join(part for part in parts if part)


def look_at_clients(
    task: Task,
    folder: Folder,
    names: Sequence[str],
    chosen: Sequence[int],
    expected: Expected,
    *,
    accepts: Callable[[torch.Tensor], object],
    only: bool,
    progress: StepProgress,
    budget_s: float = BUDGET_S,
    compared: bool = True,
    clock: Callable[[], float] = time.monotonic,
) -> ClientsLooked:
    """Looks at all rows of the chosen clients, and at others as far as ``budget_s`` allows.

    Args:
        task: The task.
        folder: The folder that its loaders receive.
        names: Names of all clients.
        chosen: Places of the clients that are looked at in full.
        expected: What rows must be like.
        accepts: Runs the model on inputs; raises what it raises.
        only: Whether no others are read.
        progress: Callback with clients done and in all.
        budget_s: Time for all rows of clients that were not chosen, and again for first and last
            rows.
        compared: Whether values and clients are compared with each other.
        clock: Source of time in seconds.
    """
    looked, features = ClientsLooked(len(names)), task.example_input.numel()
    compared = compared and not task.example_input.is_complex() and 0 < features <= MOST_FEATURES
    compared = compared and task.example_input.dtype not in (torch.int32, torch.int64)
    ranges = FeatureRanges(features) if compared else None
    tokens, began_s = _Tokens(task, accepts), clock()
    picked = set(chosen)
    order = [*chosen, *(() if only else (n for n in range(len(names)) if n not in picked))]
    for done, place in enumerate(order):
        progress(done, len(order))
        asked, spent_s = place in picked, clock() - began_s
        if not asked and spent_s > 2 * budget_s:
            break
        one = ranges.client(names[place]) if ranges is not None else None
        end_s = math.inf if asked else began_s + budget_s

        def more(end_s: float = end_s, done: int = done) -> bool:
            progress(done, len(order))
            return clock() < end_s

        _look_at_client(
            task, folder, names[place], expected, looked, tokens, one, more, in_order=asked
        )
    if ranges is not None:
        looked.faults += _differences(ranges, task)
    return looked


def _look_at_client(
    task: Task,
    folder: Folder,
    name: str,
    expected: Expected,
    looked: ClientsLooked,
    tokens: _Tokens,
    ranges: ClientRanges | None,
    more: Callable[[], bool],
    *,
    in_order: bool,
) -> None:
    def fault(found: DataFault) -> None:
        looked.faults.append(ClientFault(name, found))

    try:
        examples = read_examples(
            lambda: task.client_data(name, folder), what=f"data of client {name!r}", folder=folder
        )
        count = size_of(examples)
        rows = range(count) if in_order else _rows(examples, more)
        found = look_at(examples, expected, rows=rows, ranges=ranges, more=more)
    except DataFolderMissing:
        raise  # one cause for all clients
    except FedcoreError as error:
        fault(DataFault("unreadable", None, str(error)))
        return
    if found.rows < min(count, 2):  # the time was over: the ends alone, which takes little
        found = look_at(examples, expected, rows=sorted({0, count - 1}), ranges=ranges)
    if ranges is not None:
        ranges.close()
    looked.sizes[name] = count
    looked.rows += found.rows
    looked.whole += found.rows >= count
    looked.ends += found.rows < count
    looked.form = looked.form or found.form
    for one in found.faults:
        fault(one)
    if not found.faults:
        wrong = tokens.refused(examples, found)
        if wrong is not None:
            fault(wrong)


def _rows(examples: Examples, more: Callable[[], bool]) -> Sequence[int]:
    """Returns all rows; of data that are read one by one, the last one second, as time may end."""
    count = size_of(examples)
    inner = examples
    while isinstance(inner, Subset):
        inner = inner.dataset
    if isinstance(inner, TensorDataset) or count < 3:
        return range(count) if more() else []
    return [0, count - 1, *range(1, min(count - 1, _MOST_ROWS))]


class _Tokens:
    """Tries the smallest and largest whole numbers in the inputs, which an embedding may lack."""

    def __init__(self, task: Task, accepts: Callable[[torch.Tensor], object]) -> None:
        self._task, self._accepts = task, accepts
        self._known: dict[str, int] = {}

    def refused(self, examples: Examples, looked: Looked) -> DataFault | None:
        """Returns a fault if the model fails on the client's smallest or largest number."""
        for side, (value, row) in looked.ends.items():
            if side in self._known and value <= self._known[side]:
                continue
            inputs = gather(examples, [row])[0]
            try:  # in the dtype that training gives them
                self._accepts(
                    canonical_inputs(self._task, inputs, torch.tensor([row]), what="data")
                )
            except (Exception, SystemExit) as error:  # the task's code may raise anything
                number = -value if side == "low" else value
                text = (
                    f"row {row}: the model fails on inputs that hold {number}: "
                    f"{type(error).__name__}: {error}; leave such rows out, or give the model's "
                    "embedding room for them"
                )
                return DataFault("model", row, text)
            self._known[side] = value
        return None


def _differences(ranges: FeatureRanges, task: Task) -> list[ClientFault]:
    """Returns notes on values and clients that differ from the others."""
    shape, found = task.example_input.shape, list[ClientFault]()

    def place(feature: int) -> tuple[int, ...]:
        return tuple(int(n) for n in np.unravel_index(feature, tuple(shape) or (1,)))

    if task.example_input.is_floating_point():
        for value in ranges.extremes():
            column = place(value.feature)
            usual = f"nine tenths of all clients' values lie between {value.low:g} and"
            remedy = (
                f"{value.value:g} often stands for a missing value: turn it into NaN or a number "
                "of its own"
                if value.stand_in
                else "mend the row, or bound the column in the loader or in preprocess"
            )
            text = (
                f"row {value.row}: {position_text(task, column)} is {value.value:g}, but {usual} "
                f"{value.high:g}; {remedy}"
            )
            fault = DataFault("extreme", value.row, text, column, required=False)
            found.append(ClientFault(value.client, fault))
    extreme = {(one.client, one.fault.column) for one in found}
    for other in ranges.scales():
        which = "inputs" if other.feature is None else position_text(task, place(other.feature))
        text = (
            f"{which}: numbers are about {other.typical:.3g} in size, but {other.others:.3g} at "
            "the other clients; give this client's data the same unit and scale in client_data"
        )
        at = None if other.feature is None else place(other.feature)
        if (other.client, at) in extreme:
            continue  # one value makes the mean
        found.append(ClientFault(other.client, DataFault("scale", None, text, at, required=False)))
    return found
