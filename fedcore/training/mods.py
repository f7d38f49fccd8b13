"""Flower mods that some strategies need around a client's training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flwr.clientapp.mod import adaptiveclipping_mod, fixedclipping_mod
from flwr.clientapp.typing import Mod

_MODS: Mapping[str, Mod] = {
    "DifferentialPrivacyClientSideFixedClipping": fixedclipping_mod,
    "DifferentialPrivacyClientSideAdaptiveClipping": adaptiveclipping_mod,
}


def client_mods(strategy: str) -> Sequence[Mod]:
    """Returns the Flower client mods for the strategy of this name."""
    return [_MODS[strategy]] if strategy in _MODS else []
