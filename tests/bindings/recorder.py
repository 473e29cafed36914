"""Talks to relay.cpp within one process: which virtual functions the bindings called, and what such calls are to answer.

To be imported where the bindings load relay.cpp in place of NVIDIA's libraries; answers count where RELAY=record.
"""

from __future__ import annotations

import ctypes
import importlib
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

trt: Any = importlib.import_module(os.environ["BINDINGS"])
RELAY = ctypes.CDLL(os.environ["RELAY_LIBRARY"])
RELAY.relay_calls.restype = ctypes.c_size_t
RELAY.relay_kind.restype = ctypes.c_char_p
RELAY.relay_kind.argtypes = RELAY.relay_function.argtypes = [ctypes.c_size_t]
RELAY.relay_argument.restype, RELAY.relay_argument.argtypes = ctypes.c_size_t, [ctypes.c_size_t, ctypes.c_int]
RELAY.relay_unknown.restype, RELAY.relay_unknown.argtypes = None, [ctypes.c_size_t]
RELAY.relay_forget.restype, RELAY.relay_forget.argtypes = None, [ctypes.c_char_p, ctypes.c_int]
RELAY.relay_answer.restype = None
RELAY.relay_answer.argtypes = [
    ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t, ctypes.POINTER(ctypes.c_int64), ctypes.c_int,
]  # fmt: skip

_texts: list[Any] = []  # whose addresses the bindings hold


def calls(since: int = 0) -> list[tuple[str, int, int, int]]:
    """Class, function and the first two arguments of every call from the one numbered `since` on."""
    return [
        (RELAY.relay_kind(index).decode(), RELAY.relay_function(index), *(RELAY.relay_argument(index, which) for which in (1, 2)))
        for index in range(since, RELAY.relay_calls())
    ]


def functions_of(kind: str, call: Callable[[], object]) -> list[int]:
    """The functions of the class `kind` that a call comes to; that it gets no sensible answer yet does not matter."""
    before = RELAY.relay_calls()
    with suppress(TypeError, ValueError, RuntimeError, AttributeError, UnicodeDecodeError):
        call()
    return [function for name, function, *_ in calls(before) if name == kind]


def answer(kind: str, function: int, value: int | str | Sequence[int] = 0, result: str = "") -> None:
    """Tell what a function returns next: a number, a text, dimensions, or an object of the class `result`."""
    dims = value if isinstance(value, (tuple, list)) else ()
    word = 0 if dims else _word(value)  # type: ignore[arg-type]
    RELAY.relay_answer(kind.encode(), function, result.encode(), word, (ctypes.c_int64 * max(len(dims), 1))(*dims), len(dims))


def answer_unknown(value: int | str) -> None:
    """Tell what a function returns that nothing was told about."""
    RELAY.relay_unknown(_word(value))


def _word(value: int | str) -> int:
    if isinstance(value, int):
        return value
    _texts.append(ctypes.create_string_buffer(value.encode()))
    return ctypes.addressof(_texts[-1])
