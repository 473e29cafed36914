"""What lies between two forms of a model, against direct computation on a small trained one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console

pytest.importorskip("torch")
pytest.importorskip("openvino")

from onnx import ModelProto, TensorProto, helper

from tests.engines import CHECKPOINT, IMAGES, MODEL, Made, quantize_plainly, sqnr_db
from tests.models import float_graph, run_graph
from vitedge.bench.accuracy import judge
from vitedge.bench.losses import end_to_end, layer_table
from vitedge.bench.sides import Side, open_sides
from vitedge.bench.verify import Energies, LayerLoss, Verification, check_sqnr, verify
from vitedge.compiler import graph
from vitedge.compiler.calibrate import load_table
from vitedge.compiler.layers import find_layers
from vitedge.compiler.quantize import prepare
from vitedge.errors import ModelError, VitEdgeError
from vitedge.images import decode, list_images
from vitedge.preprocess import input_dtype, input_shape, write_input
from vitedge.runtime.engine import open_engine
from vitedge.specs import ModelCard, Preprocess

FEW = 6
Change = Callable[[ModelProto], None]


@pytest.fixture(scope="module")
def plain(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An INT8 graph without any rewrite."""
    return quantize_plainly(made, tmp_path_factory.mktemp("plain"))


def compared(made: Made, given: object, reference: object, count: int = FEW, **options: Any) -> Verification:
    with open_sides([str(given), str(reference)], **options) as (one, other):
        return verify(one, other, list_images(made.images)[:count])


def rows(made: Made, count: int = FEW) -> list[NDArray[np.int8]]:
    card = graph.model_card(graph.load(made.graphs["fp32"]))
    result = [np.empty((1, *input_shape(card)), input_dtype(card)) for _ in range(count)]
    for row, file in zip(result, list_images(made.images), strict=False):
        write_input(decode(file.path), card, row[0])
    return result


def tensors(path: Path, names: list[str], made: Made) -> dict[str, NDArray[np.float32]]:
    """The values of inner tensors for all images, one image after the other."""
    model = graph.load(path)
    parts = [run_graph(model, row, names) for row in rows(made)]
    return {name: np.concatenate(values) for name, values in zip(names, zip(*parts, strict=True), strict=True)}


def changed(path: Path, folder: Path, change: Change) -> Path:
    """A copy of a graph with a change."""
    model = graph.load(path)
    change(model)
    graph.save(model, folder / "changed.onnx")
    return folder / "changed.onnx"


def test_the_answers_equal_their_direct_computation(made: Made) -> None:
    found = compared(made, made.graphs["int8"], made.graphs["fp32"])
    given, exact = (tensors(made.graphs[name], ["logits"], made)["logits"].astype(np.float64) for name in ("int8", "fp32"))
    assert found.images == FEW
    assert found.sqnr_db == pytest.approx(sqnr_db(exact, given), abs=1e-3)
    assert found.cosine == pytest.approx((exact * given).sum() / np.linalg.norm(exact) / np.linalg.norm(given), abs=1e-7)
    assert found.largest == pytest.approx(np.abs(given - exact).max(), abs=1e-6)
    assert found.agreement == pytest.approx(100 * (given.argmax(1) == exact.argmax(1)).mean())
    each = [sqnr_db(b, a) for a, b in zip(given, exact, strict=True)]
    assert found.worst_db == pytest.approx(min(each), abs=1e-3)
    assert found.worst_image == str(list_images(made.images)[int(np.argmin(each))].path)
    assert 20 < (found.sqnr_db or 0) < 60


def test_the_loss_up_to_each_layer_equals_its_direct_computation(made: Made, plain: Path) -> None:
    found = compared(made, plain, made.graphs["fp32"])
    names = [loss.tensor for loss in found.layers]
    given, exact = (tensors(path, names, made) for path in (plain, made.graphs["fp32"]))
    assert [loss.name for loss in found.layers] == [layer.name for layer in find_layers(graph.load(made.graphs["fp32"]))]
    assert not found.unmatched
    for loss in found.layers:
        assert loss.sqnr_db == pytest.approx(sqnr_db(exact[loss.tensor], given[loss.tensor]), abs=0.01), loss.name


def test_the_own_loss_of_a_layer_leaves_out_what_was_lost_before(made: Made, plain: Path) -> None:
    found = compared(made, plain, made.graphs["fp32"])
    model = graph.load(made.graphs["fp32"])
    layers, weights = {layer.name: layer for layer in find_layers(model)}, graph.constants(model)
    for name in ("blocks.0.mlp.2", "blocks.2.attention.qkv"):
        layer = layers[name]
        *_, product, bias = layer.nodes
        given = tensors(plain, [layer.input, layer.output], made)
        bias_name = next(part for part in bias.input if part in weights)
        float_ = given[layer.input] @ weights[product.input[1]] + weights[bias_name]
        loss = next(loss for loss in found.layers if loss.name == name)
        assert loss.own_db == pytest.approx(sqnr_db(float_, given[layer.output]), abs=0.02)
        assert (loss.own_db or 0) > (loss.sqnr_db or 0)
    assert found.layers[0].own_db == pytest.approx(found.layers[0].sqnr_db)  # nothing comes before the first


def test_an_exact_rewrite_loses_nothing_though_it_changes_tensors(made: Made, tmp_path: Path) -> None:
    table = load_table(made.root / "calibration" / "scales" / "fashion-vit.int8.json")
    assert table.smoothing
    smoothed = prepare(graph.load(made.graphs["fp32"]), table.recipe, table.smoothing)
    graph.save(smoothed, tmp_path / "smoothed.onnx")
    found = compared(made, tmp_path / "smoothed.onnx", made.graphs["fp32"])
    assert min(value or 0 for loss in found.layers for value in (loss.sqnr_db, loss.own_db)) > 90
    assert found.unmatched and set(found.unmatched) <= {name for loss in found.layers for name in loss.within}


def test_a_layer_that_was_damaged_stands_out(made: Made, plain: Path, tmp_path: Path) -> None:
    def damage(model: ModelProto) -> None:
        weight = graph.constants(model)["blocks.1.mlp.0.weight.int8"]
        graph.put_constant(model, "blocks.1.mlp.0.weight.int8", weight // 16 * 16)

    found = compared(made, changed(plain, tmp_path, damage), made.graphs["fp32"])
    assert min(found.layers, key=lambda loss: loss.own_db or 0).name == "blocks.1.mlp.0"
    whole = compared(made, plain, made.graphs["fp32"])
    before = [loss.name for loss in whole.layers].index("blocks.1.mlp.0")
    assert found.layers[:before] == whole.layers[:before]


def test_a_graph_is_as_near_to_itself_as_can_be(made: Made) -> None:
    found = compared(made, made.graphs["int8"], made.graphs["int8"])
    assert (found.cosine, found.largest, found.agreement) == (pytest.approx(1), 0, 100)
    for value in (found.sqnr_db, *(loss.sqnr_db for loss in found.layers)):
        assert value == pytest.approx(144.5, abs=0.05)
    assert all((loss.own_db or 0) > 110 for loss in found.layers)


def test_tensors_of_another_name_are_not_compared_but_listed(made: Made, plain: Path, tmp_path: Path) -> None:
    layers = {layer.name: layer for layer in find_layers(graph.load(plain))}

    def rename(model: ModelProto) -> None:
        makers = graph.producers(model)
        for tensor in (layers["blocks.0.mlp.0"].output, layers["blocks.1.attention.qkv"].input):
            graph.rename_tensor(model, tensor, f"{tensor}.smoothed", makers[tensor])

    found = compared(made, changed(plain, tmp_path, rename), made.graphs["fp32"])
    assert found.unmatched == ("blocks.0.mlp.0",)
    losses = {loss.name: loss for loss in found.layers}
    assert losses.keys() == layers.keys() - {"blocks.0.mlp.0"}
    assert {name: loss.within for name, loss in losses.items() if loss.within} == {}
    assert all(loss.own_db is not None for loss in losses.values())


def test_torch_and_its_float_graph_are_one(made: Made) -> None:
    found = compared(made, made.graphs["fp32"], MODEL, checkpoint=CHECKPOINT)
    assert (found.sqnr_db or 0) > 100 and found.agreement == 100
    assert (found.layers, found.unmatched) == ((), ())
    assert (compared(made, MODEL, made.graphs["fp32"]).sqnr_db or 0) < 10  # without its weights it is another model


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_engines_are_compared_as_bench_compares_them(made: Made, backend: str) -> None:
    folders = [made.engines[backend, variant] for variant in ("int8", "fp32")]
    found = compared(made, *folders, IMAGES)
    with open_engine(folders[0]) as int8, open_engine(folders[1]) as fp32:
        _, accuracy = judge([fp32, int8], list_images(made.images))
    assert found.sqnr_db == pytest.approx(accuracy.sqnr_db, abs=0.2)  # batches round otherwise than single images
    assert found.agreement == accuracy.agreement and found.layers == ()


def test_an_engine_is_held_against_the_graph_that_it_was_built_from(made: Made) -> None:
    assert (compared(made, made.engines["onnxruntime", "int8"], made.graphs["int8"]).sqnr_db or 0) > 60
    assert (compared(made, made.engines["openvino", "fp32"], made.graphs["fp32"]).sqnr_db or 0) > 100


def test_files_that_cannot_be_decoded_are_noted(made: Made, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    files = [*list_images(tmp_path), *list_images(made.images)[:2]]
    notes: list[str] = []
    told: list[float] = []
    with open_sides([str(made.graphs["fp32"])] * 2) as (one, other):
        found = verify(one, other, files, notes=notes, progress=told.append)
        assert found.images == 2 and len(notes) == 1 and "broken.png" in notes[0]
        assert told == sorted(told) and told[-1] == 1
        with pytest.raises(VitEdgeError, match="none of 1 images"):
            verify(one, other, files[:1])


SPEC = Preprocess((4, 4), (0.0,) * 3, (1.0,) * 3)


def sqrt_graph(folder: Path) -> Path:
    """Pixels less 100, the square root, a Linear "head": NaN for a dark image."""
    nodes = [
        helper.make_node("Cast", ["x"], ["f"], to=TensorProto.FLOAT), helper.make_node("Flatten", ["f"], ["flat"]),
        helper.make_node("Sub", ["flat", "hundred"], ["less"]), helper.make_node("Sqrt", ["less"], ["root"], name="Sqrt"),
        helper.make_node("MatMul", ["root", "w"], ["y"], name="head"),
    ]  # fmt: skip
    model = float_graph(nodes, {"hundred": np.float32(100), "w": np.eye(48, 3, dtype=np.float32)}, [4, 4, 3])
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3]))
    graph.set_metadata(model, card=ModelCard("root", "embed", SPEC), variant="fp32")
    graph.save(model, folder / "root.onnx")
    return folder / "root.onnx"


def test_values_that_are_not_finite_name_the_side_the_tensor_and_the_image(tmp_path: Path) -> None:
    path = sqrt_graph(tmp_path)
    for name, grey in (("bright", 200), ("dark", 20)):
        Image.fromarray(np.full((4, 4, 3), grey, np.uint8)).save(tmp_path / f"{name}.png")
    with open_sides([str(path)] * 2) as (one, other):
        assert verify(one, other, list_images(tmp_path)[:1]).agreement is None  # it is no classifier
        with pytest.raises(ModelError, match=r"root.onnx gives values of 'root' that .* for .*dark.png") as caught:
            verify(one, other, list_images(tmp_path))
        assert caught.value.hint
        blind = dataclasses.replace(one, graph=None)
        with pytest.raises(ModelError, match=r"root.onnx gives values that .* for .*dark.png"):
            verify(blind, other, list_images(tmp_path))


def answering(shape: tuple[int, ...], card: ModelCard) -> Side:
    return Side(f"of {shape}", card, lambda tensors: lambda rows: [np.ones(shape, np.float32)])


def test_sides_that_answer_different_questions_are_refused(made: Made) -> None:
    card = ModelCard("some", "embed", SPEC)
    other = dataclasses.replace(card, task="dense", preprocess=dataclasses.replace(SPEC, mean=(0.5, 0.0, 0.0)))
    with pytest.raises(VitEdgeError, match=r"task is embed and dense, mean is .0.0, .* and .0.5") as caught:
        verify(answering((1, 3), card), answering((1, 3), other), list_images(made.images))
    assert "--preprocess" in str(caught.value.hint)
    with pytest.raises(ModelError, match=r"answers with \[1, 3\] and .* with \[1, 4\]"):
        verify(answering((1, 3), card), answering((1, 4), card), list_images(made.images))


def test_a_reference_of_zeros_has_no_sqnr() -> None:
    energies = Energies()
    energies.add(np.ones((1, 3), np.float32), np.zeros((1, 3), np.float32))
    assert (energies.sqnr_db, energies.cosine, energies.largest) == (None, None, 1)


FOUND = Verification("int8", "fp32", 8, 20.0, 15.04, "[a].png", 0.99, 0.25, 87.5, (), ())


def test_a_bound_on_the_sqnr_is_held() -> None:
    check_sqnr(FOUND, 20.0)
    for least in (20.1, float("nan")):
        with pytest.raises(VitEdgeError, match=r"the SQNR of int8 against fp32 is 20.0 dB, below") as caught:
            check_sqnr(FOUND, least)
        assert caught.value.hint
    with pytest.raises(VitEdgeError, match="not known"):
        check_sqnr(dataclasses.replace(FOUND, sqnr_db=None), 0)


def test_one_line_says_what_is_known_and_no_more() -> None:
    line = "8 images: SQNR 20.0 dB (worst: 15.0 dB, [a].png), cosine 0.990000, largest difference 0.25, same top-1 for 87.50%"
    assert end_to_end(FOUND) == line
    bare = dataclasses.replace(FOUND, images=1, sqnr_db=None, worst_db=None, cosine=None, agreement=None)
    assert end_to_end(bare) == "1 image: SQNR – dB, largest difference 0.25"


def test_the_table_begins_with_the_layer_that_loses_most_by_itself() -> None:
    layers = [LayerLoss("a", "", 30.0, 40.0), LayerLoss("b", "", 20.0, None), LayerLoss("c", "", 25.0, 33.3)]
    console = Console(width=80)
    with console.capture() as captured:
        console.print(layer_table(layers, 9))
    lines = [line.split() for line in captured.get().splitlines()]
    assert lines[1:] == [["3", "c", "33.3", "25.0"], ["1", "a", "40.0", "30.0"], ["2", "b", "–", "20.0"]]
    assert layer_table(layers, 1).row_count == 1


def test_files_for_a_torch_model_need_one(made: Made) -> None:
    graphs = [str(made.graphs["int8"]), str(made.graphs["fp32"])]
    for options in ({"checkpoint": CHECKPOINT}, {"preprocess": Path("p.toml")}):
        with pytest.raises(VitEdgeError, match="is for a torch model, and none is given"), open_sides(graphs, **options):
            pass


def test_a_module_or_graph_that_cannot_run_is_one_sentence(made: Made, tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text(
        "from torch import nn\nfrom vitedge import ModelCard, Preprocess\n"
        "class Bad(nn.Module):\n    def forward(self, images):\n        return images.reshape(7, 7)\n"
        "def bad():\n    return Bad(), ModelCard('bad', 'embed', Preprocess((4, 6), (0.5,) * 3, (0.5,) * 3))\n"
    )
    with open_sides([f"{tmp_path / 'bad.py'}:bad"] * 2) as (one, other), pytest.raises(ModelError, match=r"torch cannot run"):
        verify(one, other, list_images(made.images)[:1])

    def unknown(model: ModelProto) -> None:
        model.graph.node[-1].domain = "nobody"
        model.opset_import.append(helper.make_opsetid("nobody", 1))

    path = changed(made.graphs["fp32"], tmp_path, unknown)
    with open_sides([str(path)] * 2) as (one, other), pytest.raises(ModelError, match=r"onnxruntime cannot run .*changed.onnx"):
        verify(one, other, list_images(made.images)[:1])
