"""What export writes equals torch, is made of few operators, and is refused rather than written where it would be wrong."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from tests.compiler.families import FAMILIES, NAMES, OTHERS, PLAIN, Exported
from tests.models import engine_rows, operators, random_images, torch_input, write_noise
from vitedge.compiler.export import OPSET, Difference, compare, convert, export
from vitedge.compiler.graph import linears, load, metadata, model_card
from vitedge.errors import ModelError
from vitedge.images import decode, list_images
from vitedge.specs import TOLERANCE, ModelCard, Preprocess, TensorSpec

Load = Callable[[str], Exported]


def worst_difference(module: nn.Module, model: onnx.ModelProto, card: ModelCard, count: int) -> float:
    """The largest difference of ONNX from torch on `count` images at once, as a part of the output's range."""
    images = random_images(count, card.preprocess)
    with torch.inference_mode():
        answer = module(torch_input(images, card.preprocess))
    expected = [answer] if isinstance(answer, Tensor) else list(answer)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    given = session.run(None, {session.get_inputs()[0].name: engine_rows(images, card)})
    assert [a.shape for a in given] == [tuple(b.shape) for b in expected]
    return max(float(np.abs(a - b.numpy()).max() / np.ptp(b.numpy())) for a, b in zip(given, expected, strict=True))


# The families


@pytest.mark.parametrize("name", (*NAMES, *OTHERS))
@pytest.mark.parametrize("count", [1, 5])
def test_every_family_equals_torch_at_any_batch(name: str, count: int, family: Load) -> None:
    exported = family(name)
    assert worst_difference(exported.module, exported.model, exported.card, count) <= TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_every_family_takes_int8_patches_of_any_number_of_images(name: str, family: Load) -> None:
    model, card = family(name).model, family(name).card
    side = 4 if name == "fashion-mnist" else FAMILIES[name].patch
    height, width = card.preprocess.size
    shape = (None, height * width // side**2, side * side * card.preprocess.channels)
    assert card.patch == side and card.inputs == (TensorSpec("patches", shape, "int8"),)
    (entry,) = model.graph.input
    assert entry.name == "patches" and entry.type.tensor_type.elem_type == onnx.TensorProto.INT8
    assert entry.type.tensor_type.shape.dim[0].dim_param == "batch"
    (reader,) = [node for node in model.graph.node if "patches" in node.input and node.op_type != "Shape"]
    assert reader.op_type == "DequantizeLinear"
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", OPSET)] and OPSET == 20


@pytest.mark.parametrize("name", FAMILIES)
def test_layernorm_and_gelu_stay_single_nodes(name: str, family: Load) -> None:
    counts = Counter(operators(family(name).model))
    assert (counts["LayerNormalization"], counts["Gelu"]) == (FAMILIES[name].norms, FAMILIES[name].gelus)
    assert counts["Erf"] == counts["Tanh"] == counts["ReduceMean"] - (name in ("beit", "swin")) == 0


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.operators])
def test_plain_vits_are_made_of_these_operators_and_no_shape_arithmetic(name: str, family: Load) -> None:
    assert set(operators(family(name).model)) == FAMILIES[name].operators


def test_the_example_is_made_of_these_operators(family: Load) -> None:
    assert set(operators(family("fashion-mnist").model)) == PLAIN | {"Slice", "Squeeze", "Gather", "Gemm"}


@pytest.mark.parametrize("name", ["vit", "deit", "dinov2", "beit", "clip", "swin", "fashion-mnist", "eva02"])
def test_linears_bear_the_names_of_their_torch_modules(name: str, family: Load) -> None:
    products = (nn.Linear, nn.Conv2d)
    modules = [path for path, module in family(name).module.named_modules() if isinstance(module, products)]
    found = linears(family(name).model)
    assert sorted(linear.name for linear in found) == sorted(modules)
    assert all(linear.weight == f"{linear.name}.weight" for linear in found)


@pytest.mark.parametrize("name", (*NAMES, *OTHERS))
def test_every_node_is_named_once_after_a_torch_module(name: str, family: Load) -> None:
    scopes = {"patches", *(path for path, _ in family(name).module.named_modules())}
    names = [node.name for node in family(name).model.graph.node]
    assert len(set(names)) == len(names)
    bases = [node.rpartition("/")[0] if "/" in node else node for node in names]
    strangers = [base for base in bases if base not in scopes and base.rpartition(".")[0] not in scopes]
    assert strangers == []


@pytest.mark.parametrize("name", (*NAMES, *OTHERS))
def test_no_path_of_this_machine_travels_with_the_model(name: str, family: Load) -> None:
    content = family(name).model.SerializeToString()
    for trace in (b"site-packages", b".py", b"/home", str(Path(__file__).parents[2]).encode(), b"pkg.torch"):
        assert trace not in content
    assert not any(node.metadata_props or node.doc_string for node in family(name).model.graph.node)


@pytest.mark.parametrize("name", (*NAMES, *OTHERS))
def test_the_card_travels_in_the_metadata(name: str, family: Load) -> None:
    assert model_card(family(name).model) == family(name).card
    assert metadata(family(name).model)["vitedge.variant"] == "fp32"
    (spec,) = family(name).card.outputs
    (output,) = family(name).model.graph.output
    assert spec.name == output.name == {"classify": "logits", "embed": "embedding"}[family(name).card.task]


# Other modules. Each is 8 x 8 pixels in patches of 4.

CARD = ModelCard("toy", "embed", Preprocess((8, 8), (0.5,) * 3, (0.25,) * 3))


class Toy(nn.Module):
    """Four tokens of six features, and a Linear to five."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.linear = nn.Conv2d(3, 6, 4, 4), nn.Sequential(nn.Linear(6, 5))

    def tokens(self, x: Tensor) -> Tensor:
        return self.conv(x).flatten(2).transpose(1, 2)

    def forward(self, x: Tensor) -> object:
        return self.linear(self.tokens(x))


class OverlappingStem(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, 2, padding=1)


class NormalisesItself(Toy):
    def forward(self, image: Tensor) -> Tensor:
        return self.linear(self.tokens(torch.where(torch.isnan(image), torch.zeros(()), image) * 2))


class Upsampled(Toy):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        small = nn.functional.interpolate(self.conv(x), size=(7, 7), mode="bilinear")
        large = nn.functional.interpolate(small, size=(31, 62), mode="bilinear")
        return torch.relu(large), nn.functional.interpolate(self.conv(x), size=x.shape[2:], mode="bilinear")


class OtherReshape(Toy):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).reshape(x.shape[0], 3, 8).transpose(1, 2) @ torch.ones(3, 2)


class TokensAreAnOutput(Toy):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(self.tokens(x)), self.tokens(x)


class MapIsAnOutput(Toy):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        small = self.conv(x)
        return self.linear(small.flatten(2).transpose(1, 2)), small


class RowsAreAnOutput(Toy):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rows = self.conv(x).flatten(2)
        return self.linear(rows.transpose(1, 2)), rows


class JoinedIsAnOutput(Toy):
    """Its tokens are an output before the positions are added."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, 6)), nn.Parameter(torch.randn(1, 5, 6))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        joined = torch.cat([self.token.expand(x.shape[0], -1, -1), self.tokens(x)], 1)
        return self.linear(joined + self.positions), joined


class OneNumber(Toy):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.tokens(x)).mean((1, 2), keepdim=True)[:, 0]


class SameTensorTwice(Toy):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.linear(self.tokens(x))
        return y, y


class InputIsAnOutput(Toy):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(self.tokens(x)), x


class ZerosThatBroadcast(Toy):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.tokens(x)).unsqueeze(1) + torch.zeros(1, 3, 1, 5)


class NumberedSibling(nn.Sequential):
    """Two products of its own, which are numbered, beside a child named "2"."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6))
        self.a, self.b = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x @ self.a @ self.b)


class NamesThatCollide(Toy):
    """Its parameters are named like the inputs and outputs to be."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = NumberedSibling()
        self.patches, self.image = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(4, 6))
        self.embedding = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner((self.tokens(x) + self.patches) * self.image) + self.embedding


PATCHED = [Upsampled, OtherReshape, TokensAreAnOutput, SameTensorTwice, ZerosThatBroadcast, NamesThatCollide]
PATCHED += [MapIsAnOutput, RowsAreAnOutput, JoinedIsAnOutput]
IMAGED = [OverlappingStem, NormalisesItself, InputIsAnOutput]


@cache
def converted(kind: type[Toy]) -> Exported:
    module = kind().eval().requires_grad_(False)
    return Exported(module, *convert(module, CARD))


@pytest.mark.parametrize("kind", [*PATCHED, *IMAGED], ids=lambda kind: kind.__name__)
def test_modules_of_other_shapes_equal_torch_too(kind: type[Toy]) -> None:
    module, model, card = converted(kind).module, converted(kind).model, converted(kind).card
    assert [entry.name for entry in model.graph.input] == ["patches" if kind in PATCHED else "image"]
    assert max(worst_difference(module, model, card, count) for count in (1, 2, 5)) <= TOLERANCE
    assert compare(module, model, card).worst <= TOLERANCE


def test_an_overlapping_stem_takes_a_uint8_image_that_is_cast_first() -> None:
    model, card = converted(OverlappingStem).model, converted(OverlappingStem).card
    assert card.patch is None and card.inputs == (TensorSpec("image", (None, 8, 8, 3), "uint8"),)
    assert operators(model)[:4] == ["Cast", "Transpose", "Mul", "Add"]  # TensorRT transposes no uint8
    assert model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8


def test_products_outside_of_linears_are_numbered_around_modules_names() -> None:
    assert [linear.name for linear in linears(converted(NamesThatCollide).model)] == [
        "conv",
        "inner",
        "inner.3",
        "inner.0",
        "inner.1",
        "inner.2",
    ]


def test_the_card_tells_the_shape_of_every_output() -> None:
    assert converted(TokensAreAnOutput).card.outputs == (
        TensorSpec("embedding", (None, 4, 5), "float32"),
        TensorSpec("embedding.1", (None, 4, 6), "float32"),
    )


def test_a_dense_models_output_is_a_map() -> None:
    class FeatureMap(Toy):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.conv(x))

    module = FeatureMap().eval().requires_grad_(False)
    model, card = convert(module, dataclasses.replace(CARD, task="dense"))
    assert card.outputs == (TensorSpec("map", (None, 6, 2, 2), "float32"),) and card.patch == 4
    assert worst_difference(module, model, card, 3) <= TOLERANCE


# The file


def test_export_writes_what_it_compared_on_random_and_on_real_images(tmp_path: Path) -> None:
    pictures = [decode(file.path) for file in list_images(write_noise(tmp_path / "images", 3, (50, 70)))]
    module = Toy().train()  # export turns dropout off
    module.linear.append(nn.Dropout(0.5))
    difference = export(module, CARD, tmp_path / "models" / "fp32.onnx", images=pictures)
    assert difference.real is not None and 0 < difference.worst == max(difference.random, difference.real) <= TOLERANCE
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["fp32.onnx"]
    model = load(tmp_path / "models" / "fp32.onnx")
    assert worst_difference(module, model, model_card(model), 3) <= TOLERANCE
    export(module, CARD, tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "models" / "fp32.onnx").read_bytes()


# What is refused


class Raises(Toy):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("the first line\nand many others")


class BranchesOnData(Toy):
    def forward(self, x: Tensor) -> Tensor:
        return self.tokens(x) if x.sum() > 0 else self.tokens(-x)


class CountsTheBatch(Toy):
    def forward(self, x: Tensor) -> Tensor:
        return self.tokens(x).reshape(len(x), 24)


class MergesTheBatch(Toy):
    def forward(self, x: Tensor) -> Tensor:
        return self.tokens(x).reshape(2, -1)


class Scalar(Toy):
    def forward(self, x: Tensor) -> Tensor:
        return self.tokens(x).mean()


class Classes(Toy):
    def forward(self, x: Tensor) -> Tensor:
        return self.tokens(x).argmax(-1)


class Constant(Toy):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.tokens(x), self.linear[0].weight * 2


class Table(Toy):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"tokens": self.tokens(x)}


class Nested(Toy):
    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor]]:
        return self.tokens(x), (self.linear(self.tokens(x)),)


class Autocast(Toy):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.linear(self.tokens(x)).float()


class Overflows(Toy):
    def forward(self, x: Tensor) -> Tensor:
        return torch.exp(1000 * self.tokens(x).abs())


class Random(Toy):
    def forward(self, x: Tensor) -> Tensor:
        return self.tokens(x) * (1 + 0.1 * torch.rand_like(self.tokens(x)))


REFUSED = [
    (Raises, "torch cannot export Raises: the first line$"),
    (BranchesOnData, "torch cannot export BranchesOnData: .*data-dependent"),
    (CountsTheBatch, "forward.. of CountsTheBatch works for one batch size alone"),
    (MergesTheBatch, r"'embedding' has the shape \[2, .*batch\], not \[batch, ...\]"),
    (Scalar, r"'embedding' has the shape \[\], not \[batch, ...\]"),
    (Classes, "'embedding' is INT64, but an engine's outputs are float32"),
    (Constant, "output 1 of the model does not depend on the image"),
    (Table, "forward.. of toy returns dict"),
    (Nested, "forward.. of toy returns tuple"),
    (Autocast, "onnxruntime cannot run toy: .*bfloat16"),
    (Overflows, "toy gives NaN or infinite outputs in torch"),
    (Random, "differs from torch by .* of the output's range, more than 1e-04"),
]


@pytest.mark.parametrize(("kind", "message"), REFUSED, ids=[kind.__name__ for kind, _ in REFUSED])
def test_what_cannot_be_exact_is_one_sentence_and_no_file(kind: type[Toy], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        export(kind(), CARD, tmp_path / "model.onnx")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_larger_difference_can_be_accepted(tmp_path: Path) -> None:
    assert TOLERANCE < export(Random(), CARD, tmp_path / "model.onnx", tolerance=1).worst < 1


def test_a_weight_that_is_not_a_number_is_named(tmp_path: Path) -> None:
    module = Toy().requires_grad_(False)
    module.linear[0].weight[2, 3] = float("nan")
    with pytest.raises(ModelError, match=r"toy: the weight 'linear.0.weight' holds 1 NaN or infinite values of 30"):
        export(module, CARD, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_labels_must_be_as_many_as_outputs() -> None:
    card = dataclasses.replace(CARD, task="classify", labels=("cat", "dog"))
    with pytest.raises(ModelError, match="toy has 1 outputs but 2 labels"):
        convert(OneNumber(), card)


@pytest.mark.parametrize("labels", [(), ("a", "b", "c", "d", "e")], ids=["no labels", "labels"])
def test_a_classifier_gives_one_score_a_class(labels: tuple[str, ...], tmp_path: Path) -> None:
    card = dataclasses.replace(CARD, task="classify", labels=labels)
    with pytest.raises(
        ModelError, match=r"toy is to classify, but .*'logits' has the shape \[batch, 4, 5\], not \[batch, classes"
    ):
        export(Toy(), card, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_model_of_one_number_is_compared_with_its_magnitude(tmp_path: Path) -> None:
    pictures = [decode(file.path) for file in list_images(write_noise(tmp_path / "images", 2, (8, 8)))]
    difference = export(OneNumber(), CARD, tmp_path / "model.onnx", images=pictures)
    assert difference.worst <= TOLERANCE and difference.real is not None


def test_a_nan_of_onnx_alone_is_no_small_difference() -> None:
    module = OneNumber()
    model, card = convert(module, CARD)
    last = model.graph.node[-1]
    spoilt = onnx.helper.make_node("Mul", ["whole", "nan"], [last.output[0]], name="spoilt")
    last.output[0] = "whole"
    model.graph.node.append(spoilt)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.float32([np.nan]), "nan"))
    assert np.isnan(compare(module, model, card).worst) and np.isnan(Difference(0.1, float("nan")).worst)


def test_a_graph_that_loses_elements_is_noticed_though_it_would_broadcast() -> None:
    module = Toy()
    model, card = convert(module, CARD)
    assert compare(module, model, card).worst <= TOLERANCE
    last = model.graph.node[-1]
    first_token = onnx.helper.make_node("Slice", ["whole", "zero", "one", "one"], [last.output[0]], name="first")
    last.output[0] = "whole"
    model.graph.node.append(first_token)
    for name, value in (("zero", 0), ("one", 1)):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([value]), name))
    with pytest.raises(ModelError, match=r"'embedding' has the shape \[1, 1, 5\] in ONNX and \[1, 4, 5\] in torch for 1 images"):
        compare(module, model, card)
