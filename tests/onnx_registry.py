"""The registry of ONNX operators that torch's exporter builds, built once a process.

Each export builds it afresh from the sources of some 500 functions, which takes half a second of
a core, more than the rest of exporting a small model; the tests export hundreds. fedcore itself,
which exports a few times a process, leaves the exporter as it is.
"""

from __future__ import annotations

import functools
import sys


def share_registry() -> None:
    """Has all exports of this process use one registry for each version of the operator set.

    An export only reads the registry, for fedcore registers no operators of its own.
    """
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    build = ONNXRegistry.from_torchlib
    if not hasattr(build, "cache_info"):
        ONNXRegistry.from_torchlib = staticmethod(functools.cache(build))  # type: ignore[method-assign]


def share_registry_if_exporting() -> None:
    """Does so once something has imported the exporter, which by itself takes a second."""
    if "torch.onnx._internal.exporter._registration" in sys.modules:
        share_registry()
