"""Protobuf messages as plain data: what `--json` prints.

Names are those of the .proto files and every field is always there. Numbers are numbers, bytes are
hex, an enum is its word in lower case without the common prefix, an unset message is null. Fields
named `*_site` are hex strings: 64 random bits do not survive a JSON reader that uses doubles.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from google.protobuf.descriptor import EnumDescriptor
    from google.protobuf.message import Message


def to_plain(message: Message) -> dict[str, Any]:
    """All fields of `message`, by name."""
    result: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.is_repeated:
            result[field.name] = [_scalar(field, item) for item in value]
        elif field.message_type is not None or field.containing_oneof is not None:
            present = message.HasField(field.name)
            result[field.name] = _scalar(field, value) if present else None
        else:
            result[field.name] = _scalar(field, value)
    return result


def enum_word(enum: EnumDescriptor, number: int) -> str:
    """`extents-only` of STATE_EXTENTS_ONLY; `unknown` for a number of a later version."""
    prefix = enum.values_by_number[0].name.removesuffix("UNSPECIFIED")
    value = enum.values_by_number.get(number)
    if value is None or number == 0:
        return "unknown"
    return value.name.removeprefix(prefix).lower().replace("_", "-")


def _scalar(field: Any, value: Any) -> Any:
    if field.message_type is not None:
        return to_plain(value)
    if field.enum_type is not None:
        return enum_word(field.enum_type, value)
    if isinstance(value, bytes):
        return value.hex()
    if field.name.endswith("_site"):
        return f"{value:016x}"
    return value
