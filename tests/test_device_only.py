"""A device has numpy, Pillow and one backend: an environment with the extra `cpu` alone runs engines that were made elsewhere."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engines import CHECKPOINT, IMAGES, MODEL, ROOT, Made
from vitedge.images import decode, list_images
from vitedge.runtime.engine import open_engine
from vitedge.runtime.predictor import Predictor
from vitedge.specs import Frame

CONSTRAINTS = ROOT / "constraints.txt"
COMPILER = "the package 'torch' is not installed"
HINT = "pip install '.[compile]'"
NO_NETWORK = ("connection", "retrying", "timed out", "name resolution")  # as pip says it


class Device:
    """The environment, a folder to work in, and the engine that was copied there."""

    def __init__(self, environment: Path, folder: Path, made: Made) -> None:
        self.bin, self.folder = environment / "bin", folder
        self.engine = Path(shutil.copytree(made.engines["openvino", "int8"], folder / "engine"))
        self.images = Path(shutil.copytree(made.images, folder / "images"))
        self.graph = Path(shutil.copy(made.graphs["int8"], folder / "int8.onnx"))

    def run(self, *command: object) -> subprocess.CompletedProcess[str]:
        """Run a program of the environment, with nothing of the repository in reach."""
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
        program, *arguments = map(str, command)
        return subprocess.run(
            [self.bin / program, *arguments], cwd=self.folder, env=environment, capture_output=True, text=True, check=False
        )

    def refused(self, *arguments: object) -> str:
        """What `vitedge` says on stderr when it exits 1."""
        done = self.run("vitedge", *arguments)
        assert done.returncode == 1, done
        assert "Traceback" not in done.stderr and done.stdout == ""
        return done.stderr


@pytest.fixture(scope="module")
def environment(wheel: Path) -> Path:
    """A virtual environment below .cache/, kept from run to run while the pinned versions stay."""
    pinned = CONSTRAINTS.read_bytes() + (ROOT / "pyproject.toml").read_bytes() + platform.python_version().encode()
    folder = ROOT / ".cache" / f"device-{hashlib.sha256(pinned).hexdigest()[:12]}"
    if not (folder / "ready").is_file():
        for older in folder.parent.glob("device-*"):
            shutil.rmtree(older)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        _install(folder, "--constraint", CONSTRAINTS, f"{wheel}[cpu]")
        (folder / "ready").touch()
    _install(folder, "--no-deps", "--no-index", "--force-reinstall", wheel)  # the package as it is now
    return folder


def _install(environment: Path, *arguments: object) -> None:
    command = [environment / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    if done.returncode and any(word in done.stderr.lower() for word in NO_NETWORK):
        pytest.skip(f"pip cannot reach the package index: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def device(environment: Path, made: Made, tmp_path_factory: pytest.TempPathFactory) -> Device:
    return Device(environment, tmp_path_factory.mktemp("device"), made)


def test_neither_torch_nor_onnx_nor_opencv_is_there(device: Device) -> None:
    code = """
import importlib.util, vitedge
print(vitedge.__file__)
print([name for name in ("torch", "onnx", "onnxruntime", "onnxscript", "cv2", "safetensors") if importlib.util.find_spec(name)])
"""
    origin, found = device.run("python", "-c", code).stdout.splitlines()
    assert Path(origin).is_relative_to(device.bin.parent)
    assert found == "[]"


def test_an_engine_built_elsewhere_gives_the_same_answers(device: Device, made: Made) -> None:
    done = device.run("vitedge", "run", device.engine, "--source", device.images, "--json")
    assert done.returncode == 0, done.stderr
    given = [json.loads(line) for line in done.stdout.splitlines()]
    files = list_images(made.images)
    assert [line["name"] for line in given] == [file.path.name for file in files]
    with open_engine(made.engines["openvino", "int8"]) as engine:
        predictor = Predictor(engine)
        for index, (line, file) in enumerate(zip(given, files, strict=True)):
            expected = predictor(Frame(decode(file.path), index, 0)).top
            assert line["top"][0]["label"] == expected[0][0]
            assert line["top"][0]["probability"] == pytest.approx(expected[0][1], abs=0.02)
    assert f"{IMAGES} frames" in done.stderr


def test_the_python_interface_runs_there(device: Device) -> None:
    code = """
import sys
from pathlib import Path
from vitedge import Frame, Predictor, open_engine
from vitedge.images import decode, list_images
file = list_images(Path("images"))[0]
with open_engine("engine") as engine:
    print(Predictor(engine)(Frame(decode(file.path), 0, 0)).top[0][0])
print(sorted({"torch", "onnx", "cv2"} & set(sys.modules)))
"""
    done = device.run("python", "-c", code)
    assert done.returncode == 0, done.stderr
    label, heavy = done.stdout.splitlines()
    assert label in (device.engine / "labels.txt").read_text().splitlines() and heavy == "[]"


def test_an_onnx_file_is_built_there(device: Device) -> None:
    done = device.run("vitedge", "build", device.graph)
    assert done.returncode == 0, done.stderr
    assert device.run("vitedge", "run", done.stdout.strip(), "--source", device.images, "--limit", 1).returncode == 0


def test_doctor_passes_openvino_and_says_how_to_get_the_other(device: Device) -> None:
    done = device.run("vitedge", "doctor")
    assert done.returncode == 0, done
    lines = done.stdout.splitlines()
    assert any(line.startswith("PASS  openvino") for line in lines)
    assert any(line.startswith("none  onnxruntime") and "not installed" in line for line in lines)
    assert HINT in done.stdout


def test_bench_measures_latency_and_accuracy(device: Device) -> None:
    files = ["--json", device.folder / "bench.json", "--report", device.folder / "report.html"]
    done = device.run("vitedge", "bench", device.engine, "--images", device.images, "--seconds", 0.01, *files)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads((device.folder / "bench.json").read_text())["candidates"]
    judged, (timed,) = found["judged"], found["timings"]
    assert judged["images"] == IMAGES and judged["top1"] > 80 and min(timed["rounds_ms"]) > 0
    assert "<html" in (device.folder / "report.html").read_text()


def test_what_needs_the_compiler_says_which_extra_to_install(device: Device) -> None:
    images = ["--images", device.images]
    for arguments in (
        ["make", MODEL, "--checkpoint", CHECKPOINT, *images],
        ["export", MODEL, "--checkpoint", CHECKPOINT],
        ["calibrate", device.graph, *images],
        ["quantize", device.graph, "--scales", "scales.json"],
    ):
        said = device.refused(*arguments)
        assert COMPILER in said and HINT in said, said


def test_video_and_pictures_to_save_say_which_extra_to_install(device: Device) -> None:
    (device.folder / "clip.mp4").write_bytes(b"not looked at")
    for arguments in (["--source", "clip.mp4"], ["--source", "0"], ["--source", device.images, "--save", "out"]):
        said = device.refused("run", device.engine, *arguments)
        assert "opencv-python-headless" in said and "pip install '.[camera]'" in said, said


def test_commands_that_need_no_backend_work_there(device: Device) -> None:
    for arguments in (["models"], ["init", "new"], ["--version"], ["--help"]):
        done = device.run("vitedge", *arguments)
        assert (done.returncode, done.stderr) == (0, ""), done
    assert (device.folder / "new" / "calibration" / "README.md").is_file()
