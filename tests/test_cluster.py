"""Judging and calibrating over Ray workers: the same to the last digit, also where one of them is killed."""

from __future__ import annotations

import os
import pickle
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.engines import Made
from vitedge import __version__
from vitedge.bench import accuracy
from vitedge.bench.accuracy import Case, Part, judge
from vitedge.bench.contenders import open_contenders
from vitedge.bench.document import Judged, load_document
from vitedge.cli import app
from vitedge.cluster import _Worker, on_one_core, open_cluster
from vitedge.compiler.calibrate import Calibration, calibrate, save_table
from vitedge.errors import MissingPackageError, VitEdgeError
from vitedge.images import ImageFile, list_images
from vitedge.specs import Recipe

RECIPE = Recipe(method="auto")  # every pass that there is


@pytest.fixture(scope="module", autouse=True)
def ray() -> Iterator[None]:
    """One Ray for all tests: it takes seconds to start."""
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def names(made: Made) -> list[str]:
    return [str(made.engines["openvino", "fp32"]), str(made.engines["openvino", "int8"]), str(made.graphs["int8"])]


@pytest.fixture(scope="module", autouse=True)
def small_parts() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accuracy, "PART", 10)
        yield


@pytest.fixture(scope="module")
def files(made: Made, tmp_path_factory: pytest.TempPathFactory) -> list[ImageFile]:
    """With a damaged one among them."""
    images, damaged = list_images(made.images), tmp_path_factory.mktemp("damaged") / "damaged.png"
    damaged.write_bytes(b"no image")
    return [*images[:13], ImageFile(damaged, images[13].label), *images[13:]]


@pytest.fixture(scope="module")
def table(made: Made, files: list[ImageFile], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What one process finds."""
    return written(calibrate(made.graphs["fp32"], files, RECIPE), tmp_path_factory.mktemp("table"))


def written(found: Calibration, folder: Path) -> bytes:
    save_table(found.table, folder / "table.json")
    return (folder / "table.json").read_bytes()


def alone(names: Sequence[str], files: Sequence[ImageFile]) -> tuple[list[Judged], list[str]]:
    notes: list[str] = []
    with open_contenders(names) as contenders:
        return judge(contenders, files, notes=notes), notes


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_workers_find_the_same_to_the_last_digit(
    made: Made, names: list[str], files: list[ImageFile], table: bytes, workers: int, tmp_path: Path
) -> None:
    notes, told = list[str](), list[int]()
    with open_cluster(str(workers)) as cluster, open_contenders(names) as contenders:
        found = judge(contenders, files, notes=notes, progress=told.append, spread=cluster.judging(partial(on_one_core, names)))
        assert len(set(cluster.pids())) == workers
        assert 0 < cluster.sent < 20_000 and 0 < cluster.received < 100_000
        spread = calibrate(made.graphs["fp32"], files, RECIPE, spread=cluster.surveying())
    assert (found, notes) == alone(names, files)
    assert len(notes) == 1 and told == sorted(told) and told[-1] == len(files)
    assert len(spread.skipped) == 1 and "damaged.png" in spread.skipped[0]
    assert written(spread, tmp_path) == table


def test_a_worker_that_is_killed_costs_time_only(names: list[str], files: list[ImageFile]) -> None:
    many = files * 12
    with open_cluster("2") as cluster, open_contenders(names) as contenders:
        before = cluster.pids()
        spread = cluster.judging(partial(on_one_core, names))

        def deadly(case: Case, given: Sequence[ImageFile]) -> Iterator[Part]:
            for number, part in enumerate(spread(case, given)):
                if number == 3:
                    os.kill(before[0], signal.SIGKILL)
                yield part

        found = judge(contenders, many, spread=deadly)
        after = cluster.pids()
    assert before[0] not in after and before[1] in after and len(after) == 2
    assert found == alone(names, many)[0]


def test_a_reference_that_does_not_open_is_replaced_as_in_one_process(
    made: Made, names: list[str], files: list[ImageFile], tmp_path: Path
) -> None:
    broken = made.copy("openvino", "fp32", tmp_path)
    (broken / "model.bin").write_bytes(b"")
    given = [str(broken), *names[1:]]
    spread_failed, failed = dict[str, str](), dict[str, str]()
    with open_cluster("2") as cluster, open_contenders(given) as contenders:
        found = judge(contenders, files, failed=spread_failed, spread=cluster.judging(partial(on_one_core, given)))
        assert found == judge(contenders, files, failed=failed)
        assert found[0] == Judged(0) and found[1].images == len(files) - 1
        assert spread_failed == failed and len(failed) == 1
        with pytest.raises(VitEdgeError, match="damaged"):
            judge(contenders, files, spread=cluster.judging(partial(on_one_core, given)))


def test_the_command_line_spreads_images(made: Made, names: list[str], tmp_path: Path) -> None:
    tables = [tmp_path / "a.json", tmp_path / "b.json"]
    common = ["calibrate", str(made.graphs["fp32"]), "--images", str(made.images)]
    for table, more in zip(tables, ([], ["--ray", "2"]), strict=True):
        assert CliRunner().invoke(app, [*common, *more, "-o", str(table)]).exit_code == 0
    assert tables[0].read_bytes() == tables[1].read_bytes()
    document = tmp_path / "bench.json"
    command = ["bench", *names[:2], "--images", str(made.images), "--seconds", "0.05", "--json", str(document), "--ray", "2"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    judged = [candidate.judged for candidate in load_document(document).candidates]
    assert judged == alone(names[:2], list_images(made.images))[0]


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingPackageError) as caught, open_cluster("2"):
        pass
    assert "[ray]" in str(caught.value.hint)


@pytest.mark.parametrize("where", ["127.0.0.1:1", "nonsense", "127.0.0.1:99999"])
def test_an_address_at_which_no_cluster_is_says_so(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)  # of the one that the other tests have
    with pytest.raises(VitEdgeError, match=f"no Ray cluster at {where}") as caught, open_cluster(where):
        pass
    assert "--ray local" in str(caught.value.hint)


@pytest.mark.parametrize("where", ["0", "9999"])
def test_a_number_of_workers_that_cannot_be_is_refused(where: str) -> None:
    with pytest.raises(VitEdgeError, match="cannot be started"), open_cluster(where):
        pass


def test_a_worker_says_what_it_does_not_see_and_what_it_is(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # and back again
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cores: None)
    file = list_images(made.images)[0]
    reply = pickle.loads(_Worker("/no/such/folder").answer(1, __version__, 0, [], pickle.dumps((0, [file]))))
    assert reply.absent == Path("/no/such/folder")
    reply = pickle.loads(_Worker(str(tmp_path)).answer(1, "0.0.1", 0, [], pickle.dumps((0, [file]))))
    assert "vitedge 0.0.1 was started" in reply.failure[0]


def test_a_file_that_is_gone_everywhere_is_skipped_as_in_one_process(names: list[str], files: list[ImageFile]) -> None:
    gone = [replace(file, path=file.path.with_name("gone.png")) for file in files[:2]]
    with open_cluster("1") as cluster, open_contenders(names[:1]) as contenders:
        notes: list[str] = []
        found = judge(contenders, [*files[2:], *gone], notes=notes, spread=cluster.judging(partial(on_one_core, names[:1])))
    assert (found, notes) == alone(names[:1], [*files[2:], *gone])
    assert sum("gone.png" in note for note in notes) == 2
