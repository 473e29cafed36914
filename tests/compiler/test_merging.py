"""Token merging equals the paper's method in torch, keeps what lies behind the blocks, and is quantized like any model."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from onnx import ModelProto, helper
from PIL import Image
from torch import Tensor, nn

from examples.fashion_mnist.dataset import read_idx
from tests.compiler.families import Exported
from tests.compiler.tome import Merged, merged
from tests.engines import CHECKPOINT, FASHION, MODEL, Silent, write_images
from tests.models import HEADS, WIDTH, Block, engine_rows, operators, random_images, run_graph, torch_input
from vitedge import cli, pipeline
from vitedge.backends.build import build_engine, read_source
from vitedge.bench.explain import by_part, explain
from vitedge.compiler import graph
from vitedge.compiler.calibrate import calibrate
from vitedge.compiler.export import convert, reduce
from vitedge.compiler.merging import merge_tokens
from vitedge.compiler.models import load_model
from vitedge.compiler.precision import convert as to_type
from vitedge.compiler.quantize import quantize
from vitedge.compiler.smooth import prove
from vitedge.compiler.work import count_work, total
from vitedge.errors import ModelError, VitEdgeError
from vitedge.images import list_images
from vitedge.runtime.engine import open_engine
from vitedge.specs import ModelCard, Preprocess, Recipe, Reduction, Target, reduction_of
from vitedge.workspace import BUILTIN_RECIPES

FOCUS = Path(__file__).parents[2] / "examples" / "focus"
WEIGHTS = FOCUS / ".cache" / "focus.safetensors"
SPREAD = 3e-7  # cosines that lie nearer to each other may be ranked otherwise by another order of additions
PREPROCESS = Preprocess((48, 40), (0.5,) * 3, (0.3,) * 3)


class Plain(nn.Module):
    """A ViT of 30 patches that answers with what `answer` makes of its tokens [B, prefix + 30, WIDTH]."""

    def __init__(self, prefix: int, answer: Callable[[Tensor], Any], depth: int = 3) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, WIDTH, 8, 8)
        self.prefix = nn.Parameter(torch.randn(1, prefix, WIDTH))
        self.positions = nn.Parameter(torch.randn(1, 30, WIDTH))
        self.blocks = nn.Sequential(*(Block() for _ in range(depth)))
        self.norm, self.answer = nn.LayerNorm(WIDTH), answer

    def embed(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images).flatten(2).transpose(1, 2) + self.positions
        return torch.cat([self.prefix.expand(x.shape[0], -1, -1), x], 1) if self.prefix.shape[1] else x

    def forward(self, images: Tensor) -> Any:
        return self.answer(self.norm(self.blocks(self.embed(images))))


class Tapped(Plain):
    """The same, which answers with the tokens behind each block, too."""

    def forward(self, images: Tensor) -> Any:
        x, taps = self.embed(images), []
        for block in self.blocks:
            x = block(x)
            taps.append(x)
        return tuple(taps)


class Around(Plain):
    """The same with a connection around its blocks."""

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images)
        y = self.blocks[0](x)
        return self.norm(self.blocks[2](self.blocks[1](y) + y))[:, 0]


class Windowed(Plain):
    """The same whose blocks look at six tokens at a time."""

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images)
        for block in self.blocks:
            x = x + block.attention(block.norm1(x).unflatten(1, (5, 6)).flatten(0, 1)).unflatten(0, (-1, 5)).flatten(1, 2)
        return x[:, 0]


class Positioned(Plain):
    """The same with positions in each block."""

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images)
        for block in self.blocks:
            x = block(x + self.positions)
        return x[:, 0]


class Mixer(nn.Module):
    """No attention at all."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed, self.head = nn.Conv2d(3, WIDTH, 8, 8), nn.Linear(WIDTH, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.patch_embed(images).flatten(2).mean(2))


def exported(module: nn.Module, preprocess: Preprocess = PREPROCESS) -> tuple[ModelProto, ModelCard]:
    return convert(module.eval(), ModelCard("plain", "embed", preprocess))


def plain(prefix: int, answer: Callable[[Tensor], Any], kind: type[Plain] = Plain) -> Plain:
    with torch.random.fork_rng():
        torch.manual_seed(prefix)
        return kind(prefix, answer).eval().requires_grad_(False)


def merging(model: ModelProto, count: int | tuple[int, ...]) -> tuple[ModelProto, tuple[int, ...]]:
    copy = graph.copy_of(model)
    return copy, merge_tokens(copy, count)


def reference(module: Any, images: Tensor, heads: int, counts: tuple[int, ...], prefix: int) -> Merged:
    """What the paper's method makes of a batch; its decisions must not hang by a hair, or equality would be luck."""
    with torch.inference_mode():
        embed = getattr(module, "embed", None)
        if embed is None:
            x = module.patch_embed(images).flatten(2).transpose(1, 2)
            x = torch.cat([module.class_token.expand(len(x), -1, -1), x], 1) + module.positions
        else:
            x = embed(images)
        found = merged(x, list(module.blocks), heads, counts, prefix)
    assert found.margin > SPREAD
    return found


@pytest.fixture(scope="module")
def fashion() -> tuple[nn.Module, ModelProto, ModelCard]:
    module, card = load_model(MODEL, CHECKPOINT)
    model, card = convert(module.eval().requires_grad_(False), card)
    return module, model, card


def clothes(count: int) -> NDArray[np.uint8]:
    """Training images of Fashion-MNIST, uint8[count, 28, 28, 1]."""
    return read_idx(FASHION / "data" / "train1k-images-idx3-ubyte.gz")[:count, ..., None]


@pytest.mark.parametrize("count", [1, 3, 8, 20, (0, 12), (5, 0, 0, 9)])
def test_a_classifier_equals_the_papers_method(fashion: tuple[Any, ModelProto, ModelCard], count: int | tuple[int, ...]) -> None:
    module, model, card = fashion
    images = clothes(4)
    copy, counts = merging(model, count)
    found = reference(module, torch_input(images, card.preprocess), 3, counts, 1)
    assert found.tokens.shape[1] == 50 - sum(counts)
    expected = module.head(module.norm(found.tokens[:, 0])).numpy()
    (given,) = run_graph(copy, engine_rows(images, card))
    assert np.abs(given - expected).max() < 1e-4
    (whole,) = run_graph(model, engine_rows(images, card))
    assert np.abs(whole - expected).max() > 1e-2  # or the equality would say nothing


READERS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "class": lambda x, prefix: x[:, 0],
    "mean": lambda x, prefix: x.mean(1),
    "patches": lambda x, prefix: x[:, prefix:].mean(1),
    "tokens": lambda x, prefix: x,
}


@pytest.fixture(scope="module")
def prefixed() -> Callable[[int], tuple[Plain, ModelProto, ModelCard]]:
    """A ViT with so many tokens in front of its patches, and one output for each of READERS."""

    def make(prefix: int) -> tuple[Plain, ModelProto, ModelCard]:
        module = plain(prefix, lambda x: tuple(read(x, prefix) for read in READERS.values()))
        return module, *exported(module)

    return cache(make)


@pytest.mark.parametrize("prefix", [0, 1, 4])
@pytest.mark.parametrize("reader", READERS)
def test_any_prefix_and_any_reader_of_tokens(
    prefix: int, reader: str, prefixed: Callable[[int], tuple[Plain, ModelProto, ModelCard]]
) -> None:
    module, model, card = prefixed(prefix)
    alone = graph.copy_of(model)
    output = alone.graph.output[list(READERS).index(reader)]
    del alone.graph.output[:]
    alone.graph.output.append(output)
    graph.prune(alone)
    images = random_images(3, card.preprocess)
    copy, counts = merging(alone, (4, 0, 5))
    found = reference(module, torch_input(images, card.preprocess), HEADS, counts, prefix)
    expected = READERS[reader](module.norm(found.restored), prefix).numpy()
    (given,) = run_graph(copy, engine_rows(images, card))
    assert given.shape == expected.shape and np.abs(given - expected).max() < 1e-4
    restored = any(node.name.endswith("/restored") for node in copy.graph.node)
    assert restored == (reader == "tokens" or (reader, prefix) == ("class", 0))  # a first token that may be merged


def test_all_readers_at_once(prefixed: Callable[[int], tuple[Plain, ModelProto, ModelCard]]) -> None:
    module, model, card = prefixed(1)
    images = random_images(2, card.preprocess)
    copy, counts = merging(model, 4)
    found = reference(module, torch_input(images, card.preprocess), HEADS, counts, 1)
    for read, given in zip(READERS.values(), run_graph(copy, engine_rows(images, card)), strict=True):
        assert np.abs(given - read(module.norm(found.restored), 1).numpy()).max() < 1e-4


def test_tokens_tapped_between_blocks_are_restored() -> None:
    module = plain(1, lambda x: x, Tapped)
    model, card = exported(module)
    images = random_images(2, card.preprocess)
    copy, counts = merging(model, 3)
    x = torch_input(images, card.preprocess)
    for depth, given in enumerate(run_graph(copy, engine_rows(images, card)), 1):
        found = merged(module.embed(x), list(module.blocks)[:depth], HEADS, counts[:depth], 1)
        assert found.margin > SPREAD and np.abs(given - found.restored.numpy()).max() < 1e-4


class Tokens(nn.Module):
    """What the focus example makes of an image before its decoder: all tokens, or the saliency that its decoder sees in them."""

    def __init__(self, vit: Any) -> None:
        super().__init__()
        self.vit, self.blocks = vit, vit.blocks

    def embed(self, images: Tensor) -> Tensor:
        x = self.vit.patch_embed(images).flatten(2).transpose(1, 2)
        return torch.cat([self.vit.class_token.expand(x.shape[0], -1, -1), x], 1) + self.vit.positions

    def forward(self, images: Tensor) -> Tensor:
        return self.vit.norm(self.blocks(self.embed(images)))


def focus_vit(**sizes: int) -> Any:
    """The focus example's module, untrained, in other sizes where they are given."""
    spec = importlib.util.spec_from_file_location("focus_model", FOCUS / "model.py")
    assert spec and spec.loader
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    vars(example).update(sizes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vit = example.FocusViT()
        nn.init.normal_(vit.positions)
        nn.init.normal_(vit.class_token)
    return vit.eval().requires_grad_(False)


def test_a_vit_of_real_width_equals_the_papers_method() -> None:
    """Two blocks of width 384 on 197 tokens, as a ViT-S/16 has."""
    module = Tokens(focus_vit(DEPTH=2, PATCH=16, GRID=14))
    model, card = exported(module, Preprocess((224, 224), (0.5,) * 3, (0.3,) * 3))
    images = random_images(2, card.preprocess)
    copy, counts = merging(model, (40, 17))
    found = reference(module, torch_input(images, card.preprocess), 6, counts, 1)
    (given,) = run_graph(copy, engine_rows(images, card))
    assert np.abs(given - module.vit.norm(found.restored).numpy()).max() < 1e-4


@pytest.mark.skipif(not WEIGHTS.exists(), reason="examples/focus/fetch.py has not been run")
def test_a_trained_vit_with_a_decoder_equals_the_papers_method() -> None:
    module, card = load_model(f"{FOCUS / 'model.py'}:focus", WEIGHTS)
    model, card = convert(module.eval().requires_grad_(False), card)
    images = np.stack([resized(path, card) for path in sorted((FOCUS / ".cache" / "judge").iterdir())[::20]])
    copy, counts = merging(model, 13)
    found = reference(Tokens(module), torch_input(images, card.preprocess), 6, counts, 1)
    x = module.decoder(module.norm(found.restored)[:, 1:].transpose(1, 2).unflatten(2, (16, 16)))
    expected = nn.functional.interpolate(x, size=(224, 224), mode="bilinear", align_corners=False).sigmoid().numpy()
    (given,) = run_graph(copy, engine_rows(images, card))
    assert np.abs(given - expected).max() < 1e-4


def resized(path: Path, card: ModelCard) -> NDArray[np.uint8]:
    return np.asarray(Image.open(path).convert("RGB").resize(card.preprocess.size[::-1], Image.Resampling.BILINEAR))


@pytest.mark.parametrize("name", ["vit", "deit", "dinov2", "clip", "siglip", "fashion-mnist"])
def test_equal_tokens_merge_without_a_trace(name: str, family: Callable[[str], Exported]) -> None:
    """On one colour and without positions all patches are equal, so that merging them is exact, whatever reads them."""
    exported = family(name)
    model = graph.copy_of(exported.model)
    for tensor, value in graph.constants(model).items():
        if value.ndim == 3 and value.shape[1] > 2 and value.dtype == np.float32:  # positions, with the class token or without
            flat = value.copy()
            flat[:, -(value.shape[1] // 2) :] = flat[:, -1:]
            flat[:, 1:] = flat[:, -1:]
            graph.put_constant(model, tensor, flat)
    rows = engine_rows(
        np.full((2, *exported.card.preprocess.size, exported.card.preprocess.channels), 40, np.uint8), exported.card
    )
    rows[1] = -90
    copy, counts = merging(model, 5)
    assert all(counts)
    for before, after in zip(run_graph(model, rows), run_graph(copy, rows), strict=True):
        assert np.abs(before - after).max() < 1e-4 * np.ptp(before)


def test_nothing_merged_is_the_same_graph(fashion: tuple[Any, ModelProto, ModelCard]) -> None:
    copy = graph.copy_of(fashion[1])
    for nothing in (0, (0, 0), ()):
        assert merge_tokens(copy, nothing) == () and copy == fashion[1]


def test_at_most_half_of_the_tokens_merge_and_numbers_begin_again(fashion: tuple[Any, ModelProto, ModelCard]) -> None:
    assert merging(fashion[1], 30)[1] == (24, 12, 6, 3)
    assert merging(fashion[1], (0, 7))[1] == (0, 7, 0, 7)
    assert merging(fashion[1], (9, 0, 1))[1] == (9, 0, 1, 9)


@pytest.mark.parametrize(
    ("count", "words"),
    [
        ((1, 2, 3, 4, 5), "there are 5 numbers of tokens to merge, but 4 blocks"),
        (-1, r"a block merges 0 to 256 tokens, not \[-1\]"),
        ((0, 300), r"a block merges 0 to 256 tokens, not \[300\]"),
    ],
)
def test_numbers_that_make_no_sense(fashion: tuple[Any, ModelProto, ModelCard], count: Any, words: str) -> None:
    with pytest.raises(VitEdgeError, match=words):
        merging(fashion[1], count)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("beit", "has a bias or mask .* token merging does not take"),
        ("eva02", "the tokens cannot be followed through 'blocks.0.attention/Slice'"),
    ],
)
def test_families_that_are_no_plain_vits(name: str, words: str, family: Callable[[str], Exported]) -> None:
    with pytest.raises(ModelError, match=words) as caught:
        merging(family(name).model, 2)
    assert "plain ViTs" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (plain(1, lambda x: x, Around), "joins tokens from before and behind a merge"),
        (plain(0, lambda x: x, Windowed), "the tokens cannot be followed through '.*Reshape.*': Reshape of "),
        (plain(0, lambda x: x, Positioned), "the tokens cannot be followed through '.*Add"),
        (Mixer(), "the model has no attention among all of its tokens"),
    ],
)
def test_graphs_that_do_not_let_tokens_go(module: nn.Module, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        merging(exported(module)[0], 2)


def test_a_rewrite_is_proved_on_the_choices_of_the_original(fashion: tuple[Any, ModelProto, ModelCard]) -> None:
    _, model, card = fashion
    original, _ = merging(model, 6)
    rows, other = engine_rows(clothes(4), card), graph.copy_of(original)
    for node in other.graph.node:
        if node.name.endswith(".merge/likeness"):  # B A' turned around: the least alike are merged
            node.input[0], node.output[0] = node.input[0], f"{node.output[0]}.turned"
    for name in [n.output[0] for n in other.graph.node if n.output[0].endswith(".likeness.turned")]:
        turned = name.removesuffix(".turned")
        reader = next(node for node in other.graph.node if turned in node.input)
        graph.put_nodes(other, [helper.make_node("Neg", [name], [turned], name=f"{turned}/Neg")], before=reader)
    assert np.abs(run_graph(other, rows)[0] - run_graph(original, rows)[0]).max() > 0.1
    prove(original, other, rows)  # other tokens, and the same function
    graph.put_constant(other, "head.bias", graph.constants(other)["head.bias"] + 0.1)
    with pytest.raises(ModelError, match="smoothing changes the output 'logits'"):
        prove(original, other, rows)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, fashion: tuple[Any, ModelProto, ModelCard]) -> Path:
    """images/, and fp32.merge6.onnx of the Fashion-MNIST classifier."""
    folder = tmp_path_factory.mktemp("merged")
    write_images(folder / "images", 24)
    model = graph.copy_of(fashion[1])
    reduce(model, fashion[2], Reduction(merge_tokens=6))
    graph.save(model, folder / "fp32.merge6.onnx")
    return folder


@pytest.mark.parametrize("name", ["int8", "int8-attention", "int8-fast"])
def test_it_is_quantized_like_any_model(name: str, workspace: Path, fashion: tuple[Any, ModelProto, ModelCard]) -> None:
    recipe = Recipe() if name == "int8" else BUILTIN_RECIPES[name]
    files, path, merged_path = list_images(workspace / "images"), workspace / f"{name}.onnx", workspace / "fp32.merge6.onnx"
    count = quantize(merged_path, calibrate(merged_path, files, recipe).table, path, files)
    source, model = read_source(path), graph.load(path)
    assert (count, source.variant, source.card.merged) == (18, f"{name}.merge6", (6, 6, 6, 6))
    assert source.int8_products == 18 + 8 * recipe.attention and operators(model).count("TopK") == 8
    before, after = (sum(total(count_work(each)).macs.values()) for each in (fashion[1], model))
    assert after < 0.8 * before
    rows = engine_rows(clothes(40), source.card)
    expected, given = (run_graph(each, rows)[0] for each in (graph.load(merged_path), model))
    assert (expected.argmax(1) == given.argmax(1)).mean() > 0.9


def test_an_engine_tells_merging_apart(workspace: Path) -> None:
    pytest.importorskip("openvino")
    folder = build_engine(workspace / "fp32.merge6.onnx", Target(), workspace / "engines")
    (found,) = explain([folder], 1, seconds=0.1)
    parts = by_part(found)
    assert {"product", "other"} <= {layer.kind for layer in parts["merging"]}
    assert not any(".merge/" in node for layer in parts["attention"] for node in layer.origins[:1] if layer.kind == "product")
    assert "Attention is one fused kernel in 4 of 4 blocks" in " ".join(found.findings)


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_it_is_built_by_tensorrt_in_half_precision(kind: Any, workspace: Path) -> None:
    pytest.importorskip(
        "tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed: pip install '.[rtx]'", exc_type=ImportError
    )
    from tests.compiler.test_tensorrt_rtx import build

    files, recipe = list_images(workspace / "images"), BUILTIN_RECIPES["int8-fast"]
    merged_path = workspace / "fp32.merge6.onnx"
    quantize(merged_path, calibrate(merged_path, files, recipe).table, workspace / "plain.onnx", files)
    kept = to_type(workspace / "plain.onnx", kind, workspace / f"plain.{kind}.onnx", files)
    assert set(kept.values()) == ({"bf16 is not defined for TopK"} if kind == "bf16" else set())
    assert build(workspace / f"plain.{kind}.onnx")


def test_the_pipeline_names_what_it_makes(tmp_path: Path, workspace: Path) -> None:
    source, files = pipeline.ModelSource(MODEL, CHECKPOINT, merge_tokens=(0, 9)), list_images(workspace / "images")
    path = pipeline.export_step(source, (), tmp_path / "engines", Silent())
    assert path.name.startswith("fp32.merge0+9-") and read_source(path).card.merged == (0, 9, 0, 9)
    assert pipeline.export_step(source, (), tmp_path / "engines", watcher := Silent()) == path and "is fresh" in watcher.lines[0]
    int8 = pipeline.quantize_step(path, files, BUILTIN_RECIPES["int8-fast"], tmp_path, Silent())
    assert int8.name.startswith("int8-fast.merge0+9-")
    assert (tmp_path / "calibration" / "scales" / "fashion-vit.int8-fast.merge0+9.json").exists()
    folder = pipeline.build_step(int8, Target("reference", "onnxruntime"), tmp_path / "engines", Silent())
    assert folder.name.startswith("int8-fast.merge0+9-")
    with open_engine(folder) as engine:
        assert engine.manifest.card.merged == (0, 9, 0, 9)


@pytest.mark.parametrize(
    ("reduction", "suffix"),
    [
        (Reduction(), ""),
        (Reduction(merge_tokens=(0, 0)), ""),
        (Reduction(merge_tokens=(8, 8)), ".merge8"),
        (Reduction(merge_tokens=(0, 0, 24)), ".merge0+0+24"),
        (Reduction(merge_tokens=(0, 0, 0, 60, *[0] * 8)), ".merge0x3+60+0x8"),
        (Reduction((192, 192), 8), ".192.merge8"),
        (Reduction((192, 256)), ".192x256"),
    ],
)
def test_the_suffix_tells_the_reduction(reduction: Reduction, suffix: str) -> None:
    assert reduction.suffix == suffix and bool(reduction) == bool(suffix)
    assert reduction_of(f"fp32{suffix}") == suffix and reduction_of("int8.merge8") == ""


def test_a_long_list_still_makes_a_name() -> None:
    counts = tuple(range(100, 124))
    suffix = Reduction(merge_tokens=counts).suffix
    assert len(suffix) < 60 and suffix != Reduction(merge_tokens=(*counts[:-1], 7)).suffix


def run_export(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: Path, *options: str
) -> tuple[int, str, str]:
    """Run `vitedge export` on the Fashion-MNIST classifier in `folder`; its exit status, and what it said."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["vitedge", "export", MODEL, "--checkpoint", str(CHECKPOINT), *options])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0), *capsys.readouterr()


def test_the_command_line_merges_and_resizes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = run_export(capsys, monkeypatch, tmp_path, "--merge-tokens", "3,0", "--size", "20")
    assert code == 0 and "fp32.20.merge3+0-" in out
    card = read_source(tmp_path / out.strip()).card
    assert (card.merged, card.preprocess.size) == ((3, 0, 3, 0), (20, 20))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--merge-tokens", "few"], "'few' is no number of tokens to merge"),
        (["--merge-tokens", "1,,2"], "'1,,2' is no number of tokens to merge"),
        (["--merge-tokens", "-3"], "a block merges 0 to 256 tokens, not [-3]"),
    ],
)
def test_the_command_line_says_what_is_wrong(
    options: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = run_export(capsys, monkeypatch, tmp_path, *options)
    assert code == 1 and f"error: {words}" in err and "Traceback" not in err
