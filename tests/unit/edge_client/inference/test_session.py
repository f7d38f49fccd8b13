from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edge_client.inference.session import SessionSettings, open_session


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_do_not_change_the_answer(matmul: Any, threads: int) -> None:
    session = open_session(matmul.onnx(2.0), SessionSettings(threads))
    options = session.get_session_options()
    assert options.intra_op_num_threads == threads
    (name,) = (one.name for one in session.get_inputs())
    outputs = session.run(None, {name: np.eye(3, dtype=np.float32)})[0]
    np.testing.assert_array_equal(outputs[0], [2, 4])
    if threads > 1:
        spun = open_session(matmul.onnx(2.0), SessionSettings(threads, True, True))
        spinning = spun.get_session_options().get_session_config_entry
        assert spinning("session.intra_op.allow_spinning") == "1"
        assert spun.get_session_options().inter_op_num_threads == threads
        assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"


@pytest.mark.parametrize("onnx", [b"garbage", b"", b"\x08\x07"])
def test_what_is_no_model_is_refused_by_an_exception_alone(
    onnx: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Exception, match=r"(?i)protobuf|model|onnx"):
        open_session(onnx, SessionSettings())
    assert capfd.readouterr().err == ""
