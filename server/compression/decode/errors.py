"""Why a model gets no decode graph."""

from __future__ import annotations


class NotDecodable(ValueError):
    """A model cannot compute one position after the other; the message is a clause that says why.

    Such a model is released without a decode graph, so nobody outside this folder sees the error.
    """
