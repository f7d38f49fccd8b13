from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class WatchReleases(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Published(_message.Message):
    __slots__ = ("change", "spread_ms")
    CHANGE_FIELD_NUMBER: _ClassVar[int]
    SPREAD_MS_FIELD_NUMBER: _ClassVar[int]
    change: int
    spread_ms: int
    def __init__(self, change: _Optional[int] = ..., spread_ms: _Optional[int] = ...) -> None: ...

class MetadataRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class FetchRequest(_message.Message):
    __slots__ = ("sha256", "offset")
    SHA256_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    sha256: str
    offset: int
    def __init__(self, sha256: _Optional[str] = ..., offset: _Optional[int] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("content",)
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    content: bytes
    def __init__(self, content: _Optional[bytes] = ...) -> None: ...

class DeviceReport(_message.Message):
    __slots__ = ("model", "version", "outcome", "reason", "golden_error", "p50_us")
    class Outcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        OUTCOME_UNSPECIFIED: _ClassVar[DeviceReport.Outcome]
        ACTIVATED: _ClassVar[DeviceReport.Outcome]
        REFUSED: _ClassVar[DeviceReport.Outcome]
        RETURNED: _ClassVar[DeviceReport.Outcome]
    OUTCOME_UNSPECIFIED: DeviceReport.Outcome
    ACTIVATED: DeviceReport.Outcome
    REFUSED: DeviceReport.Outcome
    RETURNED: DeviceReport.Outcome
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    GOLDEN_ERROR_FIELD_NUMBER: _ClassVar[int]
    P50_US_FIELD_NUMBER: _ClassVar[int]
    model: str
    version: int
    outcome: DeviceReport.Outcome
    reason: str
    golden_error: float
    p50_us: float
    def __init__(self, model: _Optional[str] = ..., version: _Optional[int] = ..., outcome: _Optional[_Union[DeviceReport.Outcome, str]] = ..., reason: _Optional[str] = ..., golden_error: _Optional[float] = ..., p50_us: _Optional[float] = ...) -> None: ...

class ServingReport(_message.Message):
    __slots__ = ("model", "version", "rows", "features", "requests", "errors", "latency", "noise_deviation")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    ERRORS_FIELD_NUMBER: _ClassVar[int]
    LATENCY_FIELD_NUMBER: _ClassVar[int]
    NOISE_DEVIATION_FIELD_NUMBER: _ClassVar[int]
    model: str
    version: int
    rows: int
    features: _containers.RepeatedCompositeFieldContainer[Bins]
    requests: int
    errors: int
    latency: _containers.RepeatedScalarFieldContainer[int]
    noise_deviation: float
    def __init__(self, model: _Optional[str] = ..., version: _Optional[int] = ..., rows: _Optional[int] = ..., features: _Optional[_Iterable[_Union[Bins, _Mapping]]] = ..., requests: _Optional[int] = ..., errors: _Optional[int] = ..., latency: _Optional[_Iterable[int]] = ..., noise_deviation: _Optional[float] = ...) -> None: ...

class Bins(_message.Message):
    __slots__ = ("counts",)
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    counts: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, counts: _Optional[_Iterable[int]] = ...) -> None: ...

class Reported(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
