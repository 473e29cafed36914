"""An ONNX file in, its metadata and its operators out, without the onnx package, which a device need not have.

Reads the protobuf wire format (https://protobuf.dev/programming-guides/encoding/) of ModelProto and skips weights without
loading them: metadata_props is field 14, each entry a message of key (1) and value (2); graph is field 7, its nodes field 1
of that, and the operator field 4 of a node.
"""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from vitedge.errors import ModelError

GRAPH, METADATA_PROPS = 7, 14  # fields of ModelProto
NODE, OP_TYPE = 1, 4  # of GraphProto, of NodeProto
VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5  # wire types


def read_metadata(path: Path) -> dict[str, str]:
    """The key-value pairs of an ONNX file; a file that is not one is a ModelError."""
    with _opened(path) as file:
        entries = [dict(_fields(io.BytesIO(file.read(size)))) for size in _sizes(file, METADATA_PROPS)]
        return {entry[1].decode(): entry.get(2, b"").decode() for entry in entries}


def count_operators(path: Path) -> Counter[str]:
    """How many nodes of each type the graph of an ONNX file has, those of functions and branches aside."""
    with _opened(path) as file:
        nodes = [file.read(node) for graph in _sizes(file, GRAPH) for node in _sizes(file, NODE, file.tell() + graph)]
        return Counter(dict(_fields(io.BytesIO(node)))[OP_TYPE].decode() for node in nodes)


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        with path.open("rb") as file:
            yield file
    except FileNotFoundError as error:
        raise ModelError(f"{path} does not exist") from error
    except (EOFError, KeyError, UnicodeDecodeError, OSError) as error:
        raise ModelError(f"{path} is not a readable ONNX model", hint="it may be truncated; export it again") from error


def _fields(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Each length-delimited field of a message, as (number, bytes)."""
    for number, size in _headers(file, file.seek(0, os.SEEK_END) - file.seek(0)):
        yield number, file.read(size)


def _sizes(file: BinaryIO, wanted: int, end: int | None = None) -> Iterator[int]:
    """Stand at the beginning of each field `wanted` of the message up to `end`, and give its size in bytes."""
    if end is None:
        end = file.seek(0, os.SEEK_END) - file.seek(0)
    for number, size in _headers(file, end):
        if number == wanted:
            yield size


def _headers(file: BinaryIO, end: int) -> Iterator[tuple[int, int]]:
    """The number and size of each length-delimited field from here to `end`; what is not read of one is skipped."""
    while file.tell() < end:
        number, wire = divmod(_varint(file), 8)
        if wire == LENGTH:
            size = _varint(file)
            after = file.tell() + size
            if after > end:
                raise EOFError
            yield number, size
            file.seek(after)
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
