"""Every noun survives JSON, and what does not fit is one sentence that names the key."""

from __future__ import annotations

import dataclasses
import json
import math
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitedge.errors import VitEdgeError
from vitedge.specs import (
    BenchRow,
    Manifest,
    ModelCard,
    Peaks,
    Preprocess,
    Recipe,
    ScaleTable,
    Smoothing,
    Target,
    TensorSpec,
    Timing,
    Work,
    from_dict,
    to_dict,
)

# Any value of each noun

TEXT = st.text(max_size=12)
NAMES = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,12}", fullmatch=True)
REALS = st.floats(allow_nan=False, allow_infinity=False)
COUNTS = st.integers(1, 10**6)
PERCENT = st.none() | st.floats(0, 100)


@st.composite
def preprocesses(draw: st.DrawFn) -> Preprocess:
    channels = draw(st.sampled_from([1, 3]))
    return Preprocess(
        size=draw(st.tuples(COUNTS, COUNTS)),
        mean=draw(st.tuples(*[REALS] * channels)),
        std=draw(st.tuples(*[st.floats(1e-6, 1e6)] * channels)),
        resize=draw(st.sampled_from(["crop", "squash"])),
        crop_pct=draw(st.floats(1e-3, 1)),
        interpolation=draw(st.sampled_from(["bicubic", "bilinear"])),
        channels=channels,
    )


TENSORS = st.builds(TensorSpec, TEXT, st.lists(st.none() | COUNTS, max_size=4).map(tuple), st.sampled_from(["int8", "float32"]))
TUPLES = st.lists(TENSORS, max_size=2).map(tuple)
CARDS = st.builds(
    ModelCard,
    NAMES,
    st.sampled_from(["classify", "embed", "dense"]),
    preprocesses(),
    st.none() | COUNTS,
    st.lists(TEXT, max_size=3).map(tuple),
    TUPLES,
    TUPLES,
)
RECIPES = st.builds(
    Recipe,
    name=NAMES,
    method=st.sampled_from(["max", "percentile", "mse", "entropy", "auto", "none"]),
    percentile=st.floats(1e-3, 100),
    per_channel=st.booleans(),
    smoothing=st.sampled_from(["auto", "fixed", "none"]),
    exponent=st.floats(0, 1),
    shift=st.booleans(),
    rounding=st.sampled_from(["gptq", "nearest"]),
    bias_correction=st.booleans(),
    attention=st.booleans(),
    int4=st.lists(TEXT, max_size=3).map(tuple),
    skip=st.lists(TEXT, max_size=3).map(tuple),
    float_type=st.sampled_from(["auto", "fp32", "bf16"]),
    images=st.integers(100, 1000),
    min_images=st.integers(1, 100),
    seed=st.integers(0),
)
CHANNELS = st.lists(st.tuples(st.floats(1e-30, 1e30), st.floats(-1e30, 1e30)), min_size=1, max_size=4)
SMOOTHINGS = CHANNELS.map(lambda pairs: Smoothing(*map(tuple, zip(*pairs, strict=True))))
TABLES = st.builds(
    ScaleTable, RECIPES, TEXT, TEXT, COUNTS, st.dictionaries(TEXT, st.floats(0, 1e30)), st.dictionaries(TEXT, SMOOTHINGS)
)
TARGETS = st.builds(
    Target,
    name=NAMES,
    backend=st.sampled_from(["openvino", "onnxruntime"]),
    batch=st.lists(st.integers(1, 4096), min_size=3, max_size=3).map(sorted).map(tuple),
    threads=st.none() | st.integers(1, 1024),
)
WORKS = st.builds(
    Work,
    st.dictionaries(st.sampled_from(["int8", "fp16", "bf16", "fp32"]), st.integers(0, 10**12)),
    st.dictionaries(st.sampled_from(["int4", "int8", "fp16", "bf16", "fp32"]), st.integers(0, 10**12)),
)
MANIFESTS = st.builds(
    Manifest, CARDS, NAMES, st.none() | RECIPES, TARGETS, st.sampled_from(["fp32", "bf16"]), TEXT, TEXT, TEXT, TEXT, TEXT, TEXT,
    work=st.none() | WORKS,
)  # fmt: skip
TIMINGS = st.builds(Timing, REALS, REALS, REALS, REALS)
ROWS = st.builds(
    BenchRow, TEXT, TEXT, TEXT, COUNTS, REALS, REALS, REALS, REALS, REALS, COUNTS, PERCENT, PERCENT, PERCENT, st.none() | REALS
)


@given(spec=preprocesses() | TENSORS | CARDS | RECIPES | TABLES | TARGETS | WORKS | MANIFESTS | TIMINGS | ROWS)
def test_every_noun_survives_json(spec: Any) -> None:
    data = to_dict(spec)
    again = from_dict(type(spec), json.loads(json.dumps(data, allow_nan=False)))
    assert again == spec and to_dict(again) == data
    assert list(data) == [field.name for field in dataclasses.fields(spec)]


# Typical ones

CARD: dict[str, Any] = {
    "name": "vit",
    "task": "classify",
    "preprocess": {"size": [224, 224], "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
    "inputs": [{"name": "patches", "shape": [None, 196, 768], "dtype": "int8"}],
}


def test_lists_become_tuples_all_the_way_down_and_defaults_are_filled_in() -> None:
    assert from_dict(ModelCard, CARD) == ModelCard(
        "vit",
        "classify",
        Preprocess((224, 224), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "crop", 1.0, "bicubic", 3),
        inputs=(TensorSpec("patches", (None, 196, 768), "int8"),),
    )
    assert from_dict(Recipe, {}) == Recipe() and from_dict(Target, {}) == Target()


def test_a_whole_number_that_no_float_holds_is_refused() -> None:
    with pytest.raises(VitEdgeError, match=r"Recipe\.percentile is too large a number"):
        from_dict(Recipe, {"percentile": 10**400})


@pytest.mark.parametrize(("scale", "shift"), [(1e60, 0.0), (1e-60, 0.0), (math.nan, 0.0), (1.0, 1e60), (1.0, math.nan)])
def test_a_smoothing_that_float32_does_not_hold_is_refused(scale: float, shift: float) -> None:
    with pytest.raises(VitEdgeError, match="a smoothing s"):
        Smoothing((scale,), (shift,))


def test_whole_numbers_serve_where_floats_are_wanted() -> None:
    recipe = from_dict(Recipe, {"percentile": 100})
    assert isinstance(recipe.percentile, float)
    table = from_dict(ScaleTable, {"recipe": {}, "model_sha256": "", "images_sha256": "", "images": 1, "amax": {"x": 3}})
    assert isinstance(table.amax["x"], float)


def test_nouns_are_frozen_and_take_no_new_attributes() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().images = 3  # type: ignore[misc]
    assert not hasattr(Recipe(), "__dict__")


def test_work_in_another_float_type_keeps_its_integers_and_its_sum() -> None:
    work = Work({"int8": 10, "fp32": 3, "bf16": 2}, {"int4": 3, "int8": 8, "fp32": 2, "fp16": 1})
    assert work.weight_bytes == 2 + 8 + 8 + 2  # three of 4 bits fill two bytes
    half = work.floats_in("fp16")
    assert half == Work({"int8": 10, "fp16": 5}, {"int4": 3, "int8": 8, "fp16": 3}) and half.floats_in("fp16") == half


@pytest.mark.parametrize(("macs", "weights"), [({"int4": 1}, {}), ({}, {"fp64": 1}), ({"int8": -1}, {}), ({}, {"int8": -1})])
def test_work_of_no_known_type_or_less_than_none_is_refused(macs: dict[str, int], weights: dict[str, int]) -> None:
    with pytest.raises(VitEdgeError):
        Work(macs, weights)


def test_a_timing_adds_up() -> None:
    assert Timing(1.0, 2.0, 4.0, 8.0).total_ms == 15.0


# Keys


@pytest.mark.parametrize(
    ("cls", "key", "hint"),
    [
        (Recipe, "percentil", "did you mean 'percentile'?"),
        (Recipe, "min_image", "did you mean 'min_images'?"),
        (Recipe, "perchannel", "did you mean 'per_channel'?"),
        (Target, "backends", "did you mean 'backend'?"),
        (Target, "thread", "did you mean 'threads'?"),
        (Target, "precision", "known keys: " + ", ".join(field.name for field in dataclasses.fields(Target))),
        (Preprocess, "crop_pc", "did you mean 'crop_pct'?"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_known_one(cls: type, key: str, hint: str) -> None:
    with pytest.raises(VitEdgeError, match=f"^{cls.__name__} has no key '{key}'$") as caught:
        from_dict(cls, {key: 1})
    assert caught.value.hint == hint


@pytest.mark.parametrize("key", ["name", "task", "preprocess"])
def test_a_missing_key_is_named(key: str) -> None:
    with pytest.raises(VitEdgeError, match=f"^ModelCard needs the key '{key}'$"):
        from_dict(ModelCard, {k: v for k, v in CARD.items() if k != key})


def test_a_key_of_a_noun_within_a_noun_is_named_too() -> None:
    with pytest.raises(VitEdgeError, match=r"^Preprocess needs the key 'std'$"):
        from_dict(ModelCard, {**CARD, "preprocess": {"size": [8, 8], "mean": [0.5]}})
    with pytest.raises(VitEdgeError, match=r"^TensorSpec has no key 'typ'$"):
        from_dict(ModelCard, {**CARD, "outputs": [{"name": "y", "shape": [], "dtype": "", "typ": 3}]})


@pytest.mark.parametrize("data", [None, [], "text", 3, [["name", "int8"]]])
def test_what_is_no_table_is_refused(data: Any) -> None:
    with pytest.raises(VitEdgeError, match=r"^Recipe: expected a table of keys, not "):
        from_dict(Recipe, data)
    with pytest.raises(VitEdgeError, match=r"^Recipe: expected a table of keys, not "):
        from_dict(ScaleTable, {"recipe": data, "model_sha256": "", "images_sha256": "", "images": 1, "amax": {}})


# Types and values

WRONG_TYPES: list[tuple[type, dict[str, Any], str]] = [
    (Recipe, {"smoothing": "always"}, "Recipe.smoothing must be one of 'auto', 'fixed', 'none', not 'always'"),
    (Recipe, {"float_type": None}, "Recipe.float_type must be one of"),
    (Recipe, {"percentile": "99"}, "Recipe.percentile must be float, not '99'"),
    (Recipe, {"percentile": True}, "Recipe.percentile must be float, not True"),
    (Recipe, {"per_channel": 1}, "Recipe.per_channel must be bool, not 1"),
    (Recipe, {"images": 256.0}, "Recipe.images must be int, not 256.0"),
    (Recipe, {"images": True}, "Recipe.images must be int, not True"),
    (Recipe, {"images": None}, "Recipe.images must be int, not None"),
    (Recipe, {"skip": "head"}, "Recipe.skip must be a list, not 'head'"),
    (Recipe, {"skip": [1]}, "Recipe.skip must be str, not 1"),
    (Target, {"backend": 3}, "Target.backend must be str"),
    (Target, {"capability": 8.6}, 'Target.capability must be str, not 8.6: put it in quotes, "8.6"'),
    (Target, {"batch": 4}, "Target.batch must be a list, not 4"),
    (Target, {"batch": [1, 4]}, r"Target.batch needs 3 values, not \[1, 4\]"),
    (Target, {"batch": [1, 4, "8"]}, "Target.batch must be int, not '8'"),
    (Target, {"threads": "all"}, "Target.threads must be int, not 'all'"),
    (ModelCard, {**CARD, "task": ["classify"]}, "ModelCard.task must be one of"),
    (ModelCard, {**CARD, "labels": {"a": 1}}, "ModelCard.labels must be a list"),
    (ModelCard, {**CARD, "inputs": ["patches"]}, "TensorSpec: expected a table of keys, not 'patches'"),
    (
        ScaleTable,
        {"recipe": {}, "model_sha256": "", "images_sha256": "", "images": 1, "amax": []},
        "ScaleTable.amax must be a table",
    ),
    (
        ScaleTable,
        {"recipe": {}, "model_sha256": "", "images_sha256": "", "images": 1, "amax": {"x": "1"}},
        "ScaleTable.amax.x must be",
    ),
]


@pytest.mark.parametrize(("cls", "data", "message"), WRONG_TYPES)
def test_a_value_of_another_type_is_named_with_its_key(cls: type, data: dict[str, Any], message: str) -> None:
    with pytest.raises(VitEdgeError, match=f"^{message}"):
        from_dict(cls, data)


MANIFEST: dict[str, Any] = {
    "card": ModelCard("vit", "embed", Preprocess((4, 4), (0.5,) * 3, (0.5,) * 3)),
    "recipe": None,
    "target": Target(),
    "float_type": "fp32",
    **dict.fromkeys(("onnx_sha256", "plan_sha256", "backend", "backend_version", "device", "built_at"), ""),
}
NO_NUMBERS = (math.nan, math.inf, -math.inf)
SIZED: dict[str, Any] = {"size": (8, 8), "mean": (0.5,) * 3, "std": (0.5,) * 3}
WRONG_VALUES: list[tuple[type, dict[str, Any], str]] = [
    (Preprocess, {**SIZED, "size": (0, 8)}, "size must be"),
    (Preprocess, {**SIZED, "size": (8, 8, 8)}, "size must be"),
    (Preprocess, {**SIZED, "channels": 4}, r"channels must be 1 \(grey\) or 3 \(RGB\), not 4"),
    (Preprocess, {**SIZED, "channels": 1}, "mean and std need 1 values each"),
    (Preprocess, {**SIZED, "mean": (0.5,)}, "mean and std need 3 values each"),
    (Preprocess, {**SIZED, "mean": (0.5, 0.5, math.nan)}, "mean must be finite and std positive"),
    (Preprocess, {**SIZED, "std": (0.5, 0.5, 0.0)}, "mean must be finite and std positive"),
    (Preprocess, {**SIZED, "std": (0.5, 0.5, math.inf)}, "mean must be finite and std positive"),
    (Preprocess, {**SIZED, "std": (0.5, 0.5, math.nan)}, "mean must be finite and std positive"),
    (Preprocess, {**SIZED, "crop_pct": 0.0}, r"crop_pct must be in \(0, 1\], not 0"),
    (Preprocess, {**SIZED, "crop_pct": 1.1}, r"crop_pct must be in \(0, 1\], not 1.1"),
    (Preprocess, {**SIZED, "crop_pct": math.nan}, "crop_pct must be"),
    (Recipe, {"name": "fp32"}, "a recipe cannot be called fp32"),
    (Recipe, {"percentile": 0.0}, r"percentile must be in \(0, 100\], not 0"),
    (Recipe, {"percentile": 100.1}, r"percentile must be in \(0, 100\], not 100.1"),
    (Recipe, {"percentile": math.nan}, "percentile must be"),
    (Recipe, {"min_images": 0}, r"min_images \(0\) must be in 1..images \(128\)"),
    (Recipe, {"min_images": 32, "images": 16}, r"min_images \(32\) must be in 1..images \(16\)"),
    (Recipe, {"exponent": 1.1}, r"exponent must be in 0..1, not 1.1"),
    (Recipe, {"exponent": -0.1}, r"exponent must be in 0..1, not -0.1"),
    (Recipe, {"exponent": math.nan}, "exponent must be"),
    *((Smoothing, {"scale": (s,), "shift": (0.0,)}, "a smoothing scale must be a positive") for s in (0.0, -1.0, *NO_NUMBERS)),
    *((Smoothing, {"scale": (1.0,), "shift": (s,)}, "a smoothing shift must be a finite") for s in NO_NUMBERS),
    (Smoothing, {"scale": (1.0, 1.0), "shift": (0.0,)}, "2 scales, but 1 shifts"),
    (Target, {"batch": (0, 1, 2)}, "batch must be"),
    (Target, {"batch": (2, 1, 4)}, "batch must be"),
    (Target, {"batch": (1, 8, 4)}, "batch must be"),
    (Target, {"threads": 0}, "threads must be 1 to 1024, not 0"),
    (Target, {"workspace_mib": 0}, "workspace_mib must be 1 to 16777216, not 0"),
    (Target, {"workspace_mib": 17592186044416}, "workspace_mib must be 1 to 16777216, not 17592186044416"),
    *((Peaks, {"tops": {"int8": top}, "bandwidth_gb_s": 1.0}, "peaks must be positive numbers") for top in (0.0, 1e300, 1e-300)),
    *((Peaks, {"tops": {"int8": 1.0}, "bandwidth_gb_s": most}, "peaks must be positive numbers") for most in (0.0, 1e300)),
    (Work, {"macs": {"int8": 10**400}, "weights": {}}, "below 2.*63"),
    (Manifest, {**MANIFEST, "variant": "../../../tmp/esc"}, "a name is made of letters"),
    (Target, {"batch": (1, 1, 4097)}, "batch must be at most 4096"),
    (
        ModelCard,
        {"name": "m", "task": "clasify", "preprocess": Preprocess((4, 4), (0.5,) * 3, (0.5,) * 3)},
        "ModelCard.task must be one of",
    ),
    (
        ScaleTable,
        {"recipe": Recipe(), "model_sha256": "", "images_sha256": "", "images": 1, "amax": {"x": math.nan}},
        "the range of 'x'",
    ),
    (
        ScaleTable,
        {"recipe": Recipe(), "model_sha256": "", "images_sha256": "", "images": 1, "amax": {"x": -1.0}},
        "the range of 'x'",
    ),
]
WRONG_VALUES += [
    (cls, {"name": name}, "a name is made of letters")
    for cls in (Recipe, Target)
    for name in ("", "a/b", "..", "-x", "a b", "ü", "a\n")
]
WRONG_VALUES += [(cls, {"name": 101 * "a"}, "a name has at most 100 letters, and 'a{20}'... has 101") for cls in (Recipe, Target)]


@pytest.mark.parametrize(("cls", "values", "message"), WRONG_VALUES)
def test_a_value_out_of_range_is_refused_from_code_and_from_data(cls: type, values: dict[str, Any], message: str) -> None:
    with pytest.raises(VitEdgeError, match=message):
        cls(**values)
    with pytest.raises(VitEdgeError):
        from_dict(cls, {key: to_dict(value) if dataclasses.is_dataclass(value) else value for key, value in values.items()})


@given(
    st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | TEXT, lambda v: st.lists(v) | st.dictionaries(TEXT, v))
)
def test_any_other_json_is_read_or_refused_and_never_a_traceback(data: Any) -> None:
    for cls, base in ((Recipe, {}), (Target, {}), (ModelCard, CARD), (Preprocess, {**CARD["preprocess"]})):
        for field in dataclasses.fields(cls):
            with suppress(VitEdgeError):
                from_dict(cls, {**base, field.name: data})
