"""Every error that fedcore raises on purpose, and the exit code that the CLI leaves with.

::

    FedcoreError                     1   anything below; never raised itself
    |-- ConfigError                  2   a configuration file, an override or a command line
    |-- TaskError                    3   the user's task file
    |-- DataError                    4   data that is missing, corrupt or empty
    |-- PrivacyError                 5   a guarantee that cannot be given
    |   |-- UnsupportedLayer             a layer that example-level DP cannot take
    |   |-- LedgerFull                   a device's ledger has room for no more
    |   |-- TooManyRuns                  a server begins private runs too fast
    |   `-- BudgetExhausted              the next release would pass the epsilon budget
    |       `-- OwnersBudgetExhausted    that of the device's owner, over all runs
    |-- TrainingError                6   training that cannot go on
    |   |-- TrainingDiverged             a loss or an update is not finite
    |   |-- InvalidUpdate                an update that the server refuses
    |   `-- RoundFailed                  too few updates for a round
    |-- ResourceError                7   the machine lacks something
    |   |-- InsufficientMemory
    |   `-- DiskFull
    |-- CompressionError             8   no candidate can be released
    |   `-- ParityError                  an exported model answers differently from its source
    |-- ReleaseError                 9   publishing failed; what was published before stands
    |-- TrustError                  10   something delivered cannot be trusted
    |   |-- SignatureInvalid
    |   |-- DigestMismatch
    |   |-- RollbackRefused
    |   |-- CertificateRefused         a certificate or key that the project does not vouch for
    |   |-- UpdateForeign              a signed update of another run, node or purpose
    |   |-- UpdateStale                a signed update of another round or base model
    |   |-- UpdateExpired              a signed update after its time
    |   `-- UpdateReplayed             a second update of a node in one round
    `-- DeviceError                 11   a device cannot serve what it was asked to
        |-- SelfTestFailed
        |-- LimitExceeded              a model took more time or memory than it may
        `-- OwnerLimit                   more than the owner of the device allows

130 is left for an interrupt (Ctrl-C), as shells expect. A message is one short paragraph:
what happened, where, what was got against what was expected, the consequence, the next step.
"""

from __future__ import annotations

from typing import ClassVar

from fedcore.observability.foreign import paragraph


class FedcoreError(Exception):
    """The root: catch it to catch whatever fedcore refuses on purpose.

    Example::

        try:
            result = fedcore.simulate("churn/task.py", "churn/run.toml")
        except fedcore.FedcoreError as error:
            print(type(error).__name__, error)
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str = "") -> None:
        """An error with this text, made printable where it is not.

        Its text is one paragraph of at most 1800 printable characters then, whatever names and
        values of a peer's or a file's it quotes.
        """
        super().__init__(paragraph(message))


class ConfigError(FedcoreError):
    """A configuration file, an override or a command line is wrong."""

    exit_code = 2


class TaskError(FedcoreError):
    """The user's task file cannot be loaded, or what it brings does not fit together."""

    exit_code = 3


class DataError(FedcoreError):
    """Data is missing, corrupt or empty."""

    exit_code = 4


class PrivacyError(FedcoreError):
    """A privacy guarantee that was asked for cannot be given."""

    exit_code = 5


class UnsupportedLayer(PrivacyError):
    """The model holds a layer for which per-example gradients do not exist."""


class LedgerFull(PrivacyError):
    """A device's ledger holds as many runs, or charges, as it may: nothing in it is forgotten."""


class TooManyRuns(PrivacyError):
    """A server has a device open new private runs faster than any project needs."""


class BudgetExhausted(PrivacyError):
    """The next release would take a client past its epsilon budget."""


class OwnersBudgetExhausted(BudgetExhausted):
    """The next release would take a client past what its owner allows over all runs."""


class TrainingError(FedcoreError):
    """Training cannot go on."""

    exit_code = 6


class TrainingDiverged(TrainingError):
    """A loss or an update is not finite."""


class InvalidUpdate(TrainingError):
    """A client's update is refused before aggregation."""


class RoundFailed(TrainingError):
    """A round got fewer updates than its quorum."""


class ResourceError(FedcoreError):
    """The machine lacks something that the work needs."""

    exit_code = 7


class InsufficientMemory(ResourceError):
    """The work needs more memory than there is, or than the owner allows."""


class DiskFull(ResourceError):
    """A file could not be written whole; nothing half-written is left."""


class CompressionError(FedcoreError):
    """No candidate model can be released."""

    exit_code = 8


class ParityError(CompressionError):
    """An exported model answers differently from the model it was made from."""


class ReleaseError(FedcoreError):
    """Publishing failed; what was published before stands unchanged."""

    exit_code = 9


class TrustError(FedcoreError):
    """Something that was delivered cannot be trusted, and is not used."""

    exit_code = 10


class SignatureInvalid(TrustError):
    """Metadata is not signed by the keys that the device trusts, or has expired."""


class DigestMismatch(TrustError):
    """Bytes differ from those that were signed."""


class RollbackRefused(TrustError):
    """A version older than one already seen was offered."""


class CertificateRefused(TrustError):
    """A certificate or key that the project does not vouch for: foreign, expired or revoked."""


class UpdateForeign(TrustError):
    """A signed update that belongs to another run, node or purpose."""


class UpdateStale(TrustError):
    """A signed update that belongs to another round, or starts from another base model."""


class UpdateExpired(TrustError):
    """A signed update that arrived after its time, or claims more time than it may."""


class UpdateReplayed(TrustError):
    """A second update of one node in one round: the same bytes again, or others."""


class DeviceError(FedcoreError):
    """A device cannot serve what it was asked to."""

    exit_code = 11


class SelfTestFailed(DeviceError):
    """A delivered model does not reproduce its golden outputs on this device."""


class LimitExceeded(DeviceError):
    """A model took more time or memory than it may on this device."""


class OwnerLimit(DeviceError):
    """What a server asks for or sends is more than the device's owner, or its model, allows."""


INTERRUPTED = 130
"""Exit code after Ctrl-C."""
