"""Cameras on a device: V4L2 and GStreamer, as far as a machine without either can show.

The kernels that tests run on have no loopback camera. So OpenCV's own V4L2 code runs, in a process of its own, on a camera
that v4l2_device.c puts under it: every call to the kernel is answered as a driver would. What that does not show is a real
driver's behaviour. GStreamer runs for real where the system's Python has an OpenCV with it (apt install python3-opencv), with a
test picture in the place of the CSI camera that only a Jetson has.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.engines import ROOT
from vitedge.errors import VitEdgeError
from vitedge.runtime.camera import CameraOptions, is_live, open_source
from vitedge.runtime.devices import csi_pipeline, with_sink
from vitedge.runtime.opencv import load_cv2

pytest.importorskip("cv2")

CAMERA = "/dev/video77"
PYTHON = "/usr/bin/python3"
WITH_GSTREAMER = "import cv2, numpy, PIL; assert cv2.videoio_registry.hasBackend(cv2.CAP_GSTREAMER)"
# Opens a source, reads some frames and prints what there is to know, or the error.
LOOK = """
import json, sys, time
from vitedge.errors import VitEdgeError
from vitedge.runtime.camera import CameraOptions, open_source
address, options, count = json.loads(sys.argv[1])
if options.get("size"): options["size"] = tuple(options["size"])
states, frames = set(), []
try:
    with open_source(address, CameraOptions(**options)) as source:
        for frame in source:
            frames.append(frame)
            if len(frames) == count:
                break
    print(json.dumps({
        "name": source.name, "fps": source.fps, "shapes": [list(frame.image.shape) for frame in frames],
        "colour": frames[-1].image[10, 10].tolist(), "skipped": source.skipped, "balanced":
        source.captured == source.given + source.dropped, "index": frames[-1].index,
        "seconds": (frames[-1].captured_ns - frames[0].captured_ns) / 1e9,
    }))
except VitEdgeError as error:
    print(json.dumps({"error": str(error), "hint": error.hint}))
"""


def look(python: str, address: str, options: dict[str, Any], count: int, environment: dict[str, str]) -> dict[str, Any]:
    arguments = json.dumps([address, options, count])
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", **environment}
    done = subprocess.run(
        [python, "-c", LOOK, arguments], capture_output=True, text=True, env=environment, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


# V4L2


@pytest.fixture(scope="module")
def preloaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that has a camera."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if not sys.platform.startswith("linux") or compiler is None:
        pytest.skip("the camera is for Linux, and has to be compiled")
    folder = tmp_path_factory.mktemp("v4l2")
    source = Path(__file__).with_name("v4l2_device.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-w", "-o", str(folder / "v4l2.so"), str(source), "-ldl"], check=True)
    Image.new("RGB", (1280, 720), (10, 200, 30)).save(folder / "picture.jpg")
    return {"LD_PRELOAD": str(folder / "v4l2.so"), "V4L2_PATH": CAMERA, "V4L2_JPEG": str(folder / "picture.jpg")}


@pytest.mark.parametrize(
    ("address", "options", "shape", "colour"),
    [
        ("77", {}, [480, 640, 3], [254, 0, 0]),
        (CAMERA, {"pixel_format": "MJPG", "size": [1280, 720], "fps": 30}, [720, 1280, 3], [10, 200, 30]),
        (CAMERA, {"pixel_format": "GREY"}, [480, 640, 3], [90, 90, 90]),
        ("77", {"size": [1280, 720], "fps": 10}, [720, 1280, 3], [254, 0, 0]),
    ],
)
def test_a_camera_gives_what_it_is_asked_for(
    preloaded: dict[str, str], address: str, options: dict[str, Any], shape: list[int], colour: list[int]
) -> None:
    found = look(sys.executable, address, options, 15, preloaded)
    assert found["shapes"] == [shape] * 15 and found["colour"] == pytest.approx(colour, abs=3)
    fps = options.get("fps", 30)
    assert (found["name"], found["fps"]) == (address, fps)
    assert found["seconds"] > 0.9 * 14 / fps and found["balanced"] and found["skipped"] == []


@pytest.mark.parametrize(
    ("options", "error", "hint"),
    [
        ({"size": [1920, 1080]}, "camera 77 does not give 1920x1080 in YUYV, it offers 640x480, 1280x720", "one of these"),
        ({"size": [1280, 720], "fps": 30}, "does not give 30 frames a second at 1280x720 in YUYV but 10", "another size"),
        ({"pixel_format": "H264"}, "camera 77 does not give H264 but YUYV", "it offers YUYV, MJPG, GREY"),
        ({"fps": 60}, "does not give 60 frames a second at 640x480 in YUYV but 30", "ask for that rate"),
    ],
)
def test_what_a_camera_refuses_is_said_with_what_it_offers(
    preloaded: dict[str, str], options: dict[str, Any], error: str, hint: str
) -> None:
    found = look(sys.executable, "77", options, 1, preloaded)
    assert error in found["error"] and hint in found["hint"]


@pytest.mark.parametrize(
    ("case", "error", "hint"),
    [
        ("busy", f"camera 77 cannot be opened: {CAMERA} is busy", f"fuser -v {CAMERA}"),
        ("denied", f"camera 77 cannot be opened: you are not allowed to use {CAMERA}", "usermod -aG video"),
        ("metadata", f"camera 77 cannot be opened: {CAMERA} takes no pictures", "several devices"),
    ],
)
def test_why_a_camera_cannot_be_used_is_said(preloaded: dict[str, str], case: str, error: str, hint: str) -> None:
    found = look(sys.executable, "77", {}, 1, {**preloaded, "V4L2_CASE": case})
    assert found["error"] == error and hint in found["hint"]


def test_a_camera_that_is_unplugged_ends_or_is_opened_again(preloaded: dict[str, str]) -> None:
    """Opened again, the camera gives its 30 frames anew."""
    environment = {**preloaded, "V4L2_CASE": "unplugged"}
    ended = look(sys.executable, "77", {"retry": False}, 100, environment)
    count = ended["index"] + 1
    assert 25 < count <= 30 and ended["skipped"] == [f"camera 77 stopped after {count} frames"] and ended["balanced"]
    again = look(sys.executable, "77", {}, 40, environment)
    assert again["index"] >= 39 and again["balanced"]
    assert again["skipped"][0].startswith("camera 77 was lost once, for 0.")


def test_a_device_that_is_no_camera_or_is_not_there_is_an_error(preloaded: dict[str, str]) -> None:
    found = look(sys.executable, "/dev/video78", {}, 1, preloaded)
    assert found["error"] == "camera /dev/video78 cannot be opened: there is no /dev/video78" and "cameras" in found["hint"]


# GStreamer


def test_the_pipeline_of_a_csi_camera_keeps_only_the_newest_buffer() -> None:
    assert csi_pipeline(1, CameraOptions(size=(1920, 1080), fps=59.94)) == (
        "nvarguscamerasrc sensor-id=1 ! video/x-raw(memory:NVMM), width=1920, height=1080, framerate=2997/50, format=NV12"
        " ! nvvidconv ! video/x-raw, format=BGRx ! videoconvert ! video/x-raw, format=BGR"
        " ! appsink drop=true max-buffers=1 sync=false"
    )
    assert "width=1280, height=720, framerate=30/1" in csi_pipeline(0, CameraOptions())


def test_a_pipeline_without_a_sink_gets_one() -> None:
    ending = " ! videoconvert ! video/x-raw, format=BGR ! appsink drop=true max-buffers=1 sync=false"
    assert with_sink("v4l2src ! jpegdec") == "v4l2src ! jpegdec" + ending == with_sink(" v4l2src ! jpegdec ! ")
    assert with_sink("appsinksrc name=appsink") == "appsinksrc name=appsink" + ending
    for whole in ("v4l2src ! appsink", "v4l2src !appsink drop=true name=x"):
        assert with_sink(whole) == whole


@pytest.mark.parametrize("address", ["csi://0", "gst://videotestsrc"])
def test_an_opencv_without_gstreamer_says_where_one_is(address: str) -> None:
    cv2 = load_cv2()
    if cv2.videoio_registry.hasBackend(cv2.CAP_GSTREAMER):
        pytest.skip("this OpenCV has GStreamer")
    with pytest.raises(VitEdgeError, match=f"{address} takes an OpenCV with GStreamer") as caught:
        open_source(address)
    assert "python3-opencv" in str(caught.value.hint)


@pytest.fixture(scope="module")
def gstreamer() -> str:
    if (
        shutil.which(PYTHON) is None
        or subprocess.run([PYTHON, "-c", WITH_GSTREAMER], capture_output=True, check=False).returncode
    ):
        pytest.skip("the system's Python has no OpenCV with GStreamer: apt install python3-opencv python3-pil")
    return PYTHON


@pytest.mark.parametrize(
    ("end", "shape"),
    [
        ("video/x-raw, width=320, height=240, framerate=50/1", [240, 320, 3]),
        ("video/x-raw, format=NV12, width=320, height=240", [240, 320, 3]),
        ("video/x-raw, format=GRAY8, width=320, height=240 ! appsink drop=true max-buffers=1", [240, 320, 3]),
        ("video/x-raw, format=BGRx, width=320, height=240 ! appsink drop=true max-buffers=1", [240, 320, 3]),
        ("video/x-raw, format=GRAY16_LE, width=320, height=240 ! appsink drop=true max-buffers=1", [240, 320, 3]),
    ],
)
def test_a_pipeline_gives_rgb_whatever_its_pixels_are(gstreamer: str, end: str, shape: list[int]) -> None:
    found = look(gstreamer, f"gst://videotestsrc is-live=true pattern=white ! {end}", {}, 8, {})
    assert found["shapes"] == [shape] * 8 and found["balanced"]
    assert min(found["colour"]) >= 234  # which is white in video range


def test_a_pipeline_that_ends_or_does_not_exist_says_so(gstreamer: str) -> None:
    caps = "video/x-raw, width=320, height=240, framerate=25/1"
    ended = look(gstreamer, f"gst://videotestsrc is-live=true num-buffers=10 ! {caps}", {"retry": False}, 100, {})
    assert ended["skipped"][0].endswith(f"stopped after {ended['index'] + 1} frames")
    for pipeline in ("rtspsrc location=rtsp://u:geheim@h/x ! ! !", "nosuchsrc location=rtsp://u:geheim@h/x"):
        wrong = look(gstreamer, f"gst://{pipeline}", {"timeout_s": 0.5}, 1, {})  # at the second one some OpenCVs hang
        assert "cannot be opened as a GStreamer pipeline" in wrong["error"] or "gave no frame within 0.5 s" in wrong["error"]
        assert "gst-launch-1.0" in wrong["hint"] and "geheim" not in wrong["error"] + wrong["hint"]


def test_the_csi_pipeline_runs_with_a_test_picture_in_the_place_of_the_sensor(gstreamer: str) -> None:
    pipeline = csi_pipeline(0, CameraOptions(size=(640, 480), fps=30)).replace("(memory:NVMM)", "")
    pipeline = pipeline.replace("nvarguscamerasrc sensor-id=0", "videotestsrc is-live=true pattern=red")
    found = look(gstreamer, "gst://" + pipeline.replace("nvvidconv", "videoconvert"), {}, 20, {})
    assert found["shapes"] == [[480, 640, 3]] * 20 and found["colour"] == pytest.approx([255, 0, 0], abs=5)
    assert found["fps"] == 30.0 and found["seconds"] > 0.9 * 19 / 30


def test_a_frame_size_that_changes_in_a_pipeline_is_passed_on(gstreamer: str, tmp_path: Path) -> None:
    for number in range(60):
        Image.new("RGB", (320, 240) if number < 30 else (160, 120)).save(tmp_path / f"{number:03}.jpg")
    pipeline = f"multifilesrc location={tmp_path}/%03d.jpg caps=image/jpeg,framerate=30/1 ! jpegdec ! identity sync=true"
    found = look(gstreamer, f"gst://{pipeline}", {"retry": False}, 1000, {})
    assert found["shapes"][0] == [240, 320, 3] and found["shapes"][-1] == [120, 160, 3] and len(found["shapes"]) > 20


# which is which


def test_what_is_live_is_known_without_opening_it() -> None:
    for address in ("0", "/dev/video0", "/dev/v4l/by-id/x", "csi://0", "rtsp://h/x", "HTTP://h/x", "gst://x", "synthetic"):
        assert is_live(address)
    for address in ("clip.mp4", "images", "./0", "./synthetic", "100", "ftp://h/x"):
        assert not is_live(address) and is_live(address, CameraOptions(realtime=True))
