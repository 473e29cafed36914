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
from vitedge.specs import MOVING, PRODUCTS

GRAPH, METADATA_PROPS = 7, 14  # fields of ModelProto
NODE, INITIALIZER = 1, 5  # of GraphProto
INPUT, OUTPUT, OP_TYPE = 1, 2, 4  # of NodeProto
EXTERNAL_DATA = 13  # of TensorProto
VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5  # wire types


def read_metadata(path: Path) -> dict[str, str]:
    """The key-value pairs of an ONNX file; a file that is not one is a ModelError."""
    with _opened(path) as file:
        entries = [dict(_fields(io.BytesIO(file.read(size)))) for size in _sizes(file, METADATA_PROPS)]
        return {entry[1].decode(): entry.get(2, b"").decode() for entry in entries}


def count_operators(path: Path) -> Counter[str]:
    """How many nodes of each type the graph of an ONNX file has, those of functions and branches aside."""
    return Counter(kind for kind, _, _ in _nodes(path))


def count_quantized_products(path: Path) -> tuple[int, int]:
    """How many matrix products of an ONNX file compute in INT8, and how many have a quantized second operand, the weight.

    Those in INT8 have both operands out of a DequantizeLinear. Operands are followed back through what moves elements, as
    `count_work` of the compiler does.
    """
    nodes = _nodes(path)
    makers = {name: (kind, inputs) for kind, inputs, outputs in nodes for name in outputs}

    def is_dequantized(name: str) -> bool:
        kind, inputs = makers.get(name, ("", []))
        return kind == "DequantizeLinear" or (kind in MOVING and is_dequantized(inputs[0]))

    operands = [list(map(is_dequantized, inputs[:2])) for kind, inputs, _ in nodes if kind in PRODUCTS]
    return sum(map(all, operands)), sum(second for _, second in operands)


def has_external_data(path: Path) -> bool:
    """Whether some of the weights of an ONNX file lie in other files."""
    with _opened(path) as file:
        return any(
            number == EXTERNAL_DATA
            for graph in _sizes(file, GRAPH)
            for tensor in _sizes(file, INITIALIZER, file.tell() + graph)
            for number, _ in _headers(file, file.tell() + tensor)
        )


def _nodes(path: Path) -> list[tuple[str, list[str], list[str]]]:
    """Operator, inputs and outputs of each node, in the order of the file."""
    with _opened(path) as file:
        messages = [file.read(node) for graph in _sizes(file, GRAPH) for node in _sizes(file, NODE, file.tell() + graph)]
        fields = [[(number, value) for number, value in _fields(io.BytesIO(message))] for message in messages]
        return [
            (
                dict(entries)[OP_TYPE].decode(),
                [value.decode() for number, value in entries if number == INPUT],
                [value.decode() for number, value in entries if number == OUTPUT],
            )
            for entries in fields
        ]


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        with path.open("rb") as file:
            yield file
    except FileNotFoundError as error:
        raise ModelError(f"{path} does not exist") from error
    except IsADirectoryError as error:
        raise ModelError(f"{path} is a folder, and no ONNX file", hint="give a file, such as MODEL/VARIANT.onnx") from error
    except PermissionError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}", hint="it is there, but not for this user to read") from error
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
