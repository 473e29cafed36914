"""What a user calls a model in, something that answers images out.

    path.py:factory, hf:..., timm:..., torchvision:...  ->  torch, fed normalised floats
    model.onnx, MODEL/VARIANT.onnx                      ->  onnxruntime, exactly as the graph says; can be looked into
    engine directory, MODEL/VARIANT                     ->  its backend

All take the rows that `write_input` makes for their own card. Knows nothing of files of images, or of what is compared.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from vitedge.backends.build import read_source
from vitedge.errors import ModelError, VitEdgeError, first_line, import_package
from vitedge.runtime.engine import find_engine, open_engine
from vitedge.specs import ModelCard
from vitedge.workspace import find_graph, short_path

if TYPE_CHECKING:
    from onnx import ModelProto

Array = NDArray[Any]
Run = Callable[[Array], list[Array]]
TORCH_NAME = re.compile(r"(hf|timm|torchvision):.|.*\.py:.")  # as `load_model` tells them apart


@dataclass(frozen=True, slots=True)
class Side:
    """One of two things to compare.

    open: the names of inner tensors -> what runs input rows and gives [answer, *those tensors], each [count, ...].
    graph: None where there is no inner tensor to name.
    """

    name: str
    card: ModelCard
    open: Callable[[Sequence[str]], Run]
    graph: ModelProto | None = None


@contextmanager
def open_sides(names: Sequence[str], checkpoint: Path | None = None, preprocess: Path | None = None) -> Iterator[list[Side]]:
    """Open each of `names`, and in the end close what has to be closed.

    checkpoint, preprocess: of every torch model among them. What is no model, ONNX file or engine is a VitEdgeError.
    """
    require_torch(names, checkpoint, preprocess)
    with ExitStack() as stack:
        yield [stack.enter_context(_opened(name, checkpoint, preprocess)) for name in names]


def require_torch(names: Sequence[str], checkpoint: Path | None, preprocess: Path | None) -> None:
    """Raise VitEdgeError where one of the files is given, and none of `names` is a torch model that it would be for."""
    if not any(map(TORCH_NAME.match, names)):
        for option, file in (("--checkpoint", checkpoint), ("--preprocess", preprocess)):
            if file is not None:
                raise VitEdgeError(f"{option} {file} is for a torch model, and none is given")


def is_engine_name(name: str) -> bool:
    """Whether a name is of an engine, and neither of a torch model nor of an ONNX file."""
    return not TORCH_NAME.match(name) and Path(name).suffix != ".onnx" and not Path(name).is_file()


@contextmanager
def _opened(name: str, checkpoint: Path | None, preprocess: Path | None) -> Iterator[Side]:
    if TORCH_NAME.match(name):
        yield _torch_side(name, checkpoint, preprocess)
    elif not is_engine_name(name):
        yield _graph_side(find_graph(Path(name)))
    else:
        with open_engine(find_engine(Path(name))) as engine:
            yield Side(short_path(engine.path), engine.manifest.card, lambda tensors: lambda rows: [engine(rows)])


def _torch_side(name: str, checkpoint: Path | None, preprocess: Path | None) -> Side:
    for package in ("torch", "onnx", "onnxscript", "onnxruntime", "safetensors"):
        import_package(package, "compile")
    from vitedge.compiler.export import run_module
    from vitedge.compiler.models import load_model

    module, card = load_model(name, checkpoint, preprocess)

    def run(rows: Array) -> list[Array]:
        with one_sentence("torch", name):
            return [run_module(module, card, rows)[0]]

    return Side(name, card, lambda tensors: run)


def _graph_side(path: Path) -> Side:
    source = read_source(path)
    for package in ("onnx", "onnxruntime"):
        import_package(package, "compile")
    from vitedge.compiler import activations, graph

    name, model = short_path(path), graph.load(path)
    answer = model.graph.output[0].name

    def open_graph(tensors: Sequence[str]) -> Run:
        wanted = list(dict.fromkeys([answer, *tensors]))  # the last layer's output may be the answer itself
        with one_sentence("onnxruntime", name):
            session = activations.open_session(model, wanted, optimize=False)

        def run(rows: Array) -> list[Array]:
            with one_sentence("onnxruntime", name):
                values = dict(zip(wanted, session.run(wanted, {session.get_inputs()[0].name: rows}), strict=True))
            return [values[tensor] for tensor in (answer, *tensors)]

        return run

    return Side(name, source.card, open_graph, model)


@contextmanager
def one_sentence(runtime: str, name: str) -> Iterator[None]:
    """Make a ModelError of whatever a runtime raises for a model that it cannot run."""
    try:
        yield
    except VitEdgeError:
        raise
    except Exception as error:
        raise ModelError(f"{runtime} cannot run {name}: {first_line(error)}", hint="export the model again") from error
