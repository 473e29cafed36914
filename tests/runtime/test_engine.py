"""Engines answer alike whatever the backend, the batch or the way they are called, and refuse what does not fit."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tests.engines import IMAGES, Made, edit_manifest, input_rows, sqnr_db
from vitedge import backends
from vitedge.backends.build import build_engine, plan_sha256, read_manifest
from vitedge.errors import EngineError, VitEdgeError
from vitedge.runtime.engine import Engine, open_engine
from vitedge.specs import Target, to_dict

pytest.importorskip("openvino")
pytest.importorskip("onnxruntime")

KINDS = [("openvino", "fp32"), ("openvino", "int8"), ("onnxruntime", "fp32"), ("onnxruntime", "int8")]
PLAN = {"openvino": "model.bin", "onnxruntime": "model.onnx"}


def answers(made: Made, backend: str, variant: str, count: int = 16) -> np.ndarray:
    with open_engine(made.engines[backend, variant]) as engine:
        return engine(input_rows(engine, made.images, count))


def refused(folder: Path) -> EngineError:
    """The error with which an engine is refused: one sentence, and a hint on what to do."""
    with pytest.raises(EngineError) as caught:
        open_engine(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.hint
    return caught.value


@pytest.mark.parametrize(("backend", "variant"), KINDS)
def test_a_call_equals_a_run_and_its_answer_outlives_the_next(made: Made, backend: str, variant: str) -> None:
    with open_engine(made.engines[backend, variant]) as engine:
        rows = input_rows(engine, made.images, 6)
        called = engine(rows[:3])
        kept = called.copy()
        engine.input[:3] = rows[:3]
        np.testing.assert_array_equal(engine.run(3), called)
        engine(rows[3:])
        np.testing.assert_array_equal(called, kept)
        assert called.dtype == np.float32 and called.shape == (3, 10)


@pytest.mark.parametrize(("backend", "variant"), KINDS)
def test_every_batch_size_gives_the_same_rows(made: Made, backend: str, variant: str) -> None:
    with open_engine(made.engines[backend, variant]) as engine:
        rows = input_rows(engine, made.images, engine.max_batch)
        together = engine(rows)
        assert together.shape == (16, 10)
        for size in (1, 3, 15):
            parts = np.concatenate([engine(rows[i : i + size]) for i in range(0, 15, size)])
            if variant == "fp32":
                np.testing.assert_allclose(parts, together[:15], atol=1e-4 * np.ptp(together))
            else:  # another order of summation lets a value between two INT8 steps round the other way
                assert sqnr_db(together[:15], parts) > 40


def test_backends_agree_on_fp32_to_a_ten_thousandth_of_the_range(made: Made) -> None:
    reference = answers(made, "onnxruntime", "fp32", 16)
    np.testing.assert_allclose(answers(made, "openvino", "fp32", 16), reference, atol=1e-4 * np.ptp(reference))


def test_backends_are_close_on_int8_and_int8_is_close_to_fp32(made: Made) -> None:
    reference, exact = answers(made, "onnxruntime", "fp32"), answers(made, "onnxruntime", "int8")
    fast = answers(made, "openvino", "int8")
    assert sqnr_db(exact, fast) > 35  # the two round alike but for ties that land on the other side
    assert sqnr_db(reference, exact) > 25
    assert sqnr_db(reference, exact) < 80  # it is quantized at all
    assert (fast.argmax(1) == reference.argmax(1)).mean() > 0.8  # the others lie between two classes


def test_the_engine_knows_its_labels_and_is_right_about_real_images(made: Made) -> None:
    with open_engine(made.engines["openvino", "int8"]) as engine:
        rows = np.concatenate([engine(part) for part in np.split(input_rows(engine, made.images, IMAGES), 3)])
        labels = engine.manifest.card.labels
        right = sum(labels[best] == name for best, name in zip(rows.argmax(1), sorted_labels(made), strict=True))
    assert right >= 0.8 * IMAGES


def sorted_labels(made: Made) -> list[str]:
    return [path.parent.name for path in sorted(made.images.rglob("*.png"), key=lambda p: p.relative_to(made.images).as_posix())]


def test_int8_plans_are_smaller(made: Made) -> None:
    for backend in PLAN:
        with open_engine(made.engines[backend, "fp32"]) as fp32, open_engine(made.engines[backend, "int8"]) as int8:
            assert 0 < int8.size_mib < 0.5 * fp32.size_mib
            plan = int8.path / PLAN[backend]
            assert int8.size_mib >= plan.stat().st_size / 2**20


@pytest.mark.parametrize("backend", PLAN)
def test_a_batch_that_is_empty_or_too_large_is_refused_and_the_engine_goes_on(made: Made, backend: str) -> None:
    with open_engine(made.engines[backend, "int8"]) as engine:
        rows = input_rows(engine, made.images, 17)
        for count in (0, 17, -1):
            with pytest.raises(EngineError, match=f"batch of {count} does not fit .* built for 1 to 16") as caught:
                engine.run(count)
            assert caught.value.hint and "16" in caught.value.hint
        for wrong in (rows[:0], rows):
            with pytest.raises(EngineError, match=f"batch of {len(wrong)} "):
                engine(wrong)
        assert engine(rows[:1]).shape == (1, 10)


@pytest.mark.parametrize("backend", PLAN)
def test_a_batch_below_the_profile_is_filled_up_and_one_above_is_refused(made: Made, backend: str, tmp_path: Path) -> None:
    target = Target(name="four", backend=backend, batch=(2, 4, 4), threads=1)  # type: ignore[arg-type]
    with open_engine(build_engine(made.graphs["fp32"], target, tmp_path)) as engine:
        rows = input_rows(engine, made.images, 4)
        assert engine.max_batch == 4 and engine(rows).shape == (4, 10)
        np.testing.assert_allclose(engine(rows[:2]), engine(rows)[:2], atol=1e-3)
        np.testing.assert_allclose(engine(rows[:1]), engine(rows)[:1], atol=1e-3)
        with pytest.raises(EngineError, match=r"batch of 5 .* built for 1 to 4"):
            engine.run(5)


def test_rows_of_another_shape_or_type_are_refused(made: Made) -> None:
    with open_engine(made.engines["openvino", "int8"]) as engine:
        rows = input_rows(engine, made.images, 2)
        wrong = [rows[0], rows[:, :-1], rows[..., None], rows.astype(np.float32), rows.view(np.uint8), rows.astype(np.int64)]
        for array in wrong:
            with pytest.raises(EngineError, match=r"takes int8\[batch, 49, 16\], not ") as caught:
                engine(array)
            assert str(array.dtype) in str(caught.value) and str(list(array.shape)) in str(caught.value)


@pytest.mark.parametrize("backend", PLAN)
def test_a_closed_engine_says_so_and_can_be_closed_again(made: Made, backend: str) -> None:
    engine = open_engine(made.engines[backend, "fp32"])
    rows = input_rows(engine, made.images, 2)
    answer = engine(rows)
    before = engine.run(2)
    engine.close()
    engine.close()
    assert np.isfinite(answer).all() and before.shape == (2, 10)
    for use in (lambda: engine.run(1), lambda: engine(rows)):
        with pytest.raises(EngineError, match="is closed"):
            use()


def test_leaving_the_block_closes_the_engine_even_when_it_fails(made: Made) -> None:
    def fail() -> Engine:
        with open_engine(made.engines["openvino", "fp32"]) as engine:
            opened.append(engine)
            raise KeyError

    opened: list[Engine] = []
    with pytest.raises(KeyError):
        fail()
    with pytest.raises(EngineError, match="is closed"):
        opened[0].run(1)


def test_two_engines_are_open_at_once_and_do_not_disturb_each_other(made: Made) -> None:
    folder = made.engines["openvino", "int8"]
    with open_engine(folder) as first, open_engine(str(folder)) as second:
        rows = input_rows(first, made.images, 2)
        first.input[0], second.input[0] = rows[0], rows[1]
        one, two = first.run(1).copy(), second.run(1).copy()
        np.testing.assert_array_equal(first.run(1), one)
        assert not np.array_equal(one, two)


@pytest.mark.parametrize("backend", PLAN)
def test_threads_that_share_an_engine_take_turns(made: Made, backend: str) -> None:
    with open_engine(made.engines[backend, "int8"]) as engine, ThreadPoolExecutor(4) as threads:
        rows = input_rows(engine, made.images, 8)
        expected = [engine(rows[i : i + 1]) for i in range(8)]
        answers = list(threads.map(lambda i: engine(rows[i % 8 : i % 8 + 1]), range(400)))
        for index, answer in enumerate(answers):
            np.testing.assert_array_equal(answer, expected[index % 8])
        engine.input[:1] = rows[:1]
        assert all(shape == (1, 10) for shape in threads.map(lambda _: engine.run(1).shape, range(400)))


def test_closing_waits_for_the_threads_that_run(made: Made) -> None:
    def use(_: int) -> str:
        try:
            return str(engine.run(1).shape)
        except EngineError as error:
            return str(error)

    engine = open_engine(made.engines["openvino", "int8"])
    with ThreadPoolExecutor(4) as threads:
        said = threads.map(use, range(400))
        engine.close()
        assert all(text == "(1, 10)" or text.endswith("is closed") for text in said)


@pytest.mark.parametrize("name", ["missing", "empty", "file"])
def test_what_is_no_engine_directory_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("not an engine")
    error = refused(tmp_path / name)
    assert "not an engine" in str(error) and "vitedge build" in str(error.hint)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "Expecting value"),
        ("{", "Expecting"),
        ("[]", "expected a table"),
        ("{}", "needs the key"),
        ("\0\xff", "manifest.json"),
    ],
)
def test_a_garbled_manifest_is_refused(made: Made, tmp_path: Path, content: str, says: str) -> None:
    folder = made.copy("openvino", "int8", tmp_path)
    (folder / "manifest.json").write_bytes(content.encode("latin-1"))
    assert says in str(refused(folder))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"plan_sha256": None}, "needs the key 'plan_sha256'"),
        ({"colour": "red"}, "no key 'colour'"),
        ({"float_type": "fp64"}, "must be one of 'fp32', 'fp16', 'bf16'"),
        ({"target": {"batch": [4, 2, 1]}}, "batch must be"),
        ({"card": 3}, "expected a table"),
    ],
)
def test_a_manifest_with_wrong_keys_is_refused(made: Made, tmp_path: Path, changes: dict[str, object], says: str) -> None:
    folder = made.copy("openvino", "int8", tmp_path)
    edit_manifest(folder, **changes)
    assert says in str(refused(folder))


def test_an_engine_of_a_backend_that_is_not_known_is_refused(made: Made, tmp_path: Path) -> None:
    folder = made.copy("openvino", "int8", tmp_path)
    edit_manifest(folder, backend="abacus")
    with pytest.raises(VitEdgeError, match="no backend 'abacus'") as caught:
        open_engine(folder)
    assert "openvino" in str(caught.value.hint)


@pytest.mark.parametrize("backend", PLAN)
def test_a_plan_cut_short_is_refused(made: Made, tmp_path: Path, backend: str) -> None:
    folder = made.copy(backend, "int8", tmp_path)
    plan = folder / PLAN[backend]
    plan.write_bytes(plan.read_bytes()[:-1])
    assert "is damaged" in str(refused(folder))


@pytest.mark.parametrize("name", ["model.xml", "model.bin"])
def test_a_plan_with_one_byte_changed_is_refused(made: Made, tmp_path: Path, name: str) -> None:
    folder = made.copy("openvino", "int8", tmp_path)
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    assert "is damaged" in str(refused(folder))


@pytest.mark.parametrize("name", ["model.xml", "model.bin"])
def test_a_plan_without_one_of_its_files_is_refused(made: Made, tmp_path: Path, name: str) -> None:
    folder = made.copy("openvino", "int8", tmp_path)
    (folder / name).unlink()
    assert f"{name} is missing" in str(refused(folder))


@pytest.mark.parametrize("backend", PLAN)
def test_a_plan_of_a_newer_backend_is_refused_and_of_an_older_one_opened(made: Made, tmp_path: Path, backend: str) -> None:
    folder = made.copy(backend, "int8", tmp_path)
    installed = backends.load_backend(backend).version()
    newer = re.sub(r"\d+$", lambda digits: str(int(digits[0]) + 1), installed)
    edit_manifest(folder, backend_version=newer)
    error = refused(folder)
    assert newer in str(error) and installed in str(error) and f"{backend}>={newer}" in str(error.hint)
    for fits in (installed, "1.0"):
        edit_manifest(folder, backend_version=fits)
        open_engine(folder).close()


def test_a_float_type_that_the_device_does_not_compute_in_is_refused(made: Made, tmp_path: Path) -> None:
    folder = made.copy("onnxruntime", "int8", tmp_path)
    edit_manifest(folder, float_type="bf16")
    error = refused(folder)
    assert "bf16" in str(error) and "build" in str(error.hint)


def test_a_damaged_plan_whose_hash_fits_is_still_one_sentence(made: Made, tmp_path: Path) -> None:
    for backend, name in PLAN.items():
        folder = made.copy(backend, "int8", tmp_path / backend)
        (folder / name.replace(".bin", ".xml")).write_bytes(b"not a plan")
        edit_manifest(folder, plan_sha256=plan_sha256(folder, backends.load_backend(backend).PLAN))
        assert "cannot open" in str(refused(folder))


@pytest.mark.parametrize("backend", PLAN)
def test_a_manifest_whose_input_is_not_the_plans_is_refused(made: Made, tmp_path: Path, backend: str) -> None:
    card = to_dict(read_manifest(made.engines[backend, "int8"]).card)
    larger = card | {"preprocess": card["preprocess"] | {"size": [32, 32]}}
    for number, wrong in enumerate((larger, card | {"patch": None}, card | {"patch": 7})):
        folder = made.copy(backend, "int8", tmp_path / str(number))
        edit_manifest(folder, card=wrong)
        assert "again" in str(refused(folder).hint)


def test_an_engine_can_be_moved_and_renamed(made: Made, tmp_path: Path) -> None:
    folder = made.copy("openvino", "int8", tmp_path).rename(tmp_path / "Größe 1 [b]")
    with open_engine(folder) as engine:
        moved = engine(input_rows(engine, made.images, 4))
    np.testing.assert_array_equal(moved, answers(made, "openvino", "int8", 4))


def test_the_manifest_tells_what_was_built_and_where(made: Made) -> None:
    manifest = read_manifest(made.engines["openvino", "int8"])
    assert (manifest.card.name, manifest.variant, manifest.backend) == ("fashion-vit", "int8", "openvino")
    assert manifest.recipe is not None and manifest.recipe.float_type == manifest.float_type == "fp32"
    assert manifest.backend_version == backends.load_backend("openvino").version()
    assert manifest.device and manifest.built_at.endswith("+00:00")
    assert read_manifest(made.engines["openvino", "fp32"]).recipe is None
