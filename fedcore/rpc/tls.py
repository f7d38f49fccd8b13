"""What gRPC's core reads from the environment when it is imported."""

from __future__ import annotations

import os
import sys

from fedcore.errors import ResourceError

_NAME, _SUITES = "GRPC_SSL_CIPHER_SUITES", "ECDHE-RSA-AES128-GCM-SHA256"


def quiet_core() -> None:
    """Keeps gRPC's core from writing to standard error; to be called before grpc is imported.

    What goes wrong, callers learn from the errors that calls end with. Whoever wants to see more
    sets ``GRPC_VERBOSITY``.
    """
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")


def only_tls_1_3() -> None:
    """Leaves this process's gRPC no TLS below 1.3; to be called before grpc is imported.

    gRPC has no setting for the least version. What it has is a list of ciphers for TLS 1.2, read
    when it is imported; the one that is named needs an RSA certificate, and the certificates of a
    project are on P-384.

    Raises:
        ResourceError: grpc has been imported already, so that it is too late.
    """
    if os.environ.get(_NAME) == _SUITES:
        return
    if "grpc" in sys.modules:
        raise ResourceError(
            "start: grpc was imported before its TLS could be limited to version 1.3. Nothing was "
            f"started; set {_NAME}={_SUITES} in the environment, or start it by `fedcore`."
        )
    os.environ[_NAME] = _SUITES
