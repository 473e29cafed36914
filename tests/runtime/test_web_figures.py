"""Counts, rates and times as programs read them: Prometheus' own parser, and JSON."""

from __future__ import annotations

import json
import math
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from tests.runtime.web import TIMING, TOP, answer, card_of, frame_of
from vitedge.runtime import web_figures
from vitedge.runtime.vitals import Reading
from vitedge.runtime.web_figures import BOUNDS_S, MOST_A_MESSAGE, REMEMBERED, Figures
from vitedge.specs import STAGES, Prediction, Timing

NAMES = ("0", 'rtsp://cam/"a"\\b\nc')


class Clock:
    """In place of `time`, so that rates and ages are exact."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(web_figures, "time", SimpleNamespace(perf_counter=lambda: self.now, time=lambda: 1.7e9))

    def note(self, figures: Figures, count: int, interval_s: float, *, camera: int = 0, captured_each: int = 1) -> None:
        for _ in range(count):
            self.now += interval_s
            done = figures.latest()["cameras"][camera]["processed"] + 1
            figures.note(camera, frame_of(done), answer(), captured_each * done, (captured_each - 1) * done)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def first(figures: Figures) -> dict[str, Any]:
    found: dict[str, Any] = figures.latest()["cameras"][0]
    return found


def test_prometheus_reads_every_metric_with_its_type_and_help() -> None:
    parser = pytest.importorskip("prometheus_client.parser")
    figures = Figures(NAMES, card_of(), "t")
    for index in range(3):
        figures.note(0, frame_of(index), answer(), captured=5 + index, dropped=2)
    figures.note(1, frame_of(0), Prediction(TOP, answer().array, Timing(0.0, 0.0, 9000.0, 0.0)), captured=1, dropped=0)
    figures.tell(1, "lost")
    figures.measured([Reading("gpu", "temperature", 61.5), Reading("VDD_IN", "power", 7.9)])
    text = figures.metrics(viewers=2)
    assert text.endswith("\n")
    families = {family.name: family for family in parser.text_string_to_metric_families(text)}
    assert all(family.documentation for family in families.values())
    kinds = {name: family.type for name, family in families.items()}
    assert kinds == {
        "vitedge_info": "gauge",
        "process_start_time_seconds": "gauge",
        "vitedge_frames_captured": "counter",
        "vitedge_frames_processed": "counter",
        "vitedge_frames_dropped": "counter",
        "vitedge_camera_up": "gauge",
        "vitedge_last_frame_age_seconds": "gauge",
        "vitedge_latency_seconds": "histogram",
        "vitedge_stage_seconds": "histogram",
        "vitedge_temperature_celsius": "gauge",
        "vitedge_power_watts": "gauge",
        "vitedge_viewers": "gauge",
    }
    samples = [sample for family in families.values() for sample in family.samples]
    keys = [(sample.name, tuple(sorted(sample.labels.items()))) for sample in samples]
    assert len(set(keys)) == len(keys)

    def value(name: str, **labels: str) -> float:
        (found,) = [s.value for s in samples if s.name == name and labels.items() <= s.labels.items()]
        return float(found)

    assert [value(f"vitedge_frames_{what}_total", camera="0") for what in ("captured", "processed", "dropped")] == [7, 3, 2]
    assert value("vitedge_camera_up", camera="0") == 1 and value("vitedge_camera_up", camera="1") == 0
    assert value("vitedge_camera_up", source='rtsp://cam/"a"\\bc') == 0  # the end of a line is no part of a name
    assert value("vitedge_latency_seconds_count", camera="0") == 3
    assert value("vitedge_latency_seconds_sum", camera="0") == pytest.approx(3 * TIMING.total_ms / 1e3)
    assert value("vitedge_latency_seconds_bucket", camera="0", le="0.01") == 0
    assert value("vitedge_latency_seconds_bucket", camera="0", le="0.025") == 3  # which is what they took
    assert value("vitedge_latency_seconds_bucket", camera="1", le=str(BOUNDS_S[-1])) == 0
    assert value("vitedge_latency_seconds_bucket", camera="1", le="+Inf") == 1
    sums = [value("vitedge_stage_seconds_sum", camera="0", stage=stage) for stage in STAGES]
    assert sums == pytest.approx([0.009, 0.0015, 0.00375, 0.06, 0.00075])
    assert value("vitedge_temperature_celsius", sensor="gpu") == 61.5 and value("vitedge_viewers") == 2


def test_without_sensors_there_are_no_metrics_of_them() -> None:
    text = Figures(["0"], card_of(), "t").metrics(0)
    assert "temperature" not in text and "power" not in text


def test_rates_are_those_of_the_last_seconds_and_sink_when_no_frame_comes(clock: Clock) -> None:
    figures = Figures(["0"], card_of(), "t")
    assert (first(figures)["fps"], first(figures)["camera_fps"]) == (0, 0)
    clock.note(figures, 1, 0.04)
    assert first(figures)["fps"] == 0
    clock.note(figures, 99, 0.04, captured_each=3)
    assert first(figures)["fps"] == pytest.approx(25, abs=0.01)
    assert first(figures)["camera_fps"] == pytest.approx(75, abs=0.5)
    clock.now += 0.03
    assert first(figures)["fps"] == pytest.approx(25, abs=0.01)  # the next is not late yet
    rates = []
    for _ in range(4):
        clock.now += 1
        rates.append(first(figures)["fps"])
    assert rates == sorted(rates, reverse=True) and rates[0] > 5 and rates[-1] == 0


def test_a_frame_every_few_seconds_is_a_rate_too(clock: Clock) -> None:
    figures = Figures(["0"], card_of(), "t")
    clock.note(figures, 5, 4.0)
    assert first(figures)["fps"] == pytest.approx(0.25, abs=0.01)


def test_a_camera_ails_when_it_says_so_or_gives_nothing_for_ten_seconds(clock: Clock) -> None:
    figures = Figures(["0", "1"], card_of(), "t")
    assert figures.ailing() == []
    clock.now += 11
    assert figures.ailing() == ["0: no frame for 11 s", "1: no frame for 11 s"]
    clock.note(figures, 1, 0.0)
    assert figures.ailing() == ["1: no frame for 11 s"]
    figures.tell(0, "0 is lost, the next try is in 4 s")
    assert figures.ailing()[0] == "0: 0 is lost, the next try is in 4 s"
    figures.tell(0, "")
    assert figures.ailing() == ["1: no frame for 11 s"]


def test_the_newest_answer_is_told_with_all_that_programs_ask_for() -> None:
    figures = Figures(["cam"], card_of(), "a title")
    empty = figures.latest()
    assert empty["cameras"][0]["index"] is None and empty["cameras"][0]["timing"] == {}
    figures.note(0, frame_of(7, 120, 160), answer(), captured=9, dropped=1)
    figures.remark(0, "cannot be drawn")
    found = json.loads(json.dumps(figures.latest()))
    assert (found["title"], found["model"], found["task"]) == ("a title", "tiny", "classify")
    camera = found["cameras"][0]
    assert (camera["index"], camera["file"], camera["size"], camera["note"]) == (7, "7.png", [160, 120], "cannot be drawn")
    assert (camera["captured"], camera["processed"], camera["dropped"]) == (9, 1, 1)
    assert camera["top"] == [{"label": label, "probability": share} for label, share in TOP]
    assert camera["timing"]["infer_ms"] == 20 and camera["timing"]["total_ms"] == TIMING.total_ms


def test_a_message_has_what_is_new_since_the_last_one() -> None:
    figures = Figures(["a", "b"], card_of(), "t")
    for index in range(REMEMBERED + 50):
        figures.note(0, frame_of(index), answer(), index, 0)
    first_message, numbers = figures.message()
    told = json.loads(first_message)["cameras"]
    assert len(told[0]["samples"]) == REMEMBERED and told[1]["samples"] == [] and numbers == [REMEMBERED + 50, 0]
    assert told[0]["samples"][-1][0] == REMEMBERED + 50
    assert told[0]["samples"][-1][2:] == [3.0, 0.5, 1.25, 20.0, 0.25]
    assert json.loads(figures.message(numbers)[0])["cameras"][0]["samples"] == []
    figures.note(0, frame_of(0), answer(), 0, 0)
    figures.note(1, frame_of(0), answer(), 0, 0)
    second, numbers = figures.message(numbers)
    assert [len(camera["samples"]) for camera in json.loads(second)["cameras"]] == [1, 1]
    assert len(json.loads(figures.message([0, 0])[0])["cameras"][0]["samples"]) == MOST_A_MESSAGE


def test_many_threads_count_exactly() -> None:
    figures = Figures(["a", "b"], card_of(), "t")

    def work(camera: int) -> None:
        for index in range(500):
            figures.note(camera, frame_of(index), answer(), index, 0)
            if not index % 50:
                figures.metrics(0)
                figures.message()

    threads = [threading.Thread(target=work, args=(number % 2,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [camera["processed"] for camera in figures.latest()["cameras"]] == [1000, 1000]


def test_a_frame_is_noted_in_microseconds() -> None:
    """A bound that only something like a lock held for long would break."""
    figures, frame, said = Figures(["a"], card_of(), "t"), frame_of(0), answer()
    took = []
    for _ in range(300):
        began = time.perf_counter()
        figures.note(0, frame, said, 1, 0)
        took.append(time.perf_counter() - began)
    assert math.fsum(sorted(took)[:150]) / 150 < 1e-3
