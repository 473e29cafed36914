"""Images a second from disk to answer: real engines on real files."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engines import Made
from vitedge.bench.throughput import measure_throughput
from vitedge.errors import VitEdgeError
from vitedge.images import ImageFile, list_images


def test_each_engine_answers_the_files_for_its_time(made: Made) -> None:
    told: list[float] = []
    folders = [made.engines["openvino", variant] for variant in ("fp32", "int8")]
    found = measure_throughput(folders, list_images(made.images), 0.3, told.append)
    assert all(one.images_per_s > 10 and one.streams >= 1 and 1 <= one.batch <= 8 for one in found)
    assert told[-1] == 1.0 and told == sorted(told)


def test_files_that_cannot_be_decoded_are_an_error_and_do_not_go_round_for_ever(made: Made, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(VitEdgeError, match="none of 1 images could be decoded"):
        measure_throughput([made.engines["openvino", "int8"]], [ImageFile(tmp_path / "broken.png", None)], 0.3)


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("inf"), float("nan")])
def test_it_takes_time(made: Made, seconds: float) -> None:
    with pytest.raises(VitEdgeError, match="a positive number of seconds"):
        measure_throughput([made.engines["openvino", "int8"]], list_images(made.images), seconds)
