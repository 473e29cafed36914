"""An ONNX file in, its metadata out, without the onnx package, which a device need not have.

Reads the protobuf wire format (https://protobuf.dev/programming-guides/encoding/) of ModelProto and skips the graph
without loading it: metadata_props is field 14, each entry a message of key (1) and value (2).
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from vitedge.errors import ModelError

METADATA_PROPS = 14
VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5  # wire types


def read_metadata(path: Path) -> dict[str, str]:
    """The key-value pairs of an ONNX file; a file that is not one is a ModelError."""
    try:
        with path.open("rb") as file:
            entries = [dict(_fields(io.BytesIO(entry))) for number, entry in _fields(file, METADATA_PROPS)]
            return {entry[1].decode(): entry.get(2, b"").decode() for entry in entries}
    except FileNotFoundError as error:
        raise ModelError(f"{path} does not exist") from error
    except (EOFError, KeyError, UnicodeDecodeError, OSError) as error:
        raise ModelError(f"{path} is not a readable ONNX model", hint="it may be truncated; export it again") from error


def _fields(file: BinaryIO, wanted: int | None = None) -> Iterator[tuple[int, bytes]]:
    """Each length-delimited field of a message, as (number, bytes); only number `wanted`, if given, is read."""
    end = file.seek(0, os.SEEK_END)
    file.seek(0)
    while file.tell() < end:
        number, wire = divmod(_varint(file), 8)
        if wire == LENGTH:
            size = _varint(file)
            if file.tell() + size > end:
                raise EOFError
            if wanted is None or number == wanted:
                yield number, file.read(size)
            else:
                file.seek(size, os.SEEK_CUR)
        elif wire == VARINT:
            _varint(file)
        elif wire in (FIXED32, FIXED64):
            file.seek(4 if wire == FIXED32 else 8, os.SEEK_CUR)
        else:
            raise EOFError


def _varint(file: BinaryIO) -> int:
    """A base-128 number, least significant group first."""
    value = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)
        if not byte:
            raise EOFError
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
    raise EOFError
