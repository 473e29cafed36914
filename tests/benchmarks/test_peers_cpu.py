"""The peers' benchmark on a tiny model, without what takes minutes, and the table that is made of it."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("openvino")

from benchmarks import peers_cpu
from benchmarks.cpu_latency import Subject, normalised
from benchmarks.readme import peers_cpu as table
from tests.models import SIZE, random_images, tiny_preprocess, tiny_vit, write_noise
from vitedge.bench.document import Candidate, Document, Interval, Judged, Timed, load_document
from vitedge.bench.environment import environment
from vitedge.images import list_images
from vitedge.specs import to_dict
from vitedge.workspace import write_json


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    folder = tmp_path_factory.mktemp("peers")
    module, card = tiny_vit()
    files = list_images(write_noise(folder / "noise", 6))
    return Subject(module, card, files, files, folder / "built", np.zeros((1, 3, *SIZE), np.float32))


def test_engines_of_others_are_judged_and_timed_as_contenders(subject: Subject, tmp_path: Path) -> None:
    found = peers_cpu.section("focus", subject, argparse.Namespace(engines=["OpenVINO"], seconds=0.0, judge=4))
    assert [one["name"] for one in found["document"]["candidates"]] == ["torch", "OpenVINO"] and found["ratios"] == {}
    torch, openvino = found["document"]["candidates"]
    assert not torch["failed"] and torch["judged"]["images"] == 4 and torch["timings"][0]["calls"] > 0
    assert openvino["judged"]["sqnr_db"] > 25 and openvino["float_type"] in ("bf16", "fp32")
    assert set(found["frontier"]) <= {"torch", "OpenVINO"}
    write_json(tmp_path / "document.json", found["document"])
    assert load_document(tmp_path / "document.json").reference == "torch"


def test_pixels_are_normalised_as_torch_gets_them_and_once(subject: Subject) -> None:
    images, calls = random_images(2, tiny_preprocess()), list[np.ndarray]()
    with ExitStack() as stack:
        candidate = peers_cpu.torch_eager(subject, stack)
        told = replace(candidate, run=lambda: calls.append(subject.images.copy()) or candidate.run())  # type: ignore[func-returns-value]
        session = peers_cpu.Pixels(told, replace(subject.card, patch=None), subject.images, np.zeros((1, *SIZE, 3), np.uint8))
        for image in (images[0], images[0], images[1]):
            session.write(0, image)
            session.run(1)
    np.testing.assert_allclose(calls[0], normalised(images[0], subject.card.preprocess), atol=1e-6)
    np.testing.assert_array_equal(calls[0], calls[1])
    np.testing.assert_allclose(calls[2], normalised(images[1], subject.card.preprocess), atol=1e-6)


def candidate(name: str, ms: float, sqnr_db: float | None, failed: str = "") -> Candidate:
    timed = Timed(1, None, 1, 30, (ms,) * 30, 0, (ms,) * 101, 0.0, Interval(ms, ms), 1000 / ms)
    judged = Judged(4, sqnr_db=sqnr_db, right="ff")
    found = Candidate(name, "vit", "int8", "x", judged=judged, timings=(timed,))
    return replace(found, judged=None, timings=(), failed=failed) if failed else found


def test_the_table_shows_ratios_to_ours_the_frontier_and_what_failed() -> None:
    ones = (candidate("torch", 80, None), candidate("NNCF", 25, 20), candidate("broken", 1, None, "timing batch 1: no"))
    found = Document(environment(), (*ones, candidate(peers_cpu.OURS, 20, 30)), "torch")
    ratios = peers_cpu.ratios(found)
    assert ratios["torch"][0] == 4 and ratios["NNCF"][1] <= 1.25 <= ratios["NNCF"][2] and peers_cpu.OURS not in ratios
    assert set(peers_cpu.on_frontier(found)) == {"torch", peers_cpu.OURS}  # the reference is exact, if slow
    kept = [peers_cpu.stripped(one) for one in found.candidates]
    assert not any(timed.rounds_ms for one in kept for timed in one.timings)
    assert not any(one.judged.right for one in kept if one.judged)
    part = {"ratios": ratios, "frontier": [peers_cpu.OURS], "document": to_dict(replace(found, candidates=tuple(kept)))}
    facts = {"machine": "Cortex-A78", "cores": "6", "int8": "asimddp", "date": "2026-11-23", "command": "python x.py"}
    document = {
        "environment": facts, "versions": {"torch": "2.13.0", "nncf": None}, "batch": 1, "seconds": 10.0,
        "ratio_to": peers_cpu.OURS, "interval": "95 %", "sections": {"vit-ti16": part, "focus": part},
    }  # fmt: skip
    lines = table(document).splitlines()
    assert lines[0].startswith("| engine | ViT-Ti/16 (random), ms | × vitedge int8 | SQNR, dB | ViT-S/14 (trained), ms |")
    assert lines[2].startswith("| torch | 80.00 | 4.00 (") and "| reference |" in lines[2]
    assert "failed: timing batch 1: no" in lines[4]
    assert lines[5].startswith("| **vitedge int8** | **20.00 ●** | **1.00** | **30.0** |")
    assert "nncf" not in lines[-1] and "of 4 images" in lines[-1]
