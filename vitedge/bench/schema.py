"""The dataclasses of a Document in, the JSON Schema of its file out (draft 2020-12).

    Document  ->  schema  ->  docs/bench.schema.json, which `python -m vitedge.bench.schema` prints

A reader in another language goes by it. Knows nothing of what the fields mean but their docstrings.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import types
import typing
from typing import Any

from vitedge.bench.document import CENTILES, SCHEMA, Document

PLAIN = {str: "string", int: "integer", float: "number", bool: "boolean"}


def schema() -> dict[str, Any]:
    """What a file that `vitedge bench --json` writes looks like."""
    found: dict[str, Any] = {}
    _add(Document, found)
    found["Document"]["properties"]["schema"] |= {"const": SCHEMA}
    found["Timed"]["properties"]["centiles_ms"] |= {"minItems": CENTILES, "maxItems": CENTILES}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A benchmark of vitedge",
        "$ref": "#/$defs/Document",
        "$defs": dict(sorted(found.items())),
    }


def _add(kind: type[Any], found: dict[str, Any]) -> None:
    """Describe a dataclass, and those that it holds, in `found`."""
    entry: dict[str, Any] = {}
    found[kind.__name__] = entry
    hints = typing.get_type_hints(kind)
    fields = dataclasses.fields(kind)
    entry |= {
        "type": "object",
        "description": " ".join((inspect.getdoc(kind) or "").split()),
        "properties": {field.name: _typed(hints[field.name], found) for field in fields},
        "required": [field.name for field in fields if field.default is dataclasses.MISSING],
        "additionalProperties": False,
    }


def _typed(hint: Any, found: dict[str, Any]) -> dict[str, Any]:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if hint.__name__ not in found:
            _add(hint, found)
        return {"$ref": f"#/$defs/{hint.__name__}"}
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return {"anyOf": [_typed(one, found) for one in arguments]}
    if hint is type(None):
        return {"type": "null"}
    if origin is dict:
        return {"type": "object", "additionalProperties": _typed(arguments[1], found)}
    if origin is tuple and arguments[-1] is Ellipsis:
        return {"type": "array", "items": _typed(arguments[0], found)}
    if origin is tuple:
        places = [_typed(one, found) for one in arguments]
        return {"type": "array", "prefixItems": places, "minItems": len(places), "maxItems": len(places)}
    return {"type": PLAIN[hint]}


if __name__ == "__main__":
    print(json.dumps(schema(), indent=2))
