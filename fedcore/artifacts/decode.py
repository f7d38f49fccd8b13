"""Form of the decode graph in a model's file: how it is stored, and what its tensors are called.

A decode graph computes the logits of new tokens from these tokens and a cache of what the model has
computed of the earlier ones. It is stored in the metadata of the ONNX file whose weights it shares,
so one signature covers both, and readers that do not know it read the file as before.
"""

from __future__ import annotations

DECODE_KEY = "fedcore.decode"
"""Key of the ONNX file's metadata; the value is a GraphProto, in base64, without the weights that
it shares with the file's own graph."""
PREFIX = "decode/"
"""Begins the name of every tensor that a decode graph has of its own."""
POSITIONS = f"{PREFIX}positions"
"""Second input, int64 ``(S,)``: the places of the new tokens, which the first input is.
The tokens are ``(1, S)``, and the first output has their logits, ``(1, S, V)``."""
CACHE = f"{PREFIX}cache."
"""Begins the names of further inputs, all of fixed shapes, and of as many further outputs: caches
before and after the new tokens. A decode graph reads a cache only to write it, so that both may be
one piece of memory."""
STATE = f"{PREFIX}state."
"""Begins the names of inputs like `CACHE` whose memory may not be that of their outputs."""
NEXT = ".next"
"""Ends the name of the output that replaces the input of the same name."""
MAX_GRAPH_BYTES = 16 << 20
"""Most bytes of a stored decode graph: operators and shapes, never weights."""
MAX_CACHE_BYTES = 128 << 20
"""Most bytes of all caches of one sequence."""
