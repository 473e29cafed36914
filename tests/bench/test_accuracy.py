"""Accuracies against direct computation, with linear classifiers in place of engines."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from vitedge.bench import accuracy
from vitedge.bench.accuracy import Case, Part, judge, judge_parts
from vitedge.bench.document import Judged
from vitedge.bench.labels import match_labels
from vitedge.bench.proportions import difference, proportion
from vitedge.errors import EngineError, VitEdgeError
from vitedge.images import ImageFile, decode, list_images
from vitedge.preprocess import input_dtype, input_shape
from vitedge.specs import Manifest, ModelCard, Preprocess, Target, Task

SIDE = 8
CLASSES = tuple(f"class {i}" for i in range(7))
SPEC = Preprocess(size=(SIDE, SIDE), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


class Linear:
    """The interface of an Engine around one matrix, float64[input, classes]; pixels are taken as 0..1."""

    def __init__(self, weights: NDArray[np.float64], card: ModelCard, max_batch: int = 4, name: str = "fp32") -> None:
        self.path, self.name, self.card = Path(name), name, card
        self.manifest = Manifest(card, name, None, Target(), "fp32", "", "", "numpy", np.__version__, "cpu", "")
        self.max_batch = max_batch
        self.size_mib = weights.nbytes / 2**20
        self.input = np.zeros((max_batch, *input_shape(card)), input_dtype(card))
        self.weights = weights
        self.counts: list[int] = []
        self.output = np.zeros((max_batch, weights.shape[1]), np.float32)

    def run(self, count: int) -> NDArray[np.float32]:
        self.counts.append(count)
        rows = self.input[:count].reshape(count, -1)
        pixels = rows / 255 if rows.dtype == np.uint8 else (rows + 128.0) / 255
        self.output[:count] = pixels @ self.weights
        return self.output[:count]  # a view into the same buffer each time, as engines give


def card(labels: tuple[str, ...] = CLASSES, task: Task = "classify", patch: int | None = None) -> ModelCard:
    return ModelCard("tiny", task, SPEC, patch, labels)


def weights(seed: int = 0, classes: int = len(CLASSES)) -> NDArray[np.float64]:
    return np.random.default_rng(seed).normal(size=(SIDE * SIDE * 3, classes))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six images of each class, of noise."""
    random = np.random.default_rng(1)
    for label in CLASSES:
        for index in range(6):
            save(tmp_path / label / f"{index}.png", random.integers(0, 256, (SIDE, SIDE, 3), np.uint8))
    return tmp_path


def save(path: Path, pixels: NDArray[np.uint8]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def outputs(folder: Path, matrix: NDArray[np.float64]) -> NDArray[np.float32]:
    pixels = np.stack([decode(file.path) for file in list_images(folder)])
    return (pixels.reshape(len(pixels), -1) / 255 @ matrix).astype(np.float32)


def test_every_number_equals_its_direct_computation(folder: Path) -> None:
    reference, candidate = weights(), weights() + 0.3 * weights(9)
    files = list_images(folder)
    first, second = judge([Linear(reference, card()), Linear(candidate, card(), name="int8")], files)

    truth = np.array([CLASSES.index(file.label or "") for file in files])
    expected, got = outputs(folder, reference), outputs(folder, candidate)
    order = np.argsort(-got, axis=1)
    assert second.top1 == pytest.approx(100 * (order[:, 0] == truth).mean())
    assert second.top5 == pytest.approx(100 * (order[:, :5] == truth[:, None]).any(1).mean())
    assert second.agreement == pytest.approx(100 * (expected.argmax(1) == got.argmax(1)).mean())
    power, noise = (np.square(x, dtype=np.float64).sum() for x in (expected, expected - got))
    assert second.sqnr_db == pytest.approx(10 * np.log10(power / noise), abs=1e-4)
    assert 0 < second.agreement < 100  # else the lines above prove little
    assert first.top1 == pytest.approx(100 * (expected.argmax(1) == truth).mean())
    assert (first.images, first.agreement, first.sqnr_db) == (42, None, None)


def test_the_batch_does_not_change_the_result(folder: Path) -> None:
    files = list_images(folder)
    results = [judge([Linear(weights(), card(), n), Linear(weights(2), card(), n + 3)], files) for n in (1, 4, 5, 64)]
    for result in results[1:]:
        for one, expected in zip(result, results[0], strict=True):
            assert (one.top1, one.top5, one.agreement) == (expected.top1, expected.top5, expected.agreement)
            assert one.sqnr_db == pytest.approx(expected.sqnr_db)


def test_batches_are_as_large_as_all_engines_take(folder: Path) -> None:
    small, large = Linear(weights(), card(), 5), Linear(weights(), card(), 16)
    judge([small, large], list_images(folder))
    assert small.counts == large.counts == [5] * 8 + [2]


def test_each_file_is_prepared_once_for_each_input_contract(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared: list[int | None] = []

    def counted(image: NDArray[np.uint8], card: ModelCard, out: NDArray[np.uint8]) -> None:
        prepared.append(card.patch)
        write_input(image, card, out)

    write_input = accuracy.write_input
    monkeypatch.setattr(accuracy, "write_input", counted)
    engines = [Linear(weights(), card(patch=patch)) for patch in (None, 4, None, 4, 4)]
    judge(engines, list_images(folder))
    assert sorted(prepared, key=str) == [4] * 42 + [None] * 42
    assert (engines[0].input == engines[2].input).all()
    assert (engines[1].input == engines[4].input).all()


def test_an_identical_engine_agrees_and_has_the_highest_finite_sqnr(folder: Path) -> None:
    _, same = judge([Linear(weights(), card()), Linear(weights(), card())], list_images(folder))
    assert same.agreement == 100
    assert same.sqnr_db == pytest.approx(144.5, abs=0.05)


def test_ties_go_to_the_first_class_as_argmax_has_it(tmp_path: Path) -> None:
    for label in CLASSES:
        save(tmp_path / label / "black.png", np.zeros((SIDE, SIDE, 3), np.uint8))  # all logits are zero
    (result,) = judge([Linear(weights(), card())], list_images(tmp_path))
    assert result.top1 == pytest.approx(100 / 7)
    assert result.top5 == pytest.approx(500 / 7)


def test_top5_of_five_classes_is_not_a_measurement(folder: Path) -> None:
    (result,) = judge([Linear(weights(classes=5), card(CLASSES[:5]))], list_images(folder))
    assert result.top1 is not None
    assert result.top5 is None
    assert result.images == 42


@pytest.mark.parametrize("task", ["embed", "dense"])
def test_other_tasks_have_an_sqnr_alone(folder: Path, task: Task) -> None:
    _, result = judge([Linear(weights(), card(task=task)), Linear(weights(3), card(task=task))], list_images(folder))
    assert (result.top1, result.top5, result.agreement) == (None, None, None)
    assert result.sqnr_db is not None


def test_outputs_of_another_shape_are_not_compared(folder: Path) -> None:
    other = Linear(weights(classes=9), card((*CLASSES, "more", "yet more")))
    _, result = judge([Linear(weights(), card()), other], list_images(folder))
    assert result.top1 is not None
    assert (result.agreement, result.sqnr_db) == (None, None)


def test_undecodable_files_are_skipped_counted_and_noted(folder: Path) -> None:
    (folder / "class 0" / "broken.png").write_bytes(b"\x89PNG\r\n")
    (folder / "class 6" / "zz.jpg").write_bytes(b"")
    notes: list[str] = []
    told: list[int] = []
    (result,) = judge([Linear(weights(), card())], list_images(folder), notes=notes, progress=told.append)
    assert result.images == 42
    assert len(notes) == 2
    assert "broken.png" in notes[0]
    assert told == sorted(told)
    assert told[-1] == 44


def test_nothing_but_undecodable_files_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(VitEdgeError):
        judge([Linear(weights(), card())], list_images(tmp_path))


def test_outputs_that_are_not_finite_name_the_engine(folder: Path) -> None:
    broken = weights()
    broken[:, 2] = np.nan
    with pytest.raises(EngineError, match="overflowing") as caught:
        judge([Linear(weights(), card()), Linear(broken, card(), name="overflowing")], list_images(folder))
    assert caught.value.hint


def test_a_class_that_the_output_lacks_is_an_error(folder: Path) -> None:
    with pytest.raises(VitEdgeError, match="class 5, but the engine knows 5 classes"):
        judge([Linear(weights(classes=5), card(), max_batch=1)], list_images(folder))


def test_labels_match_exactly_then_loosely() -> None:
    model = card(("T-shirt/top", "Ankle boot", "ankle_boot", "great white shark", "tench"))
    assert match_labels(["Great_White-Shark", "TENCH", "t shirt/top"], model) == {
        "Great_White-Shark": 3,
        "TENCH": 4,
        "t shirt/top": 0,
    }
    assert match_labels(["ankle_boot", "Ankle boot", "ankle boot"], model) == {"ankle_boot": 2, "Ankle boot": 1}


def test_a_name_that_two_labels_share_is_left_out() -> None:
    assert match_labels(["crane", "tench"], card(("crane", "tench", "crane"))) == {"tench": 1}


def test_numbers_are_class_indices_unless_they_are_labels() -> None:
    assert match_labels(["0", "003", "12"], card(CLASSES)) == {"0": 0, "003": 3}
    assert match_labels(["3", "7"], card(("7", "3"))) == {"3": 1, "7": 0}
    assert match_labels(["3", "900"], card(())) == {"3": 3, "900": 900}


@pytest.mark.parametrize("labels", [CLASSES, ()])
def test_labels_that_do_not_match_say_what_would(labels: tuple[str, ...]) -> None:
    with pytest.raises(VitEdgeError, match="'train', 'val'") as caught:
        match_labels(["train", "val"], card(labels))
    assert "class index" in str(caught.value.hint)


def test_labels_that_do_not_match_leave_the_agreement(tmp_path: Path) -> None:
    for index in range(3):
        save(tmp_path / "val" / f"{index}.png", np.full((SIDE, SIDE, 3), 80 * index, np.uint8))
    notes: list[str] = []
    first, second = judge([Linear(weights(), card()), Linear(weights(), card())], list_images(tmp_path), notes=notes)
    assert (first.images, first.labelled, first.top1, first.right) == (3, 0, None, "")
    assert (second.top1, second.agreement) == (None, 100)
    assert len(notes) == 1  # one model, two engines
    assert "'val'" in notes[0]


def test_some_labels_that_do_not_match_are_noted(folder: Path) -> None:
    (folder / "class 6").rename(folder / "unheard of")
    known = [file for file in list_images(folder) if file.label != "unheard of"]
    (expected,) = judge([Linear(weights(), card())], known)
    notes: list[str] = []
    (result,) = judge([Linear(weights(), card())], list_images(folder), notes=notes)
    assert (result.images, result.top1) == (42, expected.top1)
    assert "unheard of" in notes[0]


def test_images_without_folders_have_no_label_and_need_no_note(tmp_path: Path) -> None:
    save(tmp_path / "a.png", np.zeros((SIDE, SIDE, 3), np.uint8))
    notes: list[str] = []
    (result,) = judge([Linear(weights(), card())], list_images(tmp_path), notes=notes)
    assert result == Judged(1)
    assert not notes


class Failing(Linear):
    """Raises at its second run."""

    def run(self, count: int) -> NDArray[np.float32]:
        if self.counts:
            raise RuntimeError("out of memory\nand much more")
        return super().run(count)


def test_what_is_right_is_paired_image_by_image(folder: Path) -> None:
    reference, candidate = weights(), weights() + 0.3 * weights(9)
    files = list_images(folder)
    truth = np.array([CLASSES.index(file.label or "") for file in files])
    first, second = judge([Linear(reference, card()), Linear(candidate, card(), name="int8")], files)
    was, now = (outputs(folder, matrix).argmax(1) == truth for matrix in (reference, candidate))
    assert len(second.right) == 11  # digits for 42 images, of which the last two bits are none
    for judged, expected in ((first, was), (second, now)):
        assert f"{judged.right_bits:044b}" == "".join(str(int(right)) for right in expected) + "00"
    assert second.drop == pytest.approx(100 * (was.mean() - now.mean()))
    table = (int(pair.sum()) for pair in (was & now, was & ~now, now & ~was, ~was & ~now))
    assert second.drop_interval == difference(*table)
    assert second.top1_interval == proportion(int(now.sum()), 42)
    assert (first.drop, first.drop_interval) == (None, None)


def test_confusion_counts_every_wrong_answer(folder: Path) -> None:
    files = list_images(folder)
    (result,) = judge([Linear(weights(), card())], files)
    answers = outputs(folder, weights()).argmax(1)
    expected = Counter((CLASSES.index(file.label or ""), int(a)) for file, a in zip(files, answers, strict=True))
    assert {(one.truth, one.answer): one.images for one in result.confusion} == {
        k: n for k, n in expected.items() if k[0] != k[1]
    }
    assert [one.images for one in result.confusion] == sorted((one.images for one in result.confusion), reverse=True)


def test_the_worst_disagreements_are_shown_as_small_pictures(folder: Path) -> None:
    reference, candidate = weights(), weights() + 0.5 * weights(9)
    files = list_images(folder)
    _, result = judge([Linear(reference, card()), Linear(candidate, card(), name="int8")], files)
    wanted, got = outputs(folder, reference).astype(np.float64), outputs(folder, candidate).astype(np.float64)
    shares = np.exp(got) / np.exp(got).sum(1, keepdims=True)
    distances = 1 - shares[np.arange(42), wanted.argmax(1)]
    differing = [i for i in np.argsort(-distances) if wanted[i].argmax() != got[i].argmax()]
    assert len(differing) > 12
    assert [one.image for one in result.worst] == [files[i].name for i in differing[:12]]
    for one, i in zip(result.worst, differing, strict=False):
        assert one.distance == pytest.approx(distances[i])
        assert (one.truth, one.reference, one.answer) == (files[i].label, CLASSES[wanted[i].argmax()], CLASSES[got[i].argmax()])
        assert len(one.picture) <= 4000
        assert Image.open(io.BytesIO(base64.b64decode(one.picture))).size == (SIDE, SIDE)


def test_without_labels_agreement_is_what_drops(tmp_path: Path) -> None:
    random = np.random.default_rng(2)
    for index in range(20):
        save(tmp_path / f"{index:02}.png", random.integers(0, 256, (SIDE, SIDE, 3), np.uint8))
    _, result = judge([Linear(weights(), card()), Linear(weights() + 0.5 * weights(9), card())], list_images(tmp_path))
    assert result.agreement is not None and result.drop == pytest.approx(100 - result.agreement)
    assert result.drop_interval is not None and result.drop_interval.low < result.drop < result.drop_interval.high


def test_of_a_model_without_classes_the_noisiest_outputs_are_the_worst(folder: Path) -> None:
    reference, candidate = weights(), weights() + 0.1 * weights(9)
    files = list_images(folder)
    _, result = judge([Linear(m, card(task="embed"), name=str(i)) for i, m in enumerate((reference, candidate))], files)
    wanted, got = outputs(folder, reference).astype(np.float64), outputs(folder, candidate).astype(np.float64)
    noise = np.square(wanted - got).sum(1) / np.square(wanted).sum(1)
    assert [one.image for one in result.worst] == [files[i].name for i in np.argsort(-noise)[:12]]
    assert (result.worst[0].truth, result.worst[0].answer) == (files[int(noise.argmax())].label, "")


def test_a_contender_that_fails_is_left_out_and_the_others_go_on(folder: Path) -> None:
    files, failed = list_images(folder), dict[str, str]()
    whole = [Linear(weights(), card()), Linear(weights(2), card(), name="int8")]
    broken = weights()
    broken[:, 2] = np.nan
    contenders = [whole[0], Failing(weights(), card(), name="dies"), whole[1], Linear(broken, card(), name="overflows")]
    found = judge(contenders, files, failed=failed)
    assert (found[0], found[2]) == tuple(judge(whole, files))
    assert found[1] == found[3] == Judged(0)
    assert failed == {"dies": "out of memory", "overflows": "overflows answers with values that are not finite numbers"}


def test_where_the_reference_fails_the_next_one_takes_its_place(folder: Path) -> None:
    files, failed = list_images(folder), dict[str, str]()
    rest = [Linear(weights(), card(), name="b"), Linear(weights(2), card(), name="c")]
    found = judge([Failing(weights(), card(), name="a"), *rest], files, failed=failed)
    assert found == [Judged(0), *judge(rest, files)]
    assert failed == {"a": "out of memory"}
    failed.clear()
    assert judge([Failing(weights(), card(), name="a")], files, failed=failed) == [Judged(0)]
    with pytest.raises(RuntimeError, match="out of memory"):
        judge([Failing(weights(), card(), name="a")], files)


def test_parts_make_the_same_whole_in_any_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy, "PART", 10)
    random = np.random.default_rng(3)
    for index in range(57):
        save(tmp_path / CLASSES[index % 7] / f"{index:02}.png", random.integers(0, 256, (SIDE, SIDE, 3), np.uint8))
    (tmp_path / CLASSES[3] / "05.jpg").write_bytes(b"broken")
    contenders = [Linear(weights(), card()), Linear(weights() + 0.3 * weights(9), card(), 7, "int8")]
    files, notes = list_images(tmp_path), list[str]()

    def shuffled(case: Case, given: Sequence[ImageFile]) -> Iterator[Part]:
        parts = [part for at in range(0, 58, 20) for part in judge_parts(contenders, case, given[at : at + 20], at)]
        return iter([parts[i] for i in random.permutation(len(parts))])

    expected = judge(contenders, files, notes=notes)
    assert len(notes) == 1 and "05.jpg" in notes[0]
    for _ in range(3):
        again = list[str]()
        assert judge(contenders, files, notes=again, spread=shuffled) == expected  # every float to the last bit
        assert again == notes


def test_one_image_is_enough(tmp_path: Path) -> None:
    save(tmp_path / CLASSES[2] / "only.png", np.full((SIDE, SIDE, 3), 9, np.uint8))
    first, second = judge([Linear(weights(), card()), Linear(weights(2), card())], list_images(tmp_path))
    assert first.images == second.images == 1
    assert second.drop_interval is not None and second.drop_interval.high > second.drop_interval.low
