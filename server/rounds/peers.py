"""What the rounds know of their clients beyond node ids: names, weights, and whom to tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol


class Peers(Protocol):
    """Interface that knows clients' names and weights, and is notified of rejected replies."""

    def name(self, node_id: int) -> str:
        """Returns a node's display name, safe to print."""

    def client(self, node_id: int) -> str:
        """Returns the name under which an algorithm sees the node's client."""

    def weights(self, nodes: Sequence[int]) -> Mapping[int, int] | None:
        """Returns the weights of the nodes' replies, in examples, by node.

        None where each reply weighs the number of examples that its client reports.
        """

    def failure_text(self, node_id: int, reason: str) -> str:
        """Returns a node's failure reason as one line that names the node."""

    def rejected(self, node_id: int, reason: str) -> None:
        """Callback when a reply of a node is rejected for ``reason``."""


class NumberedPeers:
    """Peers that are known only by their node ids."""

    def name(self, node_id: int) -> str:
        """Returns ``node <id>``."""
        return f"node {node_id}"

    def client(self, node_id: int) -> str:
        """Returns ``node <id>``."""
        return f"node {node_id}"

    def weights(self, nodes: Sequence[int]) -> None:
        """Returns None: each reply weighs what its client reports."""

    def failure_text(self, node_id: int, reason: str) -> str:
        """Returns the reason unchanged: virtual clients name themselves in it."""
        return reason

    def rejected(self, node_id: int, reason: str) -> None:
        """Does nothing: the round's own error or note reports the rejection."""
