"""Converts Flower records to bytes on disk and back."""

from __future__ import annotations

from flwr.app import RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as RecordDictProto
from google.protobuf.message import DecodeError

from fedcore.errors import DataError


def record_bytes(record: RecordDict) -> bytes:
    """Returns a record as bytes of Flower's protobuf."""
    return bytes(recorddict_to_proto(record).SerializeToString(deterministic=True))


def read_record(raw: bytes, *, where: str) -> RecordDict:
    """Returns the record in bytes that `record_bytes` made.

    Raises:
        DataError: the bytes are no record.
    """
    try:
        return recorddict_from_proto(RecordDictProto.FromString(raw))
    except (DecodeError, ValueError, TypeError, KeyError, AttributeError):
        raise DataError(
            f"{where}: this file does not contain a record. It was not used; restore it from a "
            "backup."
        ) from None
