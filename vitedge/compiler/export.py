"""A torch module and its card in, an ONNX file that has been compared with the module out.

    nn.Module -> torch.onnx (opset 20, dynamic batch) -> simplify -> integer input -> compared with torch -> model.onnx

LayerNormalization and Gelu stay single nodes, nodes carry the names of the torch modules they came from, and the
ModelCard travels in the metadata. Knows nothing of quantization or backends.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import io
import itertools
import logging
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto

from vitedge.compiler.activations import open_session
from vitedge.compiler.graph import check_finite, linears, producers, rename_constant, rename_tensor, set_metadata
from vitedge.compiler.merging import merge_tokens
from vitedge.compiler.patches import integer_input
from vitedge.compiler.resolution import resize_input
from vitedge.compiler.simplify import simplify
from vitedge.compiler.work import save_counted
from vitedge.errors import ModelError, first_line
from vitedge.preprocess import input_dtype, input_shape, patches_to_image, write_input
from vitedge.specs import FLOAT, MAX_BATCH, TOLERANCE, ModelCard, Preprocess, Reduction, TensorSpec

OPSET = 20  # the first with Gelu, the last that TensorRT 10.3 documents
OUTPUTS = {"classify": "logits", "embed": "embedding", "dense": "map"}
OUTPUT_HINT = "forward() must return a tensor, or a tuple of tensors, whose first axis alone is the batch"
Image = NDArray[np.uint8]


@dataclasses.dataclass(frozen=True, slots=True)
class Difference:
    """How far ONNX and torch lie apart: the largest absolute difference, as a part of the output's range.

    The range is that of all images of a kind, and zero belongs to it: one number an image has none of its own.
    """

    random: float
    real: float | None

    @property
    def worst(self) -> float:
        """The larger of the two."""
        return float(np.maximum(self.random, self.real or 0.0))  # max() would lose a NaN


def export(
    module: torch.nn.Module,
    card: ModelCard,
    path: Path,
    *,
    images: Iterable[Image] = (),
    tolerance: float = TOLERANCE,
    reduction: Reduction | None = None,
) -> Difference:
    """Write `module` to `path` as ONNX with the integer input of the contract, and return how exact it is.

    images: real pictures, uint8[H, W, 3], compared besides random ones. reduction: what is changed after that comparison. A
    difference above `tolerance` (of the output's range), a module that cannot be exported or reduced, and NaN anywhere are
    ModelErrors, and nothing is written.
    """
    module = module.eval()
    model, card = convert(module, card)
    difference = compare(module, model, card, images)
    if not difference.worst <= tolerance:  # also when it is NaN
        raise ModelError(
            f"the exported model differs from torch by {difference.worst:.1e} of the output's range, more than {tolerance:.0e}",
            hint="look for data-dependent branches in forward(); --tolerance accepts a larger difference",
        )
    if reduction:
        reduce(model, card, reduction)
    save_counted(model, path)
    return difference


def reduce(model: ModelProto, card: ModelCard, reduction: Reduction) -> ModelCard:
    """Let an exported model compute less, in place; returns the card that says so."""
    card = resize_input(model, card, reduction.size) if reduction.size else card
    card = dataclasses.replace(card, merged=merge_tokens(model, reduction.merge_tokens))
    set_metadata(model, card=card, variant=f"{FLOAT}{reduction.suffix}")
    return card


def convert(module: torch.nn.Module, card: ModelCard) -> tuple[ModelProto, ModelCard]:
    """The module as an ONNX graph of integer input, and the card with inputs and outputs filled in."""
    model = _trace(module, card.preprocess)
    _name_nodes(model)
    _name_tensors(model, OUTPUTS[card.task])
    check_finite(model, card.name)
    with _runnable(card.name):
        simplify(model)
    card = integer_input(model, card)
    card = dataclasses.replace(card, outputs=tuple(_spec(output) for output in model.graph.output))
    if card.task == "classify":
        _check_classes(card)
    set_metadata(model, card=card, variant=FLOAT)
    model.producer_name, model.graph.name = "vitedge", card.name
    return model, card


def compare(module: torch.nn.Module, model: ModelProto, card: ModelCard, images: Iterable[Image] = ()) -> Difference:
    """Run both on random pixels at batch 1 and 5, and on `images` one by one."""
    generator = np.random.default_rng(0)
    pixels = [generator.integers(0, 256, (*card.preprocess.size, 3), np.uint8) for _ in range(5)]
    real = iter(images)
    first = next(real, None)
    with _runnable(card.name):
        session = open_session(model, [output.name for output in model.graph.output])
        random = _difference(module, session, card, [pixels[:1], pixels])
        if first is None:
            return Difference(random, None)
        return Difference(random, _difference(module, session, card, ([image] for image in itertools.chain([first], real))))


def run_module(module: torch.nn.Module, card: ModelCard, rows: NDArray[Any]) -> list[NDArray[np.float32]]:
    """Every output of `module` for `rows`, [count, ...] of int8 patches or uint8 pixels as `card` says."""
    with torch.inference_mode():
        answer = module(torch.from_numpy(_normalised(rows, card)))
    tensors = [answer] if isinstance(answer, torch.Tensor) else answer
    if not isinstance(tensors, (tuple, list)) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors):
        raise ModelError(f"forward() of {card.name} returns {type(answer).__name__}", hint=OUTPUT_HINT)
    return [tensor.float().numpy() for tensor in tensors]


def _trace(module: torch.nn.Module, spec: Preprocess) -> ModelProto:
    """torch.onnx.export with a dynamic batch, its chatter silenced and its error made one sentence."""
    example = torch.zeros(2, spec.channels, *spec.size)  # torch.export takes a batch of 1 for a constant
    shapes = ({0: torch.export.Dim("batch", min=1, max=MAX_BATCH)},)
    with _quiet():
        try:
            program = torch.onnx.export(
                module, (example,), dynamo=True, opset_version=OPSET, dynamic_shapes=shapes, verbose=False
            )
        except Exception as error:  # the exporter wraps whatever forward() or a converter raised
            raise ModelError(
                f"torch cannot export {type(module).__name__}: {first_line(error.__cause__ or error)}",
                hint=f"forward() must take one float32[B, {spec.channels}, {spec.size[0]}, {spec.size[1]}], for any B",
            ) from error
    assert program is not None  # None only for the legacy exporter
    model = program.model_proto
    if not model.graph.input[0].type.tensor_type.shape.dim[0].dim_param:  # torch.onnx falls back to a fixed batch in silence
        raise ModelError(
            f"forward() of {type(module).__name__} works for one batch size alone",
            hint="a number, or len(x), in place of x.shape[0] makes it so",
        )
    return model


def _name_nodes(model: ModelProto) -> None:
    """Name each node after the torch module it came from, and drop the exporter's notes, which hold paths of this machine."""
    bases = [_base_name(node) for node in model.graph.node]
    taken = set[str]()
    for node, base in zip(model.graph.node, bases, strict=True):
        others = (f"{base}.{number}" for number in itertools.count(2))  # which may be another module's own name
        node.name = base if base not in taken else next(name for name in others if name not in taken and name not in bases)
        taken.add(node.name)
        del node.metadata_props[:]
    for entry in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        del entry.metadata_props[:]
    del model.graph.metadata_props[:]


def _base_name(node: NodeProto) -> str:
    """The torch module that a node came from, with the operator's name behind it unless the node is the module's product."""
    notes = {entry.key: entry.value for entry in node.metadata_props}
    scopes = ast.literal_eval(notes.get("pkg.torch.onnx.name_scopes", "[]"))
    scope = scopes[-2] if len(scopes) > 1 and not scopes[-2].startswith("_empty_nn_module_stack") else ""
    return scope if scope and node.op_type in ("MatMul", "Gemm", "Conv") else f"{scope}/{node.op_type}"


def _name_tensors(model: ModelProto, output: str) -> None:
    """Name the weights after their Linears, and the outputs after the task."""
    for linear in linears(model):
        rename_constant(model, linear.weight, f"{linear.name}.weight")
    makers = producers(model)
    for index, entry in enumerate(model.graph.output):
        new = output if index == 0 else f"{output}.{index}"
        if entry.name not in makers:
            raise ModelError(
                f"output {index} of the model does not depend on the image", hint="forward() must compute it from its input"
            )
        if new in makers:  # an inner tensor happens to have that name
            rename_tensor(model, new, f"{new}.inner", makers[new])
        rename_constant(model, new, f"{new}.inner")
        rename_tensor(model, entry.name, new, makers[entry.name])
        entry.name = new


def _spec(output: ValueInfoProto) -> TensorSpec:
    dims, dtype = output.type.tensor_type.shape.dim, output.type.tensor_type.elem_type
    if dtype != TensorProto.FLOAT:
        raise ModelError(f"the output {output.name!r} is {TensorProto.DataType.Name(dtype)}, but an engine's outputs are float32")
    if not dims or any(not d.HasField("dim_value") for d in dims[1:]):
        shape = ", ".join(str(d.dim_value) if d.HasField("dim_value") else d.dim_param for d in dims)
        raise ModelError(f"the output {output.name!r} has the shape [{shape}], not [batch, ...]", hint=OUTPUT_HINT)
    return TensorSpec(output.name, (None, *(d.dim_value for d in dims[1:])), "float32")


def _check_classes(card: ModelCard) -> None:
    """Raise a ModelError if the answer of a classifier is not [batch, classes], a label each where there are labels."""
    answer = card.outputs[0]
    if len(answer.shape) != 2:
        shape = ", ".join(str(side) for side in answer.shape[1:])
        raise ModelError(
            f"{card.name} is to classify, but its output {answer.name!r} has the shape [batch, {shape}], not [batch, classes]",
            hint='forward() must return one score a class, or the card name another task: "embed" or "dense"',
        )
    if card.labels and answer.shape[-1] != len(card.labels):
        raise ModelError(f"{card.name} has {answer.shape[-1]} outputs but {len(card.labels)} labels")


def _difference(module: torch.nn.Module, session: Any, card: ModelCard, batches: Iterable[list[Image]]) -> float:
    """The largest absolute difference over batches and outputs, as a part of each output's range with zero in it."""
    apart, extent = np.zeros(len(card.outputs)), np.full(len(card.outputs), 1e-12)
    for images in batches:
        for index, (given, expected) in enumerate(_answers(module, session, card, images)):
            apart[index] = np.maximum(apart[index], np.abs(given - expected).max())  # max() would lose a NaN
            extent[index] = max(extent[index], np.ptp(expected), np.abs(expected).max())
    return float((apart / extent).max())


def _answers(
    module: torch.nn.Module, session: Any, card: ModelCard, images: list[Image]
) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """What ONNX and torch make of a batch, for each output; torch's is finite and of the same shape."""
    rows = np.empty((len(images), *input_shape(card)), input_dtype(card))
    for row, image in zip(rows, images, strict=True):
        write_input(image, card, row)
    references = run_module(module, card, rows)
    given = session.run(None, {session.get_inputs()[0].name: rows})
    for output, a, reference in zip(card.outputs, given, references, strict=True):
        if a.shape != reference.shape or a.shape[:1] != (len(images),):
            shapes = f"{list(a.shape)} in ONNX and {list(reference.shape)} in torch for {len(images)} images"
            raise ModelError(f"the output {output.name!r} has the shape {shapes}", hint=OUTPUT_HINT)
        if not np.isfinite(reference).all():
            raise ModelError(
                f"{card.name} gives NaN or infinite outputs in torch", hint="the checkpoint is damaged or does not fit"
            )
    return list(zip(given, references, strict=True))


def _normalised(rows: NDArray[Any], card: ModelCard) -> NDArray[np.float32]:
    """What torch would have been fed: the pixels of `rows` as normalised float32[B, C, H, W], in the textbook way."""
    spec = card.preprocess
    if card.patch:
        rows = np.stack([patches_to_image(row, card) for row in rows])
    scaled = (rows.astype(np.float32) / 255 - np.array(spec.mean, np.float32)) / np.array(spec.std, np.float32)
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))


@contextlib.contextmanager
def _runnable(name: str) -> Iterator[None]:
    """Make a ModelError of what onnxruntime raises for a graph that it cannot open or run."""
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith("onnxruntime"):  # its exceptions have no type in common
            raise
        raise ModelError(
            f"onnxruntime cannot run {name}: {first_line(error)}",
            hint="forward() must compute in float32: take torch.autocast, .half() and .bfloat16() out of it",
        ) from error


@contextlib.contextmanager
def _quiet() -> Any:
    """Keep the exporter's notes on packages it does not find, and its progress lines, off the terminal."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
