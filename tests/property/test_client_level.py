"""Whatever a client has trained, what it sends is within its bound, and the server takes it."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fedcore.privacy.client_level import Bound, clip

floats = st.floats(width=32, allow_nan=True, allow_infinity=True)


@given(
    st.lists(st.tuples(st.floats(-1e6, 1e6, width=32), floats), min_size=1, max_size=40),
    st.floats(1e-3, 1e3),
)
def test_whatever_was_trained_the_server_takes_what_is_sent(
    pairs: list[tuple[float, float]], clip_norm: float
) -> None:
    start, trained = (np.array(each, np.float32) for each in zip(*pairs, strict=True))
    sent = clip(start, trained, clip_norm).weights
    assert sent.dtype == np.float32
    Bound(start, clip_norm, adaptive=False).check((sent,), {}, where="update")
