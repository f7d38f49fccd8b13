"""What clients run around their training, where a strategy needs it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flwr.clientapp.mod import adaptiveclipping_mod, fixedclipping_mod
from flwr.clientapp.typing import Mod

_MODS: Mapping[str, Mod] = {
    "DifferentialPrivacyClientSideFixedClipping": fixedclipping_mod,
    "DifferentialPrivacyClientSideAdaptiveClipping": adaptiveclipping_mod,
}


def client_mods(strategy: str) -> Sequence[Mod]:
    """Flower's mods for clients of the strategy of that name."""
    return [_MODS[strategy]] if strategy in _MODS else []
