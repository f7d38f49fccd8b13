from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class WatchRequest(_message.Message):
    __slots__ = ("instance",)
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    instance: str
    def __init__(self, instance: _Optional[str] = ...) -> None: ...

class Call(_message.Message):
    __slots__ = ("kind",)
    class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        KIND_UNSPECIFIED: _ClassVar[Call.Kind]
        OPEN: _ClassVar[Call.Kind]
        WORK: _ClassVar[Call.Kind]
    KIND_UNSPECIFIED: Call.Kind
    OPEN: Call.Kind
    WORK: Call.Kind
    KIND_FIELD_NUMBER: _ClassVar[int]
    kind: Call.Kind
    def __init__(self, kind: _Optional[_Union[Call.Kind, str]] = ...) -> None: ...
