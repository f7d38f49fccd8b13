"""All exceptions that fedcore raises on purpose, and the exit codes of the command line.

::

    FedcoreError                     1   the base class; never raised itself
    |-- ConfigError                  2   a configuration file, an override or a command line
    |-- TaskError                    3   the user's task file
    |-- DataError                    4   data that is missing, corrupt or empty
    |   |-- DataFolderMissing            a task reads files, and no data folder is set
    |   `-- RepositoryUnreachable        a repository that does not answer, or breaks off
    |-- PrivacyError                 5   a guarantee that cannot be given
    |   |-- UnsupportedLayer             a layer that example-level DP does not support
    |   |-- LedgerFull                   a device's ledger has no room for another entry
    |   |-- TooManyRuns                  a server starts private runs too fast
    |   `-- BudgetExhausted              the next release would pass the epsilon budget
    |       `-- OwnersBudgetExhausted    the next release would exceed the budget that the owner set
    |-- TrainingError                6   training that cannot continue
    |   |-- TrainingDiverged             a loss or an update is not finite
    |   |-- InvalidUpdate                an update that the server rejects
    |   `-- RoundFailed                  too few updates for a round
    |-- ResourceError                7   the machine has too little of a resource
    |   |-- InsufficientMemory
    |   `-- DiskFull
    |-- CompressionError             8   no candidate can be released
    |   `-- ParityError                  an exported model whose outputs differ from its source's
    |-- ReleaseError                 9   publishing failed; earlier releases are unchanged
    |-- TrustError                  10   a delivery or message that cannot be trusted
    |   |-- SignatureInvalid
    |   |-- DigestMismatch
    |   |-- RollbackRefused
    |   |-- CertificateRefused         a certificate or key that is foreign, expired or revoked
    |   |-- UpdateForeign              a signed update of another run, node or purpose
    |   |-- UpdateStale                a signed update of another round or base model
    |   |-- UpdateExpired              a signed update after its time of validity
    |   `-- UpdateReplayed             a second update of a node in one round
    `-- DeviceError                 11   a device that cannot do what is asked of it
        |-- SelfTestFailed
        |-- LimitExceeded              a model that needs more time or memory than allowed
        |-- OwnerLimit                   a request above the limits of the device's owner
        `-- RequestRefused               an inference request that a serving device refuses

Exit code 12 means that ``fedcore release drift`` has found drift, which is no error, and 130 an
interrupt (Ctrl-C), as shells expect. A message is one short paragraph: what happened, where, the
value found and the value expected, the consequence, the next step.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from fedcore.observability.foreign import paragraph

RefusalReason = Literal[
    "invalid",  # the request is malformed, or does not fit the model
    "unknown",  # no such model, version or method
    "unsupported",  # a feature of the protocol that is not offered
    "too_large",
    "forbidden",
    "overloaded",  # the queue is full
    "unavailable",  # the server is stopping, or the model is not loaded
    "late",  # the deadline passed before the model ran
    "failed",  # the model failed
]


class FedcoreError(Exception):
    """The base class: catch it to catch every error that fedcore raises on purpose.

    Example::

        try:
            result = fedcore.simulate("churn/task.py", "churn/run.toml")
        except fedcore.FedcoreError as error:
            print(type(error).__name__, error)
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str = "") -> None:
        """Creates an error whose text is one paragraph of at most 1800 printable characters.

        Unprintable characters, which quoted names and values from peers and files may contain, are
        made printable.
        """
        super().__init__(paragraph(message))


class ConfigError(FedcoreError):
    """A configuration file, an override or a command line is wrong."""

    exit_code = 2


class TaskError(FedcoreError):
    """The user's task file cannot be loaded, or its parts do not fit together."""

    exit_code = 3


class DataError(FedcoreError):
    """Data is missing, corrupt or empty."""

    exit_code = 4


class DataFolderMissing(DataError):
    """A task reads files, and no data folder is set."""


class RepositoryUnreachable(DataError):
    """A repository over the network does not answer, or broke off; trying again may help."""


class PrivacyError(FedcoreError):
    """A requested privacy guarantee cannot be given."""

    exit_code = 5


class UnsupportedLayer(PrivacyError):
    """The model contains a layer for which per-example gradients do not exist."""


class LedgerFull(PrivacyError):
    """A device's ledger contains the most runs or charges allowed; none is ever removed."""


class TooManyRuns(PrivacyError):
    """A server makes a device open new private runs faster than any project needs."""


class BudgetExhausted(PrivacyError):
    """The next release would exceed a client's epsilon budget."""


class OwnersBudgetExhausted(BudgetExhausted):
    """The next release would exceed the budget that a client's owner set over all runs."""


class TrainingError(FedcoreError):
    """Training cannot continue."""

    exit_code = 6


class TrainingDiverged(TrainingError):
    """A loss or an update is not finite."""


class InvalidUpdate(TrainingError):
    """The server rejects a client's update before aggregation, or a client an instruction."""


class RoundFailed(TrainingError):
    """A round received fewer updates than its quorum."""


class ResourceError(FedcoreError):
    """The machine does not provide a resource that the work needs."""

    exit_code = 7


class InsufficientMemory(ResourceError):
    """The work needs more memory than the machine has or the owner allows."""


class DiskFull(ResourceError):
    """A file could not be written completely; no partial file is left."""


class CompressionError(FedcoreError):
    """No candidate model can be released."""

    exit_code = 8


class ParityError(CompressionError):
    """The outputs of an exported model differ from those of its source model."""


class ReleaseError(FedcoreError):
    """Publishing failed; earlier releases are unchanged."""

    exit_code = 9


class TrustError(FedcoreError):
    """A delivery or message cannot be trusted, and is not used."""

    exit_code = 10


class SignatureInvalid(TrustError):
    """Metadata is not signed by keys that the device trusts, or has expired."""


class DigestMismatch(TrustError):
    """Bytes differ from the signed ones."""


class RollbackRefused(TrustError):
    """A version older than one seen before was offered."""


class CertificateRefused(TrustError):
    """A certificate or key is not the project's, has expired or is revoked."""


class UpdateForeign(TrustError):
    """A signed update belongs to another run, node or purpose."""


class UpdateStale(TrustError):
    """A signed update belongs to another round, or starts from another base model."""


class UpdateExpired(TrustError):
    """A signed update arrived after its time of validity, or claims too long a validity."""


class UpdateReplayed(TrustError):
    """A node sent a second update in one round, identical or different."""


class DeviceError(FedcoreError):
    """A device cannot do what is asked of it."""

    exit_code = 11


class SelfTestFailed(DeviceError):
    """A delivered model does not reproduce its golden outputs on this device."""


class LimitExceeded(DeviceError):
    """A model needs more time or memory than it may use on this device."""


class OwnerLimit(DeviceError):
    """A server's request or message exceeds the limits of the device's owner or of its model."""


class RequestRefused(DeviceError):
    """An inference request is refused; ``reason`` decides the status that its sender gets."""

    def __init__(self, message: str, reason: RefusalReason = "invalid") -> None:
        """Creates an error with the reason of the refusal."""
        super().__init__(message)
        self.reason: RefusalReason = reason


INTERRUPTED = 130
"""Exit code after Ctrl-C."""
