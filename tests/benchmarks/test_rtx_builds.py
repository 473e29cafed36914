"""The benchmark of TensorRT-RTX builds measures a build of its own, and says what went wrong instead of stopping."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed", exc_type=ImportError)

from benchmarks import rtx_builds
from benchmarks.rtx_builds import Model, build_alone, calibration_images, earlier_rows, in_half, model_rows, weights_mib
from tests.engines import Made
from vitedge.errors import VitEdgeError
from vitedge.specs import Recipe


def test_a_build_says_what_it_cost(made: Made) -> None:
    cost = build_alone(made.graphs["fp32"], "8.6")
    assert weights_mib(made.graphs["fp32"]) < cost["size_mib"] < 10
    assert 0 < cost["before_mib"] < cost["peak_mib"] < 1000
    assert cost["seconds"] > 0 and cost["cpu_seconds"] > 0


def test_a_build_that_fails_gives_its_reason(made: Made) -> None:
    (reason,) = build_alone(made.graphs["fp32"], "8.7").values()  # of Jetson Orin, for which there is TensorRT alone
    assert reason.startswith("TensorRT-RTX does not build for compute capability 8.7")


def test_a_graph_that_cannot_be_made_gives_its_reason(made: Made, tmp_path: Path) -> None:
    files = calibration_images(made.images)
    reason = in_half(made.graphs["fp32"], "int8", Recipe(images=1000, min_images=1000), files)
    assert isinstance(reason, str) and reason.startswith("int8: ")


def test_a_model_that_cannot_be_loaded_is_a_row_for_every_type(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rtx_builds.MODELS, "absent", Model(lambda folder: f"{folder}/absent.py:model", images=made.images))
    rows = list(model_rows("absent", ("8.6",)))
    assert [row["type"] for row in rows] == ["fp32", "fp16", "int8"]
    assert all(row["error"].startswith("export: there is no file") for row in rows)


def test_rows_of_models_that_are_not_asked_for_stay(tmp_path: Path) -> None:
    path = tmp_path / "rtx_builds.json"
    assert earlier_rows(path, ["a"]) == []
    path.write_text(json.dumps({"rows": [{"model": "a"}, {"model": "b"}]}))
    assert earlier_rows(path, ["a"]) == [{"model": "b"}]


def test_a_name_that_fits_no_model_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["rtx_builds", "--only", "vit?"])
    with pytest.raises(VitEdgeError, match=r"no model is called vit\?"):
        rtx_builds.main()
