"""The bound is the roofline of published figures, no engine beats it, and an expectation says that it is one."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.engines import Made
from vitedge.backends import load_backend
from vitedge.backends.build import Source
from vitedge.bench.contenders import open_contenders
from vitedge.bench.document import rows_of
from vitedge.bench.plan import Plan
from vitedge.bench.roofline import POINTS, STREAMING, Point, bound, engine_bound_ms, estimate
from vitedge.bench.run import benchmark
from vitedge.errors import VitEdgeError
from vitedge.runtime.engine import open_engine
from vitedge.specs import FloatType, ModelCard, Peaks, Preprocess, Recipe, Target, Work
from vitedge.workspace import load_target

VIT_B = Work({"int8": 17_560_000_000}, {"int8": 86_600_000})
DEVICE = Peaks({"int8": 8.0, "fp16": 4.0, "fp32": 1.0}, 100.0)
CARD = ModelCard("vit-b16", "classify", Preprocess((224, 224), (0.5,) * 3, (0.5,) * 3))
INT8_POINT, FP16_POINT = POINTS


def peaks_of(name: str) -> Peaks:
    peaks = load_target(name).peaks
    assert peaks
    return peaks


def source(recipe: Recipe | None, float_type: FloatType = "fp32", work: Work | None = None) -> Source:
    return Source(CARD, recipe.name if recipe else "fp32", recipe, float_type, work)


@pytest.mark.parametrize(
    ("name", "ms", "binds"),
    [("h100", 0.026, STREAMING), ("agx-orin", 0.42, STREAMING), ("orin-nano-super", 1.05, "INT8 compute")],
)
def test_the_limits_of_vit_b_come_out(name: str, ms: float, binds: str) -> None:
    """All of it in INT8; and with attention, patches and head in FP16, as the default recipe has it, next to the same."""
    least = bound(VIT_B, peaks_of(name))
    assert least.ms == pytest.approx(ms, rel=0.02) and least.binds == binds and not least.notes
    assert bound(INT8_POINT.work, peaks_of(name)).ms == pytest.approx(ms, rel=0.05)


def test_the_published_points_are_of_vit_b() -> None:
    for point in POINTS:
        assert sum(point.work.macs.values()) / 1e9 == pytest.approx(17.56, rel=0.001)
        assert sum(point.work.weights.values()) / 1e6 == pytest.approx(86.6, rel=0.01)
        assert point.ms > bound(point.work, peaks_of(point.target)).ms, "nobody beats a bound"
        assert load_target(point.target).capability == point.capability


@given(
    st.dictionaries(st.sampled_from(["int8", "fp16", "fp32"]), st.integers(1, 10**11), min_size=1),
    st.integers(1, 10**9),
    st.integers(1, 64),
)
def test_a_bound_is_the_longer_of_both_and_a_batch_streams_the_weights_once(
    macs: dict[str, int], weights: int, batch: int
) -> None:
    work = Work(macs, {"int8": weights})
    compute = batch * sum(2 * count / DEVICE.tops[kind] / 1e12 for kind, count in macs.items()) * 1e3
    least = bound(work, DEVICE, batch)
    assert least.ms == pytest.approx(max(compute, weights / 1e11 * 1e3))
    assert (least.binds == STREAMING) == (least.ms > compute * (1 + 1e-12))
    assert bound(work, DEVICE, batch + 1).ms >= least.ms
    assert bound(work.floats_in("fp32"), DEVICE, batch).ms >= least.ms


def test_what_binds_is_the_type_that_takes_longest() -> None:
    work = Work({"int8": 10**9, "fp32": 10**9}, {"int8": 1})
    assert bound(work, DEVICE).binds == "FP32 compute"
    assert bound(dataclasses.replace(work, weights={"int8": 10**9}), DEVICE).binds == STREAMING


def test_weights_that_fit_into_the_cache_are_not_streamed() -> None:
    work = Work({"int8": 1000}, {"int8": 2**20})
    roomy = dataclasses.replace(DEVICE, cache_mib=1.0)
    assert bound(work, DEVICE).binds == STREAMING and bound(work, roomy).binds == "INT8 compute"
    assert bound(dataclasses.replace(work, weights={"int8": 2**20 + 1}), roomy).binds == STREAMING


def test_a_type_without_a_peak_takes_that_of_a_wider_one_and_says_so() -> None:
    least = bound(Work({"bf16": 10**9, "int8": 0}, {}), DEVICE)
    assert least.ms == pytest.approx(0.5) and least.notes == ("the peak of bf16 is unknown: that of fp16 was taken",)
    assert least.binds == "FP16 compute"
    with pytest.raises(VitEdgeError, match="the peak of fp32 is unknown"):
        bound(Work({"fp32": 1}, {}), Peaks({"fp16": 1.0}, 1.0))


# What is not built yet


def test_floats_are_estimated_in_the_type_that_a_build_gives_them() -> None:
    floats = INT8_POINT.work.floats_in("fp32")
    nano = load_target("orin-nano-super")
    found = estimate(source(Recipe()), floats, nano)
    assert found.bound_ms == bound(INT8_POINT.work, peaks_of("orin-nano-super")).ms
    assert found.notes[0] == "orin-nano-super: as it would be built, with floats in fp16"
    typed = estimate(source(Recipe(), "fp16"), INT8_POINT.work, nano)
    assert dataclasses.replace(typed, notes=()) == dataclasses.replace(found, notes=())
    slow = estimate(source(None), FP16_POINT.work.floats_in("fp32"), nano)
    assert slow.binds == "FP32 compute" and "floats are in fp32" in slow.notes[0]


@pytest.mark.parametrize("point", POINTS, ids=lambda point: point.type)
def test_an_expectation_gives_back_what_was_published_and_says_where(point: Point) -> None:
    found = estimate(source(Recipe(), "fp16"), point.work, load_target(point.target))
    assert found.expected_ms == pytest.approx(point.ms)
    assert "expected, not measured" in found.notes[-1] and point.source in found.notes[-1] and "rough" not in found.notes[-1]


def test_an_expectation_is_rough_on_a_sister_and_absent_where_nothing_is_known() -> None:
    graph = source(Recipe(), "fp16")
    sister = estimate(graph, INT8_POINT.work, load_target("agx-orin"))
    assert sister.expected_ms and sister.expected_ms > sister.bound_ms and "take it as rough" in sister.notes[-1]
    for target, batch in (("h100", 1), ("orin-nano-super", 4)):
        found = estimate(graph, INT8_POINT.work, load_target(target), batch)
        assert found.expected_ms is None and "no expectation" in found.notes[-1]
        assert found.images_per_s == pytest.approx(batch / found.bound_ms * 1e3)


def test_an_expectation_does_not_go_by_a_target_of_the_users_that_has_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = estimate(source(Recipe(), "fp16"), INT8_POINT.work, load_target("agx-orin"))
    for folder in ("calibration", "engines/targets"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "engines/targets/orin-nano-super.toml").write_text('backend = "tensorrt"\ncapability = "8.7"\n')
    monkeypatch.chdir(tmp_path)
    assert load_target("orin-nano-super").peaks is None
    assert estimate(source(Recipe(), "fp16"), INT8_POINT.work, load_target("agx-orin")) == wanted


def test_a_model_of_another_size_than_the_published_has_no_expectation() -> None:
    tiny = Work({"int8": 10**6, "fp16": 10**5}, {"int8": 10**5})
    found = estimate(source(Recipe(), "fp16"), tiny, load_target("orin-nano-super"))
    assert found.expected_ms is None and "no expectation, as the bound of" in found.notes[-1]


def test_a_batch_beyond_the_target_is_noted_and_work_that_was_not_counted_refused() -> None:
    nano, graph = load_target("orin-nano-super"), source(Recipe(), "fp16")
    notes = estimate(graph, INT8_POINT.work, nano, 8).notes
    assert "orin-nano-super: its engines take at most 4 images at once; set batch in it for 8" in notes
    assert not [note for note in estimate(graph, INT8_POINT.work, nano, 4).notes if "at most" in note]
    with pytest.raises(VitEdgeError, match="no matrix product of it was counted"):
        estimate(graph, Work({}, {}), nano)


def test_a_target_of_unknown_peaks_is_an_error_that_says_how_to_mend_it() -> None:
    with pytest.raises(VitEdgeError, match="no peaks are known of the target 'local'") as caught:
        estimate(source(Recipe()), VIT_B, load_target("local"))
    assert "[peaks]" in (caught.value.hint or "")


# Engines of this machine


def test_no_engine_beats_its_bound(made: Made) -> None:
    pytest.importorskip("openvino")
    with open_contenders([str(made.engines["openvino", variant]) for variant in ("fp32", "int8")]) as contenders:
        rows = rows_of(benchmark(contenders, [], Plan((1, 4), seconds=0.3), notes=[]))
        assert [row.bound_ms for row in rows[:2]] == [engine_bound_ms(one.manifest, 1) for one in contenders if one.manifest]
    bounds = [row.bound_ms or 0.0 for row in rows]
    assert all(0 < least < row.p50_ms for least, row in zip(bounds, rows, strict=True))
    assert bounds[1] < bounds[0] and bounds[3] < bounds[2], "INT8 moves the roof"


def test_an_engine_of_unknown_work_or_on_an_unknown_device_has_no_bound(made: Made) -> None:
    with open_engine(made.engines["onnxruntime", "fp32"]) as engine:
        manifest = engine.manifest
    assert manifest.work and engine_bound_ms(manifest, 1) is None, "ONNX Runtime is not about speed"
    known = dataclasses.replace(manifest, target=Target(name="x", backend="onnxruntime", peaks=DEVICE))
    assert engine_bound_ms(known, 2) == bound(manifest.work, DEVICE, 2).ms, "what the target says goes first"
    assert engine_bound_ms(dataclasses.replace(known, work=None), 1) is None
    lame = dataclasses.replace(known.target, peaks=Peaks({"int8": 1.0}, 1.0))
    assert engine_bound_ms(dataclasses.replace(known, target=lame), 1) is None, "no peak of FP32 is known"


def test_a_peak_of_a_wider_type_gives_an_engine_no_bound(made: Made) -> None:
    """INT8 is faster than FP32, so an engine could beat that; FP16 and BF16 are as fast as each other."""
    with open_engine(made.engines["onnxruntime", "int8"]) as engine:
        manifest = engine.manifest

    def bound_of(work: Work, **tops: float) -> float | None:
        target = Target(backend="tensorrt", peaks=Peaks(tops, 1.0))
        return engine_bound_ms(dataclasses.replace(manifest, backend="tensorrt", work=work, target=target), 1)

    work = Work({"int8": 10**9, "bf16": 10**9, "fp32": 0}, {})
    assert bound_of(work, fp16=1.0, fp32=1.0) is None
    assert bound_of(work, int8=1.0, fp32=1.0) is None
    assert bound_of(work, int8=2.0, fp16=1.0) == pytest.approx(3.0)


def test_what_a_cpu_can_do_is_measured_once_and_a_target_may_know_better() -> None:
    pytest.importorskip("openvino")
    backend = load_backend("openvino")
    target = Target(threads=1)
    peaks = backend.peaks(target)
    assert peaks and peaks.source == "measured on this machine" and backend.peaks(target) is peaks
    assert set(peaks.tops) == {"int8", *backend.float_types(target)}
    assert peaks.tops["int8"] > peaks.tops["fp32"] > 1e-3 and peaks.bandwidth_gb_s > 0.1
    assert backend.peaks(dataclasses.replace(target, peaks=DEVICE)) is DEVICE


def test_the_caches_of_a_cpu_are_counted_once_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    openvino = pytest.importorskip("vitedge.backends.openvino")
    own = [("1", "Data", "48K"), ("1", "Instruction", "64K"), ("2", "Unified", "2048K")]
    for cpu in range(4):
        shared = ("3", "Unified", "32768K", "0-1" if cpu < 2 else "2-3")
        for index, (level, kind, size, cpus) in enumerate([*((*cache, str(cpu)) for cache in own), shared]):
            folder = tmp_path / f"cpu{cpu}" / "cache" / f"index{index}"
            folder.mkdir(parents=True)
            for name, text in (("level", level), ("type", kind), ("size", size), ("shared_cpu_list", cpus)):
                (folder / name).write_text(f"{text}\n")
    (tmp_path / "cpu0/cache/index1/size").unlink()
    monkeypatch.setattr(openvino, "CPUS", tmp_path)
    assert openvino._cache_mib() == 2 * 32 + 4 * (2 + 48 / 1024)
    monkeypatch.setattr(openvino, "CPUS", tmp_path / "none")
    assert openvino._cache_mib() == 0


@pytest.mark.skipif(not Path("/sys/devices/system/cpu/cpu0/cache/index0/size").is_file(), reason="no caches are told here")
def test_weights_may_stay_in_the_caches_of_a_cpu() -> None:
    peaks = pytest.importorskip("vitedge.backends.openvino").peaks(Target())
    assert peaks.cache_mib > 0
