"""Where time goes is told of real engines: every Linear, what did not fuse, what stayed in float. No test asserts how long
anything took; that the table adds up is a matter of arithmetic."""

from __future__ import annotations

import io
import json
import platform
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from tests.engines import Made, Silent, edit_manifest
from vitedge.backends.build import build_engine, read_manifest
from vitedge.backends.inspector import parse
from vitedge.backends.layers import Kind, Layer, Profile, module, operator
from vitedge.bench.breakdown import SHOWN, tables
from vitedge.bench.explain import BETWEEN, PARTS, Explanation, by_part, compare, explain, make_explanation, place, title, verdict
from vitedge.errors import EngineError
from vitedge.specs import Recipe, Target

pytest.importorskip("openvino")
pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")

INT8 = platform.machine() in ("x86_64", "AMD64")  # other processors' plug-ins name their kernels otherwise
BLOCKS = [f"blocks.{number}" for number in range(4)]


@pytest.fixture(scope="module")
def both(made: Made) -> dict[str, Explanation]:
    folders = {variant: made.engines["openvino", variant] for variant in ("fp32", "int8")}
    return dict(zip(folders, explain(list(folders.values()), None, 0), strict=True))


def built(graph: onnx.ModelProto, folder: Path) -> Explanation:
    """The explanation of an engine that is made of a changed graph."""
    path = folder / "changed.onnx"
    onnx.save(graph, path)
    (found,) = explain([build_engine(path, Target(), folder)], None, 0)
    return found


def linears_of(found: Explanation) -> dict[str, tuple[str, bool]]:
    entries = [entry.layer for entry in found.layers]
    return {name: (layer.precision, layer.quantized) for layer in entries for name in layer.linears}


@pytest.mark.skipif(not INT8, reason="INT8 kernels of other processors have other names")
def test_every_linear_of_the_graph_is_found_once_and_in_int8(made: Made, both: dict[str, Explanation]) -> None:
    from vitedge.compiler.graph import linears, load

    names = [linear.name for linear in linears(load(made.graphs["fp32"]))]
    listed = [name for entry in both["int8"].layers for name in entry.layer.linears]
    assert listed == names and len(names) == 18
    assert set(linears_of(both["int8"]).values()) == {("int8", True)}
    assert "All 18 Linears that the graph quantizes run in INT8" in both["int8"].findings[0]
    assert linears_of(both["fp32"]) == dict.fromkeys(names, ("fp32", False))
    assert both["fp32"].findings[0].startswith("18 Linears run in fp32 because the graph leaves them so: patch_embed, blocks.0")


@pytest.mark.parametrize("variant", ["fp32", "int8"])
def test_a_table_adds_up_to_the_call(both: dict[str, Explanation], variant: str) -> None:
    found = both[variant]
    assert found.total_ms(lambda entry: True) + found.between_ms == pytest.approx(found.profiled_ms)
    assert sum(layer.ms for layers in by_part(found).values() for layer in layers) == pytest.approx(
        found.profiled_ms - found.between_ms
    )
    assert found.calls > 0 and found.plain_ms > 0 and all(entry.layer.ms >= 0 for entry in found.layers)


@pytest.mark.parametrize("variant", ["fp32", "int8"])
def test_every_layer_is_placed_in_the_model(both: dict[str, Explanation], variant: str) -> None:
    layers = both[variant].layers
    assert list(dict.fromkeys(entry.block for entry in layers)) == ["patch embedding", *BLOCKS, "head"]
    parts = {entry.layer.linears[0]: (entry.block, entry.part) for entry in layers if entry.layer.linears}
    wanted = {"attention.qkv": "q/k/v", "attention.proj": "proj", "mlp.0": "fc1", "mlp.2": "fc2"}
    for name, (block, part) in parts.items():
        if block in BLOCKS:
            assert wanted[name.removeprefix(f"{block}.")] == part
    assert parts["patch_embed"] == ("patch embedding",) * 2 and parts["head"] == ("head",) * 2
    assert {entry.part for entry in layers} <= set(PARTS)
    fused = [entry.block for entry in layers if entry.layer.kind == "attention"]
    loose = [entry.block for entry in layers if entry.layer.kind == "softmax"]
    assert sorted(fused + loose) == BLOCKS  # each has one, whichever way this release of OpenVINO runs it


def test_nodes_of_a_layer_are_nodes_of_the_graph(made: Made, both: dict[str, Explanation]) -> None:
    graph = onnx.load(made.graphs["int8"])
    nodes = {node.name for node in graph.graph.node} | {output.name for output in graph.graph.output}
    origins = [node for entry in both["int8"].layers for node in entry.layer.origins]
    assert set(origins) <= nodes
    norms = {node.name for node in graph.graph.node if node.op_type == "LayerNormalization"}
    assert norms <= set(origins)


def test_a_layer_that_takes_less_than_the_vendor_can_count_is_there_all_the_same(both: dict[str, Explanation]) -> None:
    """OpenVINO reports whole microseconds, and layers below one as not run: the head takes about as long."""
    for found in both.values():
        assert [entry.layer.linears for entry in found.layers if entry.part == "head"].count(("head",)) == 1


def test_a_pair_planted_on_the_residual_stream_is_named(made: Made, tmp_path: Path) -> None:
    from vitedge.compiler.graph import consumers, load
    from vitedge.compiler.qdq import quantize_activation

    graph = load(made.graphs["int8"])
    (residual,) = (node.output[0] for node in graph.graph.node if node.name == "blocks.1/Add")
    quantize_activation(graph, residual, 20.0, consumers(graph)[residual])
    found = built(graph, tmp_path)
    (sentence,) = (text for text in found.findings if residual in text)
    assert f"The Q/DQ pair on {residual!r} fuses with no INT8 kernel" in sentence
    assert "blocks.1.norm2/LayerNormalization" in sentence and "blocks.1/Add.2" in sentence


def test_no_pair_of_our_own_graph_is_called_useless(both: dict[str, Explanation]) -> None:
    assert not [text for found in both.values() for text in found.findings if "fuses with no INT8 kernel" in text]


@pytest.mark.skipif(not INT8, reason="INT8 kernels of other processors have other names")
def test_a_linear_that_runs_in_float_although_the_graph_quantizes_it_is_named(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vitedge.backends import build
    from vitedge.compiler.graph import load, producers

    graph = load(made.graphs["int8"])
    (product,) = (node for node in graph.graph.node if node.name == "blocks.1.mlp.0")
    dequantize = producers(graph)[product.input[0]]
    product.input[0] = producers(graph)[dequantize.input[0]].input[0]  # its weight stays in INT8, its input no longer is
    monkeypatch.setattr(build, "check_quantized", lambda onnx, source: None)  # which would refuse it
    found = built(graph, tmp_path)
    name, (precision, quantized) = "blocks.1.mlp.0", linears_of(found)["blocks.1.mlp.0"]
    assert quantized and precision != "int8"
    assert found.findings[0].startswith("17 of the 18 Linears that the graph quantizes run in INT8")
    assert found.findings[1].startswith(f"1 Linear that the graph quantizes runs in {precision}: {name}; ")


def test_a_linear_that_a_recipe_skips_is_named_with_its_share(made: Made, tmp_path: Path) -> None:
    from vitedge import pipeline
    from vitedge.images import list_images

    graph = Path(shutil.copy(made.graphs["fp32"], tmp_path / "fp32.onnx"))
    recipe = Recipe("skipping", smoothing="none", rounding="nearest", bias_correction=False, skip=("head",), float_type="fp32")
    path = pipeline.quantize_step(graph, list_images(made.images), recipe, tmp_path, Silent())
    (found,) = explain([build_engine(path, Target(), tmp_path)], None, 0)
    (sentence,) = (text for text in found.findings if "leaves it so" in text)
    assert re.fullmatch(r"1 Linear runs in fp32 because the graph leaves it so: head; [\d.e-]+ ms, [\d.]+%\.", sentence)


def test_another_batch_than_the_best_is_explained_as_it_is_run(made: Made) -> None:
    (found,) = explain([made.engines["openvino", "int8"]], 3, 0)
    assert found.batch == 3 and len(linears_of(found)) == 18
    with pytest.raises(EngineError, match="was built for 1 to 16 images at once, not 17"):
        explain([made.engines["openvino", "int8"]], 17, 0)


def test_the_reference_is_not_explained(made: Made) -> None:
    with pytest.raises(EngineError, match="engine of the reference") as caught:
        explain([made.engines["onnxruntime", "int8"]], None, 0)
    assert caught.value.hint and "--target" in caught.value.hint


# Names of other models, and arithmetic


def layer(node: str, kind: Kind = "other", ms: float = 1.0, precision: str = "fp16", quantized: bool = False) -> Layer:
    return Layer(node, "x", kind, precision, ms, (node,), (node,) if kind in ("linear", "convolution") else (), quantized)


@pytest.mark.parametrize(
    ("pattern", "attention", "block"),
    [
        ("blocks.{}.{}", ("attn.qkv", "attn", "attn.proj", "norm2", "mlp.fc1", "mlp.act", "mlp.fc2"), "blocks.{}"),
        (
            "vit.encoder.layer.{}.{}",
            ("attention.attention.query", "attention.attention", "attention.output.dense", "layernorm_after",
             "intermediate.dense", "intermediate.act", "output.dense"),
            "vit.encoder.layer.{}",
        ),
        (
            "encoder.layers.encoder_layer_{}.{}",
            ("self_attention.qkv", "self_attention", "self_attention.out_proj", "ln_2", "mlp.0", "mlp.1", "mlp.3"),
            "encoder.layers.encoder_layer_{}",
        ),
        ("layers.{}.{}", ("0.to_qkv", "0", "0.to_out", "1.norm", "1.net.1", "1.net.2", "1.net.4"), "layers.{}"),
    ],
    ids=["timm", "transformers", "torchvision", "lucidrains"],
)  # fmt: skip
def test_blocks_are_found_under_the_names_of_other_libraries(pattern: str, attention: tuple[str, ...], block: str) -> None:
    kinds: tuple[Kind, ...] = ("linear", "attention", "linear", "norm", "linear", "activation", "linear")
    operators = ("", "/Softmax", "", "/LayerNormalization", "", "/Gelu", "")
    layers = [
        layer(pattern.format(number, name) + op, kind)
        for number in range(2)
        for name, kind, op in zip(attention, kinds, operators, strict=True)
    ]
    placed = place([layer("stem", "convolution"), *layers, layer("norm/LayerNormalization", "norm"), layer("head", "linear")])
    assert [entry.part for entry in placed[1:8]] == ["q/k/v", "attention", "proj", "norm", "fc1", "gelu", "fc2"]
    assert [entry.block for entry in placed[1:-2]] == [block.format(0)] * 7 + [block.format(1)] * 7
    assert [(entry.block, entry.part) for entry in (placed[0], *placed[-2:])] == [
        ("patch embedding", "patch embedding"), ("head", "norm"), ("head", "head")
    ]  # fmt: skip


def test_several_linears_or_convolutions_behind_the_blocks_are_a_decoder() -> None:
    placed = place([layer("b.0.attn/Softmax", "attention"), layer("up.0", "convolution"), layer("up.1", "convolution")])
    assert [entry.part for entry in placed] == ["attention", "decoder", "decoder"]


def test_an_attention_is_of_its_own_block_whatever_it_reads_of_a_merge_before_it() -> None:
    def block(number: int, *read: str) -> list[Layer]:
        attention = replace(layer(f"b.{number}.attn/Softmax", "attention"), origins=(*read, f"b.{number}.attn/Softmax"))
        return [
            layer(f"b.{number}.qkv", "linear"),
            attention,
            layer(f"b.{number}.proj", "linear"),
            layer(f"b.{number}.fc", "linear"),
        ]

    merge = layer("b.0.attn.merge/likeness", "product")
    placed = place([*block(0), merge, *block(1, "b.0.attn.merge/sizes"), layer("norm/restored", "product")])
    parts = ["q/k/v", "attention", "proj", "fc2"]
    assert [entry.part for entry in placed] == [*parts, "merging", *parts, "head"]
    assert [entry.block for entry in placed] == ["b.0"] * 5 + ["b.1"] * 4 + ["head"]


def test_a_model_without_attention_is_explained_all_the_same() -> None:
    placed = place([layer("up", "linear"), layer("norm/LayerNormalization", "norm")])
    assert [(entry.block, entry.part) for entry in placed] == [("model", "other"), ("model", "norm")]


def explanation(made: Made, variant: str, layers: list[Layer], call_ms: float) -> Explanation:
    folder = made.engines["openvino", variant]
    return make_explanation(folder, read_manifest(folder), 1, Profile(tuple(layers), call_ms, call_ms, 9))


def sides(made: Made) -> tuple[Explanation, Explanation]:
    def block(fc1: float, attention: float, kind: str) -> list[Layer]:
        names = {"qkv": 3.0, "proj": 1.0, "fc1": fc1, "fc2": 4.0}
        scale = 2 if kind == "int8" else 1
        q, p, a, b = (layer(f"b.0.{n}", "linear", ms / scale, kind, kind == "int8") for n, ms in names.items())
        return [q, layer("b.0.attn/Softmax", "attention", attention), p, a, b]

    return explanation(made, "fp32", block(4.0, 2.0, "fp32"), 15.0), explanation(made, "int8", block(4.0, 2.5, "int8"), 9.5)


def test_two_engines_are_compared_part_by_part_what_is_gained_most_first(made: Made) -> None:
    first, second = sides(made)
    rows = compare(first, second, lambda entry: entry.part)
    assert [(row.part, row.saved_ms, row.ratio) for row in rows] == [
        ("fc1", 2.0, 2.0), ("fc2", 2.0, 2.0), ("q/k/v", 1.5, 2.0), ("proj", 0.5, 2.0), (BETWEEN, 0.0, 1.0),
        ("attention", -0.5, 0.8),
    ]  # fmt: skip
    assert (rows[0].first_precision, rows[0].second_precision) == ("fp32", "int8")
    assert sum(row.saved_ms for row in rows) == pytest.approx(first.profiled_ms - second.profiled_ms)


def test_the_verdict_has_the_numbers_in_it(made: Made) -> None:
    first, second = sides(made)
    assert verdict(first, second) == (
        "int8 is 1.6 times faster than fp32 (9.5 against 15 ms): Linears 2.0 times faster, all else 1.2 times slower; "
        "37% of int8's time is not in Linears."
    )
    assert verdict(second, first).startswith("fp32 is 1.6 times slower than int8")


def test_engines_of_different_models_are_refused(made: Made, tmp_path: Path) -> None:
    other = made.copy("openvino", "int8", tmp_path)
    card = json.loads((other / "manifest.json").read_text())["card"]
    edit_manifest(other, card=card | {"name": "other"})
    with pytest.raises(EngineError, match="fashion-vit and other are different models"):
        explain([made.engines["openvino", "int8"], other], None, 0.01)


def test_engines_of_different_shape_are_compared_where_they_can_be(made: Made) -> None:
    first, second = sides(made)
    less = explanation(made, "int8", [entry.layer for entry in second.layers if entry.part != "proj"], 9.0)
    (row,) = (row for row in compare(first, less, lambda entry: entry.part) if row.part == "fc2")
    assert row.ratio == 2.0
    gone = [row for row in compare(first, less, lambda entry: entry.part) if row.second_ms == 0 and row.part != BETWEEN]
    assert all(row.ratio is None and row.second_precision == "" for row in gone)


@pytest.mark.parametrize("every", [False, True])
def test_tables_fit_a_terminal_and_add_up(both: dict[str, Explanation], every: bool) -> None:
    found = both["int8"]
    console = Console(width=100, file=io.StringIO())
    with console.capture() as printed:
        for shown in tables([found], every):
            console.print(shown, markup=False)
    lines = printed.get().splitlines()
    assert max(map(len, lines)) <= 100 and not any("…" in line for line in lines if line.startswith("blocks"))
    costs = [re.fullmatch(r"(.*?) +([\d.-]+) +([\d.-]+)", line.rstrip()) for line in lines]
    rows = [(cost[1].split("  ")[0], float(cost[2])) for cost in costs if cost]
    ends = [index for index, (name, _) in enumerate(rows) if name == "a call"]
    for begin, end in zip((0, ends[0] + 1), ends, strict=True):
        assert sum(ms for _, ms in rows[begin:end]) == pytest.approx(rows[end][1], abs=0.0006 * (end - begin))
    shown = ends[1] - ends[0] - 2 - (not every)
    assert shown == (len(found.layers) if every else SHOWN)


def test_numbers_are_whole_in_a_narrow_terminal(made: Made, both: dict[str, Explanation]) -> None:
    console = Console(width=60)
    with console.capture() as printed:
        for shown in [*tables([both["int8"]], True), *tables(list(both.values()), True)]:
            console.print(shown, markup=False)
    cells = [cell for line in printed.get().splitlines() if "  " in line for cell in re.split(r" {2,}", line)]
    assert any(cell.endswith("…") for cell in cells) and not any(re.fullmatch(r"[\d.+-]*…", cell) for cell in cells)


def test_the_findings_of_a_tensorrt_engine_come_from_the_same_analysis(made: Made) -> None:
    text = (Path(__file__).parents[1] / "data" / "inspector" / "detailed_11.json").read_text("utf-8")
    found = explanation(made, "int8", list(parse(text, {"head_myl0_13": 0.5, "_gemm_mha_v2_myl0_5": 1.5})), 4.0)
    said = "\n".join(found.findings)
    for sentence in (
        "All 5 Linears that the graph quantizes run in INT8",
        "1 Linear runs in fp16 because the graph leaves it so: head; 0.5 ms, 12.5%.",
        "The Q/DQ pair on 'add_74' fuses with no INT8 kernel: blocks.0.norm2/LayerNormalization +Q, norm/LayerNormalization +2",
        "1 Q/DQ did not fuse and runs as a layer of its own",
        "Attention is one fused kernel in 1 of 1 blocks, in fp16: 1.5 ms, 37.5%.",
        "3 layers only change a type or a layout",
        "Between its layers the engine spends 2 ms, 50.0%",
    ):
        assert sentence in said
    parts = Counter(entry.part for entry in found.layers)
    assert {part: parts[part] for part in ("q/k/v", "proj", "fc1", "fc2")} == {"q/k/v": 1, "proj": 1, "fc1": 1, "fc2": 1}


def test_attention_in_pieces_is_told_with_its_share(made: Made) -> None:
    pieces = [layer("b.0.attn", "product"), layer("b.0.attn/Softmax", "softmax"), layer("b.0.attn.2", "product")]
    said = " ".join(explanation(made, "int8", pieces, 6.0).findings)
    assert "Attention runs as products and softmaxes of their own in 1 of 1 blocks, in fp16: 3 ms, 50.0%." in said


def test_names_are_taken_apart() -> None:
    cases = {
        "blocks.0/Add.2": ("blocks.0", "Add"),
        "/Concat.2.Pad": ("", "Pad"),
        "blocks.0.attn": ("blocks.0.attn", ""),
        "blocks.0.mlp.2": ("blocks.0.mlp.2", ""),
        "blocks.0.norm1/LayerNormalization": ("blocks.0.norm1", "LayerNormalization"),
    }
    assert {name: (module(name), operator(name)) for name in cases} == cases
    assert title(Layer("vendor's", "x", "other", "fp16", 1.0)) == "vendor's"
