"""What looks after `vitedge run`: the watchdog, signals that reach an engine which hangs, and word to systemd."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from tests.engines import ROOT, Made
from tests.runtime.test_camera_live import endless, opened
from tests.test_cli_run import HANGS, SMALL, start, stop
from vitedge.runtime import capture, live
from vitedge.runtime.camera import open_source
from vitedge.runtime.guard import SIGNALS, Guard

pytest.importorskip("openvino")
pytest.importorskip("torch")
pytest.importorskip("cv2")

SHORT_PATIENCE = "import vitedge.runtime.guard as guard; guard.ENDING_S, guard.PER_SOURCE_S = 1.0, 0.0\n"


def test_the_watchdog_exits_3_when_no_frame_comes(made: Made, tmp_path: Path) -> None:
    process = start(
        made, "--source", "synthetic", "--size", "160x120", "--fps", 0.05, "--watchdog", 1.5, "--save", tmp_path / "out.mp4"
    )
    out, err = process.communicate(timeout=60)
    assert process.returncode == 3 and len(out.splitlines()) == 1
    assert "note: no frame was seen for 1.5 s" in err and "p50 / p99" in err and "Traceback" not in err
    with open_source(str(tmp_path / "out.mp4")) as source:
        assert len(list(source)) == 1


def test_an_engine_that_hangs_is_ended_by_the_watchdog_and_by_a_signal(made: Made) -> None:
    for arguments, number, code in ((("--watchdog", 1), None, 3), ((), signal.SIGTERM, 143)):
        process = start(made, "--source", "synthetic", *SMALL, *arguments, code=SHORT_PATIENCE + HANGS)
        assert process.stdout is not None
        while process.stdout.readline() not in ("hangs\n", ""):
            pass
        if number:
            process.send_signal(number)
        _, err = process.communicate(timeout=30)
        assert process.returncode == code and "hangs: it does not end" in err, err


def test_a_second_signal_ends_at_once(made: Made) -> None:
    process = start(made, "--source", "synthetic", *SMALL, code=HANGS)
    assert process.stdout is not None
    while process.stdout.readline() not in ("hangs\n", ""):
        pass
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None, "it waits for the frame that is in the engine"
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and time.monotonic() - began < 5 and "a second signal came" in err


def test_a_camera_that_is_lost_and_back_is_said_once_each_and_handlers_are_put_back(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capture, "FIRST_WAIT_S", 1.2)
    said: list[str] = []
    told: list[tuple[int, str]] = []
    before = [signal.getsignal(number) for number in SIGNALS]
    lossy = opened([None] * 10, endless())
    monkeypatch.setattr(live, "open_source", lambda *_: lossy)
    with (
        live.stream("0", made.engines["openvino", "int8"]) as answers,
        Guard(answers, say=said.append, tell=lambda *state: told.append(state)) as guard,
    ):
        for _ in answers:
            guard.seen()
            if len(said) == 2:
                break
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert said[0].startswith(f"{lossy.called} is lost, the next try is in ") and said[1].startswith(
        f"{lossy.called} is back after "
    )
    assert told[0] == (0, said[0]) and told[-1] == (0, "")
    assert guard.signal is None and not guard.starved


def test_systemd_hears_that_it_is_ready_alive_and_stopping(made: Made, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(60)
        process = start(made, "--source", "synthetic", *SMALL, NOTIFY_SOCKET=str(tmp_path / "notify"))
        assert [systemd.recv(100) for _ in range(3)] == [b"READY=1", b"WATCHDOG=1", b"WATCHDOG=1"]
        code, _, _ = stop(process, signal.SIGTERM)
        assert code == 0
        heard = b""
        while heard != b"STOPPING=1":
            heard = systemd.recv(100)


def test_the_unit_for_systemd_is_one(tmp_path: Path) -> None:
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze is not installed")
    unit = (ROOT / "examples/systemd/vitedge.service").read_text()
    program = next(line for line in unit.splitlines() if line.startswith("ExecStart=")).removeprefix("ExecStart=").split()[0]
    (tmp_path / "vitedge.service").write_text(unit.replace(program, "/bin/true"))
    done = subprocess.run(
        ["systemd-analyze", "verify", tmp_path / "vitedge.service"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
