"""Opens the decode graph of an installed model, so that a token costs the work of one token.

A decode graph is a program of its own, and passes what a model passes that runs in this process
(`edge_client.inference.engine`): its work depends on shapes alone, and it has answered the golden
inputs as the model does, in each shape that it will run in, within limits.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edge_client.inference.decode_graph import NoDecodeGraph, decode_onnx
from edge_client.inference.fixed_work import why_unbounded
from edge_client.inference.process import ModelLimits, ModelProcess, named
from edge_client.inference.session import SessionSettings, open_session
from edge_client.inference.token_cache import DecodeForm, TokenCache, chunks, decode_form
from fedcore.artifacts.decode import MAX_CACHE_BYTES
from fedcore.artifacts.golden import AnyArray, Golden, parse_golden
from fedcore.artifacts.manifest import Manifest
from fedcore.artifacts.parity import FloatArray
from fedcore.errors import DeviceError, FedcoreError
from fedcore.files import sha256_hex

_TRIED_STEPS = 32
"""Most tokens of the trial that run one by one."""
Run = Callable[[Sequence[int], int], FloatArray]
"""Runs tokens from a position on, 0 for a new sequence, and returns their logits ``(S, V)``."""


@dataclass(frozen=True)
class _Usable:
    session: Any
    """An onnxruntime session of the decode graph; None if there is no usable one."""
    form: DecodeForm | None
    why_not: str


class Decoder:
    """The decode graph of one version of a model. Thread-safe.

    Guarantee:
        The graph runs in this process only after it has answered golden inputs in a process with
        limits, in each shape that it will run in, as the release says, and only if its work depends
        on nothing but these shapes. Its caches take at most
        `fedcore.artifacts.decode.MAX_CACHE_BYTES` for each sequence.
    """

    def __init__(
        self,
        manifest: Manifest,
        onnx: Path,
        golden: bytes,
        *,
        threads: int | None = None,
        limits: ModelLimits | None = None,
    ) -> None:
        """Describes the decoder; loads nothing.

        Args:
            manifest: The model's manifest.
            onnx: The model's file; read only if it has the manifest's digest.
            golden: The release's golden file; without golden inputs there is no decoding.
            threads: Threads of one step; 1 when None, as a step is little work.
            limits: Time and memory of the trial.
        """
        self._manifest, self._onnx, self._golden = manifest, onnx, golden
        self._threads, self._limits = threads or 1, limits or ModelLimits()
        self._lock = threading.Lock()
        self._opened: _Usable | None = None

    @property
    def why_not(self) -> str:
        """Why there is no usable decode graph; empty if there is. Loads it."""
        return self._open().why_not

    def start(self) -> TokenCache | None:
        """Returns the cache of a new sequence; None if there is no usable decode graph."""
        opened = self._open()
        if opened.form is None:
            return None
        return TokenCache(opened.session, opened.form, named(self._manifest))

    def _open(self) -> _Usable:
        with self._lock:
            if self._opened is None:
                try:
                    self._opened = self._load()
                except (FedcoreError, NoDecodeGraph) as error:
                    self._opened = _Usable(None, None, str(error))
            return self._opened

    def _load(self) -> _Usable:
        manifest, of = self._manifest, named(self._manifest)
        raw = self._onnx.read_bytes() if self._onnx.exists() else b""
        if sha256_hex(raw) != manifest.onnx.sha256:
            raise DeviceError(f"{of}: its file has just changed; an update may have replaced it.")
        decode = decode_onnx(raw)
        del raw
        if why := why_unbounded(decode):
            raise DeviceError(f"{of}: its decode graph is not run: {why}.")
        golden = parse_golden(self._golden) if self._golden else None
        if golden is None or not _fits(golden, manifest):
            raise DeviceError(f"{of}: it has no golden inputs to try its decode graph with.")
        try_steps = _Trial(manifest, golden)
        form = self._tried(try_steps)
        try:
            session = open_session(decode, SessionSettings(self._threads))
        except Exception as error:  # onnxruntime's errors have no common base class
            raise DeviceError(f"{of}: onnxruntime cannot load its decode graph.") from error
        cache = TokenCache(session, form, of)

        def run(tokens: Sequence[int], start: int) -> FloatArray:
            if not start:
                cache.clear()
            return cache.run(tokens)

        try_steps.in_steps(run)  # here a cache is written where it is read
        return _Usable(session, form, "")

    def _tried(self, trial: _Trial) -> DecodeForm:
        """Runs the trial in a process with limits; returns what the graph takes and gives."""
        manifest, of = self._manifest, named(self._manifest)
        with ModelProcess(
            manifest,
            self._onnx,
            threads=self._threads,
            limits=self._limits,
            input_bytes=MAX_CACHE_BYTES,
            decode=True,
        ) as process:
            window, dtype = manifest.input_shape[0], manifest.input_dtype
            form = decode_form(process.interface(), window=window, dtype=dtype, of=of)
            caches: list[AnyArray] = []

            def run(tokens: Sequence[int], start: int) -> FloatArray:
                nonlocal caches
                given = np.array([tokens], form.tokens.dtype)
                places = np.arange(start, start + len(tokens))
                before = caches if start else form.new_caches()
                found = process.ask([given, places, *before], together=True)
                logits, caches = found[0], found[1:]
                shapes = [(each.shape, each.dtype) for each in caches]
                wanted = (1, len(tokens), form.logits.shape[2])
                if shapes != [(e.shape, e.dtype) for e in before] or logits.shape != wanted:
                    raise DeviceError(f"{of}: its decode graph gives outputs of other shapes.")
                of_one: FloatArray = logits[0]
                return of_one

            trial.in_each_shape(run)
            trial.in_steps(run)
        return form


def _fits(golden: Golden, manifest: Manifest) -> bool:
    shape = golden.inputs.shape
    return len(shape) == 2 and shape[1:] == manifest.input_shape and shape[0] > 0 and shape[1] > 1


class _Trial:
    """Compares the logits of a decode graph with golden outputs, which are the model's own."""

    def __init__(self, manifest: Manifest, golden: Golden) -> None:
        self._manifest, self._golden = manifest, golden
        self._window = golden.inputs.shape[1]

    def in_each_shape(self, run: Run) -> None:
        """Tries a first run of each number of tokens that a run may have.

        Raises:
            DeviceError: the logits differ from the golden outputs by more than the manifest allows.
        """
        size = 1
        while size <= self._window:
            self._compare(0, 0, run(self._golden.inputs[0, :size].tolist(), 0))
            size *= 2

    def in_steps(self, run: Run) -> None:
        """Tries a whole window, the last tokens one by one.

        Raises:
            DeviceError: the logits differ from the golden outputs by more than the manifest allows.
        """
        last = len(self._golden.inputs) - 1
        single = min(_TRIED_STEPS, self._window - 1)
        start = 0
        for size in [*chunks(self._window - single, self._window), *([1] * single)]:
            tokens = self._golden.inputs[last, start : start + size].tolist()
            self._compare(last, start, run(tokens, start))
            start += size

    def _compare(self, row: int, start: int, logits: FloatArray) -> None:
        flat, golden = logits.reshape(-1), self._golden
        first = start * logits.shape[1]
        if golden.places is None:
            expected = golden.outputs[row].reshape(-1)[first : first + len(flat)]
            found = flat
        else:
            among = (golden.places >= first) & (golden.places < first + len(flat))
            expected, found = golden.outputs[row][among], flat[golden.places[among] - first]
        of, most = named(self._manifest), self._manifest.golden_tolerance
        if expected.shape != found.shape:
            raise DeviceError(f"{of}: its decode graph gives {logits.shape[1]} logits a token.")
        error = float(np.abs(expected.astype(np.float64) - found).max(initial=0.0))
        if not error <= most:  # also true for NaN
            raise DeviceError(
                f"{of}: its decode graph differs from the golden outputs by {error:.3g}, and at "
                f"most {most:.3g} is allowed."
            )
