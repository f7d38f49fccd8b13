"""Runs an installed model: in this process where that is safe, in a process with limits otherwise.

An ONNX file is a program. It runs in this process once two things are known. Its work depends on
the shapes of its inputs alone (`edge_client.inference.fixed_work`); and inputs of these shapes have
been answered in a process with limits, as the release's golden outputs say. All that is not known
to be so runs in a process with limits that stays warm (`edge_client.inference.process`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from edge_client.inference.direct import RowCall, bound_call, run_failed
from edge_client.inference.fixed_work import why_unbounded
from edge_client.inference.inputs import demand_finite
from edge_client.inference.named import outputs_by_name, packed, stated
from edge_client.inference.process import ModelLimits, ModelProcess, named
from edge_client.inference.responses import Interface, TensorInfo
from edge_client.inference.row_wise import why_coupled
from edge_client.inference.selftest import compared
from edge_client.inference.session import SessionSettings, open_session
from edge_client.inference.tuning import TunedSettings, remember, remembered, tuned_session
from fedcore.artifacts.golden import AnyArray, Golden, parse_golden
from fedcore.artifacts.manifest import Manifest
from fedcore.errors import DataError, DeviceError, FedcoreError
from fedcore.files import sha256_hex
from fedcore.observability.foreign import foreign

_MOST_ROWS = 64
_ALIKE = 1e-4
"""Largest difference between a row alone and in a batch, over the largest output: rounding."""


@dataclass(frozen=True)
class _Opened:
    """A model that answers. Never changed: a call uses one from start to end."""

    interface: Interface
    why_confined: str
    """Why the model runs in a process with limits; empty if it runs in this one."""
    process: ModelProcess
    """Ended, unless the model is confined."""
    session: Any
    """An onnxruntime session; None if the model is confined."""
    row: RowCall | None
    """Answers one input; None if the model is confined or has several inputs or outputs."""


class Engine:
    """One version of a model, ready to answer. Thread-safe.

    Opening is lazy: the first call, or `warm_up`, loads the model.

    Guarantee:
        A model runs in this process only after the same bytes have answered inputs of the same
        shapes in a process with limits, as the golden outputs say, and only if its work depends on
        nothing but these shapes. Otherwise each call has limits of time and memory; a call that
        breaches one is an error, and the next one runs in a new process.
    """

    def __init__(
        self,
        manifest: Manifest,
        onnx: Path,
        golden: bytes,
        *,
        threads: int | None = None,
        limits: ModelLimits | None = None,
        tuning: Path | None = None,
    ) -> None:
        """Describes the engine; loads nothing.

        Args:
            manifest: The model's manifest.
            onnx: The model's file; run only if it has the manifest's digest.
            golden: The release's golden file; a model without golden inputs stays confined.
            threads: Threads of one inference. None: what is fastest on this machine, if there is a
                folder to remember it in, and 1 otherwise.
            limits: Time and memory of a call in a process with limits.
            tuning: Folder of the settings that were measured (see `edge_client.inference.tuning`).
        """
        self.manifest = manifest
        self._onnx, self._golden, self._threads = onnx, golden, threads
        self._limits, self._tuning = limits or ModelLimits(), tuning
        self.tuned: TunedSettings | None = None
        """The measured settings, once the model is loaded; None if none were."""
        self._lock = threading.Lock()
        self._opened: _Opened | None = None
        self._rows_together = 1
        self.row: RowCall | None = None
        """Answers one input without conversion (see `edge_client.inference.direct.bound_call`);
        None before the model is loaded, and if it runs elsewhere."""

    @property
    def version(self) -> int:
        """The version that answers."""
        return self.manifest.version

    @property
    def inputs(self) -> tuple[TensorInfo, ...]:
        """Names, types and shapes of the inputs, with -1 for the batch; loads the model."""
        return stated(self.manifest, self._open().interface).inputs

    @property
    def outputs(self) -> tuple[TensorInfo, ...]:
        """Names, types and shapes of the outputs, with -1 for the batch; loads the model."""
        return stated(self.manifest, self._open().interface).outputs

    @property
    def why_confined(self) -> str:
        """Why the model runs in a process with limits; empty if it runs in this one."""
        return self._open().why_confined

    @property
    def rows_together(self) -> int:
        """Most rows that run as one batch; see `warm_up`."""
        return self._rows_together

    def warm_up(self, *, rows: int = 1) -> None:
        """Loads the model and runs it, so that the first call is as fast as the rest.

        Args:
            rows: Most rows of a call that should run as one batch, 1 to 64. Rows run together only
                where the operators show that no row affects another, whatever it holds
                (`edge_client.inference.row_wise`), and where batches of 2, 4, 8 and so on, tried in
                the process with limits, give what each row gives alone, up to rounding.

        Raises:
            LimitExceeded, DeviceError, ResourceError: the model cannot be run (see `run`).
        """
        opened = self._open()
        if opened.session is not None and rows > self._rows_together:
            self._rows_together = self._tried_together(min(rows, _MOST_ROWS))

    def run(self, inputs: Mapping[str, AnyArray]) -> dict[str, AnyArray]:
        """Computes the model's outputs for a batch.

        Guarantee:
            A row's outputs depend on no other row, except for the rounding of rows that run
            together after `warm_up` with ``rows``.

        Args:
            inputs: An array ``(B, ...)`` for each input, of exactly its type and shape, B >= 1.
                Inputs that the manifest names may be of another type that holds the same numbers.

        Returns:
            An array ``(B, ...)`` for each output.

        Raises:
            DataError: names, types or shapes differ from `inputs`, or a number is not finite.
            LimitExceeded: a confined model exceeded its limits, or its outputs are too large.
            DeviceError: onnxruntime cannot run the model, or failed; or the file has changed
                before the model was loaded.
            ResourceError: no process could be started.
        """
        found = self._run(inputs)
        several = self.manifest.outputs is not None
        return outputs_by_name(self.manifest, *found.values()) if several else found

    def _run(self, inputs: Mapping[str, AnyArray]) -> dict[str, AnyArray]:
        """Computes the outputs of a batch, by the names of the file."""
        opened = self._open()
        names = [each.name for each in opened.interface.outputs]
        if self.manifest.inputs is not None:
            vectors, _ = packed(self.manifest, inputs, where=named(self.manifest))
            inputs = {opened.interface.inputs[0].name: vectors}
        if (found := self._one_row(opened, inputs)) is not None:
            return {names[0]: found[None]}
        rows = _checked_rows(inputs, opened.interface.inputs, self.manifest)
        arrays = [inputs[each.name] for each in opened.interface.inputs]
        if opened.session is None:
            with self._lock:
                return dict(zip(names, opened.process.ask(arrays, rows=rows), strict=True))
        return dict(zip(names, self._run_here(opened, arrays, rows), strict=True))

    def _one_row(self, opened: _Opened, inputs: Mapping[str, AnyArray]) -> AnyArray | None:
        """Answers a batch of one by bound buffers; None if it takes the general way."""
        batch = inputs.get(opened.interface.inputs[0].name)
        if opened.row is None or len(inputs) != 1 or not isinstance(batch, np.ndarray):
            return None
        return opened.row(batch[0]) if batch.ndim and len(batch) == 1 else None

    def run_rows(self, batch: AnyArray) -> AnyArray:
        """Computes the first output of a model with one input, each row by itself.

        Args:
            batch: Checked inputs ``(B, *input_shape)``, B >= 1.

        Raises:
            LimitExceeded, DeviceError, ResourceError: see `run`.
        """
        opened = self._open()
        if len(opened.interface.inputs) != 1:
            raise DeviceError(
                f"{named(self.manifest)}: it has {len(opened.interface.inputs)} inputs. Nothing "
                "was answered; give each by its name."
            )
        if opened.session is None:
            with self._lock:
                return opened.process.ask([batch], rows=len(batch))[0]
        return self._run_here(opened, [batch], len(batch), most=1)[0]

    def close(self) -> None:
        """Drops the model, and ends its process if it has one. A later call loads it again."""
        with self._lock:
            opened, self._opened, self.row = self._opened, None, None
            self._rows_together = 1
            if opened is not None:
                opened.process.close()

    def _open(self) -> _Opened:
        if (opened := self._opened) is not None:
            return opened
        with self._lock:
            if self._opened is None:
                self._opened = self._load()
                self.row = self._opened.row
            return self._opened

    def _load(self) -> _Opened:
        process = self._process()
        try:
            interface = self._stated(process.interface())
            raw = self._read()
            why = why_unbounded(raw) or self._why_unproven(process, interface)
        except BaseException:
            process.close()
            raise
        if why:
            return _Opened(interface, why, process, None, None)
        process.close()
        session = self._session(raw)
        return _Opened(interface, "", process, session, self._row_call(session))

    def _stated(self, interface: Interface) -> Interface:
        """Gives the one input of a model the shape of the manifest, which is the one that is tried.

        A file may leave more than the batch free; inputs of other shapes would be untried work.
        """
        if len(interface.inputs) != 1:
            return interface
        shape = (-1, *self.manifest.input_shape)
        return replace(interface, inputs=(replace(interface.inputs[0], shape=shape),))

    def _read(self) -> bytes:
        raw = self._onnx.read_bytes() if self._onnx.exists() else b""
        if sha256_hex(raw) != self.manifest.onnx.sha256:
            raise DeviceError(
                f"{named(self.manifest)}: its file has just changed; an update may have replaced "
                "it. Nothing was answered; run again."
            )
        return raw

    def _session(self, raw: bytes) -> Any:
        """Opens a proven model in this process, with the settings that are best on this machine."""
        if self._threads is not None or self._tuning is None:
            return open_session(raw, SessionSettings(self._threads or 1))
        sha256 = self.manifest.onnx.sha256
        known = remembered(self._tuning, sha256)
        if known is not None and (session := self._reopened(raw, known)) is not None:
            self.tuned = known
            return session
        first = open_session(raw, SessionSettings())
        session, self.tuned = tuned_session(raw, first, self._timed)
        remember(self._tuning, sha256, self.tuned)
        return session

    def _reopened(self, raw: bytes, known: TunedSettings) -> Any:
        """Opens a session as measured before; None if the model no longer answers rightly so."""
        try:
            session = open_session(raw, known.settings)
            self._timed(session)
        except Exception:  # of a provider, which may raise anything: the trial will name it
            return None
        return session

    def _timed(self, session: Any) -> Callable[[], object]:
        """Returns one inference to be timed, after a session has answered the golden inputs."""
        assert self._stored is not None
        name = session.get_inputs()[0].name
        inputs = self._stored.inputs
        rows = [session.run(None, {name: inputs[at : at + 1]})[0] for at in range(len(inputs))]
        compared(self.manifest, self._stored, np.concatenate(rows))
        row, example = self._row_call(session), np.ascontiguousarray(inputs[0])
        return lambda: row(example)

    def _row_call(self, session: Any) -> RowCall:
        inputs = self._golden_inputs
        name = session.get_inputs()[0].name
        output = session.run(None, {name: inputs[:1]})[0][0]
        return bound_call(session, named(self.manifest), np.ascontiguousarray(inputs[0]), output)

    def _process(self) -> ModelProcess:
        return ModelProcess(
            self.manifest,
            self._onnx,
            threads=self._threads or 1,
            limits=self._limits,
            input_bytes=_MOST_ROWS * self._golden_inputs[:1].nbytes,
        )

    @cached_property
    def _stored(self) -> Golden | None:
        return parse_golden(self._golden) if self._golden else None

    @property
    def _golden_inputs(self) -> AnyArray:
        return self._stored.inputs if self._stored else np.zeros(0, np.float32)

    def _why_unproven(self, process: ModelProcess, interface: Interface) -> str:
        """Returns why it is not known that the model answers rightly here; empty if it does."""
        if self._stored is None or not self._stored.inputs.size:
            return "it has no golden inputs to try it with"
        if len(interface.inputs) != 1 or len(interface.outputs) != 1:
            return "it has several inputs or outputs"
        try:
            outputs = process.ask([self._stored.inputs], rows=len(self._stored.inputs))
            compared(self.manifest, self._stored, outputs[0])
        except FedcoreError as error:
            return str(error)
        return ""

    def _tried_together(self, rows: int) -> int:
        """Returns the largest power of two up to ``rows`` that may run together."""
        if why_coupled(self._read(), self.manifest.input_shape):
            return 1
        golden, most = self._golden_inputs, 1
        with self._process() as process:
            while 2 * most <= rows:
                batch = np.resize(golden, (2 * most, *golden.shape[1:]))
                try:
                    alone = process.ask([batch], rows=len(batch))[0]
                    together = process.ask([batch], rows=len(batch), together=True)[0]
                except FedcoreError:
                    break
                allowed = _ALIKE * float(np.abs(alone).max(initial=0))
                if not (np.abs(alone.astype(np.float64) - together) <= allowed).all():
                    break
                most *= 2
        return most

    def _run_here(
        self, opened: _Opened, arrays: list[AnyArray], rows: int, *, most: int | None = None
    ) -> list[AnyArray]:
        """Runs batches of a power of two rows, as they were tried: 7 rows run as 4, 2 and 1."""
        largest, start, found = most or self._rows_together, 0, []
        feed_names = [each.name for each in opened.interface.inputs]
        while start < rows:
            size = min(largest, 1 << ((rows - start).bit_length() - 1))
            feeds = {
                name: array[start : start + size]
                for name, array in zip(feed_names, arrays, strict=True)
            }
            try:
                found.append(opened.session.run(None, feeds))
            except Exception as error:  # onnxruntime's errors have no common base class
                raise run_failed(named(self.manifest), error) from error
            start += size
        if len(found) == 1:
            return list(found[0])
        return [np.concatenate(of_one) for of_one in zip(*found, strict=True)]


def _checked_rows(
    inputs: Mapping[str, AnyArray], expected: tuple[TensorInfo, ...], manifest: Manifest
) -> int:
    """Returns the number of rows, after checking names, types, shapes and numbers.

    Raises:
        DataError: something differs from what the model takes.
    """
    if set(inputs) != {each.name for each in expected}:
        raise DataError(
            f"{named(manifest)}: expected the inputs {', '.join(e.name for e in expected)}, got "
            f"{foreign(', '.join(map(str, inputs)))}. Nothing was answered."
        )
    rows = max((len(array) for array in inputs.values() if array.ndim), default=0)
    for each in expected:
        array = inputs[each.name]
        wanted, shape = (rows, *each.shape[1:]), array.shape
        fits = len(shape) == len(wanted) and rows > 0
        if not fits or any(a not in (-1, b) for a, b in zip(wanted, shape, strict=True)):
            raise DataError(
                f"input {each.name!r}: expected shape {list(each.shape)} with at least 1 row, got "
                f"{list(shape)}. Nothing was answered."
            )
        if array.dtype != each.dtype:
            raise DataError(
                f"input {each.name!r}: expected type {each.dtype}, got {array.dtype}. Nothing was "
                "answered."
            )
        demand_finite(array, array, manifest, f"input {each.name!r}: expected numbers")
    return rows
