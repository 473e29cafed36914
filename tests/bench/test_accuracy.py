"""Accuracies against direct computation, with linear classifiers in place of engines."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from vitedge.bench.accuracy import judge
from vitedge.bench.document import Judged
from vitedge.bench.labels import match_labels
from vitedge.errors import EngineError, VitEdgeError
from vitedge.images import decode, list_images
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
        for accuracy, expected in zip(result, results[0], strict=True):
            assert (accuracy.top1, accuracy.top5, accuracy.agreement) == (expected.top1, expected.top5, expected.agreement)
            assert accuracy.sqnr_db == pytest.approx(expected.sqnr_db)


def test_batches_are_as_large_as_all_engines_take(folder: Path) -> None:
    small, large = Linear(weights(), card(), 5), Linear(weights(), card(), 16)
    judge([small, large], list_images(folder))
    assert small.counts == large.counts == [5] * 8 + [2]


def test_each_file_is_prepared_once_for_each_input_contract(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vitedge.bench import accuracy

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
