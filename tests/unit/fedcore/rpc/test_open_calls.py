"""Open calls: few of each caller, and none whose answer nobody takes."""

from __future__ import annotations

from contextlib import ExitStack

from fedcore.rpc.open_calls import TAKE_S, OpenCalls


class Context:
    def __init__(self, port: int) -> None:
        self.port, self.cancelled = port, 0

    def peer(self) -> str:
        return f"ipv4:10.0.0.1:{self.port}"

    def cancel(self) -> None:
        self.cancelled += 1


def test_one_call_too_many_ends_the_callers_oldest() -> None:
    calls = OpenCalls(2)
    contexts = [Context(port) for port in range(5)]
    with ExitStack() as stack:
        for context in contexts[:4]:
            stack.enter_context(calls.opened(b"one", context))
        stack.enter_context(calls.opened(b"two", contexts[4]))
        assert [context.cancelled for context in contexts] == [1, 1, 0, 0, 0]
        assert calls.peers() == {("10.0.0.1", port) for port in range(5)}
    assert calls.peers() == set()


def test_a_call_whose_answer_is_not_taken_ends() -> None:
    now = [0.0]
    calls = OpenCalls(8, lambda: now[0])
    slow, quiet = Context(1), Context(2)
    with calls.opened(b"one", slow) as call, calls.opened(b"two", quiet):
        call.sending()
        now[0] += TAKE_S
        calls.sweep()
        assert slow.cancelled == 0
        call.sent()
        call.sending()
        now[0] += TAKE_S + 1
        calls.sweep()
        calls.sweep()
        assert (slow.cancelled, quiet.cancelled) == (1, 0), "a stream may be silent for days"
