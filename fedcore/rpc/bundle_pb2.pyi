from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class Bundle(_message.Message):
    __slots__ = ("call", "objects")
    CALL_FIELD_NUMBER: _ClassVar[int]
    OBJECTS_FIELD_NUMBER: _ClassVar[int]
    call: bytes
    objects: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, call: _Optional[bytes] = ..., objects: _Optional[_Iterable[bytes]] = ...) -> None: ...
