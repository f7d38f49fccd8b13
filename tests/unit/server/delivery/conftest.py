from __future__ import annotations

from tests.unit.server.release.conftest import publisher

__all__ = ["publisher"]
