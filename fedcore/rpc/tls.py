"""Settings of gRPC's core, which it reads from the environment when it is imported."""

from __future__ import annotations

import os
import sys

from fedcore.errors import ResourceError

_NAME, _SUITES = "GRPC_SSL_CIPHER_SUITES", "ECDHE-RSA-AES128-GCM-SHA256"


def silence_grpc_core() -> None:
    """Stops gRPC's core from writing to standard error; call it before grpc is imported.

    Callers learn of failures from the errors of their calls. Set ``GRPC_VERBOSITY`` to see more.
    """
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")


def require_tls_1_3() -> None:
    """Disables TLS below 1.3 for gRPC in this process; call it before grpc is imported.

    gRPC has no setting for the minimum version, only a list of TLS 1.2 ciphers that it reads on
    import. The cipher set here needs an RSA certificate, and a project's certificates use P-384, so
    no TLS 1.2 handshake succeeds.

    Raises:
        ResourceError: grpc has been imported already.
    """
    if os.environ.get(_NAME) == _SUITES:
        return
    if "grpc" in sys.modules:
        raise ResourceError(
            "start: grpc was imported before its TLS could be limited to version 1.3. Nothing "
            f"was started; set {_NAME}={_SUITES} in the environment, or start it with `fedcore`."
        )
    os.environ[_NAME] = _SUITES
