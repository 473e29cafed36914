"""A model and a Recipe in, the Linears and tensors that it quantizes out. Looks, and changes nothing."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from fnmatch import fnmatch

from onnx import ModelProto

from vitedge.compiler.attention import attention_tensors
from vitedge.compiler.graph import Linear, linears, producers
from vitedge.errors import ModelError
from vitedge.specs import Recipe


def quantized_activations(model: ModelProto, recipe: Recipe) -> list[str]:
    """The tensors that get a scale under `recipe`, in execution order."""
    integer = integer_tensors(model)
    read = [linear.input for linear in chosen_linears(model, recipe) if linear.input not in integer]
    return list(dict.fromkeys(read + (attention_tensors(model) if recipe.attention else [])))


def chosen_linears(model: ModelProto, recipe: Recipe) -> list[Linear]:
    """The Linears that `recipe` quantizes; none at all, or a pattern in `skip` or `int4` that fits none, is a ModelError."""
    found = linears(model)
    for verb, patterns in (("skips", recipe.skip), ("gives 4 bits to", recipe.int4)):
        for pattern in patterns:
            if not any(fnmatch(linear.name, pattern) for linear in found):
                raise ModelError(f"the recipe {verb} {pattern!r}, but no Linear has such a name", hint=_similar(pattern, found))
    chosen = [linear for linear in found if not any(fnmatch(linear.name, pattern) for pattern in recipe.skip)]
    if not chosen:
        what = f"the recipe skips every one of its {len(found)} Linears" if found else "it has no Linear"
        raise ModelError(
            f"there is nothing to quantize in the model: {what}", hint="is it a Vision Transformer, exported in FP32?"
        )
    return chosen


def _similar(pattern: str, found: Sequence[Linear]) -> str:
    """A hint: the names most like `pattern`, and the first and last of all."""
    names = [linear.name for linear in found]
    near = [name for name in names if name.endswith(pattern)] or difflib.get_close_matches(pattern, names, 3, 0.4)
    meant = f"did you mean {' or '.join(map(repr, near[:3]))}? " if near else ""
    return f"{meant}The {len(names)} names go from {names[0]} to {names[-1]}" if names else "the model has no Linear"


def integer_tensors(model: ModelProto) -> set[str]:
    """Tensors that come straight out of int8: the engine's own input."""
    return {name for name, node in producers(model).items() if node.op_type == "DequantizeLinear"}
