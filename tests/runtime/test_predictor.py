import time
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from vitedge.errors import EngineError, VitEdgeError
from vitedge.preprocess import write_input
from vitedge.runtime.predictor import Predictor
from vitedge.specs import Frame, Manifest, ModelCard, PixelFormat, Prediction, Preprocess, Target, Task, TensorSpec

SIZE, PATCH, CLASSES = 16, 8, 10
NAMES = tuple(f"class {i}" for i in range(CLASSES))


class LinearEngine:
    """A linear classifier on int8 patches in numpy; like a real engine it reuses its buffers."""

    def __init__(self, task: Task = "classify", labels: tuple[str, ...] = NAMES, max_batch: int = 4) -> None:
        spec = Preprocess((SIZE, SIZE), (0.5,) * 3, (0.5,) * 3)
        outputs = (TensorSpec("logits", (None, CLASSES), "float32"),)
        card = ModelCard("linear", task, spec, PATCH, labels, outputs=outputs)
        self.manifest = Manifest(card, "fp32", None, Target(), "fp32", *[""] * 6)
        self.max_batch = max_batch
        self.input: NDArray[np.int8] = np.zeros((max_batch, (SIZE // PATCH) ** 2, PATCH * PATCH * 3), np.int8)
        self.weights = np.random.default_rng(0).normal(0, 0.003, (self.input[0].size, CLASSES)).astype(np.float32)
        self.output = np.zeros((max_batch, CLASSES), np.float32)
        self.runs = 0

    def write(self, row: int, picture: NDArray[np.uint8], pixels: PixelFormat) -> None:
        write_input(picture, self.manifest.card, self.input[row], pixels)

    def run(self, count: int) -> NDArray[np.float32]:
        self.runs += 1
        time.sleep(0.002)
        self.output[:count] = self.input[:count].reshape(count, -1).astype(np.float32) @ self.weights
        return self.output[:count]


class FixedEngine(LinearEngine):
    """Answers every frame with the given logits."""

    def __init__(self, logits: list[float], labels: tuple[str, ...] = ()) -> None:
        super().__init__(labels=labels)
        self.manifest = replace(self.manifest, card=replace(self.manifest.card, outputs=()))
        self.logits = np.array([logits], np.float32)

    def run(self, count: int) -> NDArray[np.float32]:
        return self.logits.repeat(count, axis=0)


def frames(count: int) -> list[Frame]:
    random = np.random.default_rng(1)
    images = [random.integers(0, 256, (20 + 3 * i, 31, 3), np.uint8) for i in range(count)]
    return [Frame(image, i, time.perf_counter_ns()) for i, image in enumerate(images)]


def test_top_k_equals_a_softmax_of_the_models_answer() -> None:
    engine = LinearEngine()
    (frame,) = frames(1)
    prediction = Predictor(engine, top_k=CLASSES)(frame)
    row = np.zeros_like(engine.input[0])
    write_input(frame.image, engine.manifest.card, row)
    logits = row.reshape(-1).astype(np.float64) @ engine.weights.astype(np.float64)
    expected = np.exp(logits) / np.exp(logits).sum()
    assert [label for label, _ in prediction.top] == [NAMES[i] for i in np.argsort(-logits)]
    assert [p for _, p in prediction.top] == pytest.approx(sorted(expected, reverse=True), abs=1e-5)
    assert sum(p for _, p in prediction.top) == pytest.approx(1)
    assert prediction.array.dtype == np.float32
    np.testing.assert_allclose(prediction.array, logits, atol=1e-4)


def test_only_the_best_k_are_named_and_no_more_than_there_are() -> None:
    (frame,) = frames(1)
    assert len(Predictor(LinearEngine())(frame).top) == 5
    assert len(Predictor(LinearEngine(), top_k=3)(frame).top) == 3
    assert len(Predictor(LinearEngine(), top_k=99)(frame).top) == CLASSES
    with pytest.raises(VitEdgeError, match="top_k"):
        Predictor(LinearEngine(), top_k=0)


def test_without_labels_a_class_is_its_index_and_equals_keep_their_order() -> None:
    (frame,) = frames(1)
    assert [label for label, _ in Predictor(FixedEngine([1, 5, 3, 5]), top_k=4)(frame).top] == ["1", "3", "2", "0"]


def test_softmax_bears_any_finite_logit_and_refuses_others() -> None:
    (frame,) = frames(1)
    assert Predictor(FixedEngine([3e38, -3e38, 0, -np.inf]), top_k=1)(frame).top == (("0", 1.0),)
    assert [p for _, p in Predictor(FixedEngine([1000, 1000]))(frame).top] == [0.5, 0.5]
    for bad in (np.nan, np.inf):
        with pytest.raises(EngineError, match=f"output holds {bad}"):
            Predictor(FixedEngine([0, bad, 1]))(frame)


@pytest.mark.parametrize("task", ["embed", "dense"])
def test_outputs_of_other_tasks_must_be_numbers_too(task: Task) -> None:
    (frame,) = frames(1)
    for bad in (np.nan, np.inf):
        engine = FixedEngine([0, bad, 1])
        engine.manifest = replace(engine.manifest, card=replace(engine.manifest.card, task=task))
        with pytest.raises(EngineError, match=f"output holds {bad}"):
            Predictor(engine)(frame)


def test_other_tasks_answer_with_the_array_alone() -> None:
    engine = LinearEngine(task="embed", labels=())
    first, second = (Predictor(engine)(frame) for frame in frames(2))
    assert first.top == second.top == ()
    assert first.array.shape == (CLASSES,) and not np.array_equal(first.array, second.array)
    assert not np.shares_memory(first.array, engine.output)  # it outlives the next run


def test_a_batch_equals_its_frames_one_at_a_time() -> None:
    engine = LinearEngine(max_batch=4)
    predictor = Predictor(engine)
    for count in (1, 3, 4):
        batch = predictor.predict_batch(frames(count))
        singles = [predictor(frame) for frame in frames(count)]
        assert len(batch) == count
        for together, alone in zip(batch, singles, strict=True):
            assert [label for label, _ in together.top] == [label for label, _ in alone.top]
            assert [p for _, p in together.top] == pytest.approx([p for _, p in alone.top], abs=1e-5)
            np.testing.assert_allclose(together.array, alone.array, atol=1e-4)


def test_a_batch_is_one_run_and_has_its_limits() -> None:
    engine = LinearEngine(max_batch=4)
    predictor = Predictor(engine)
    predictor.predict_batch(frames(4))
    assert predictor.predict_batch([]) == [] and engine.runs == 1
    with pytest.raises(EngineError, match=r"batch of 5 frames .* at most 4"):
        predictor.predict_batch(frames(5))


def total_ms(predictions: list[Prediction]) -> float:
    return sum(p.timing.total_ms - p.timing.capture_ms for p in predictions)


@pytest.mark.parametrize("count", [1, 4])
def test_the_stages_add_up_to_the_time_that_passed(count: int) -> None:
    predictor = Predictor(LinearEngine())
    batch = frames(count)
    time.sleep(0.005)
    start = time.perf_counter_ns()
    predictions = predictor.predict_batch(batch)
    passed_ms = (time.perf_counter_ns() - start) / 1e6
    timings = [p.timing for p in predictions]
    assert all(min(t.capture_ms - 5, t.preprocess_ms, t.infer_ms, t.postprocess_ms) > 0 for t in timings)
    assert sum(t.infer_ms for t in timings) >= 2
    assert 0.5 * passed_ms <= total_ms(predictions) <= passed_ms


def test_labels_that_do_not_fit_the_outputs_are_refused() -> None:
    with pytest.raises(EngineError, match="10 outputs and 9 labels"):
        Predictor(LinearEngine(labels=NAMES[:9]))


@pytest.mark.parametrize("shape", [(), (None,), (10,)])
def test_a_classifier_whose_manifest_has_no_classes_is_refused(shape: tuple[int | None, ...]) -> None:
    engine = LinearEngine()
    card = replace(engine.manifest.card, outputs=(TensorSpec("logits", shape, "float32"),))
    engine.manifest = replace(engine.manifest, card=card)
    with pytest.raises(EngineError, match="linear classifies, but its output has the shape") as caught:
        Predictor(engine)
    assert str(list(shape)) in str(caught.value) and caught.value.hint


@pytest.mark.parametrize("count", [2, 4])
def test_labels_that_do_not_fit_the_real_answer_are_refused(count: int) -> None:
    predictor = Predictor(FixedEngine([1.0, 2.0, 3.0], labels=NAMES[:count]), top_k=1)
    with pytest.raises(EngineError, match=f"3 outputs and {count} labels") as caught:
        predictor(frames(1)[0])
    assert caught.value.hint


def test_a_classifier_that_answers_with_a_map_is_refused() -> None:
    engine = FixedEngine([1.0, 2.0])
    engine.logits = np.zeros((1, 2, 2), np.float32)
    with pytest.raises(EngineError, match=r"answers with the shape \[2, 2\]"):
        Predictor(engine)(frames(1)[0])
