"""`vitedge run` over what has no end: stopped by a signal, its reader, its engine, a full disk; what it says and leaves."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engines import ROOT, Made, start_python
from vitedge.cli_run import complete_source
from vitedge.runtime.camera import open_source

pytest.importorskip("openvino")
pytest.importorskip("torch")
pytest.importorskip("cv2")

VITEDGE = "import sys; from vitedge.cli import main; sys.argv[0] = 'vitedge'; main()"
SMALL = ("--size", "160x120", "--fps", "30")
HANGS = """
import time, vitedge.runtime.engine as engine
run, runs = engine.Engine.run, []
def hanging(self, count):
    runs.append(1)
    if len(runs) > 5:
        print('hangs', flush=True)
        time.sleep(1000)
    return run(self, count)
engine.Engine.run = hanging
"""
FAILS = HANGS.replace("print('hangs', flush=True)", "raise engine.EngineError('injected', hint='none')")


def start(made: Made, *arguments: object, code: str = "", **environment: str) -> subprocess.Popen[str]:
    command = ("run", made.engines["openvino", "int8"], *arguments)
    return start_python(code + VITEDGE, *command, PYTHONUNBUFFERED="1", **environment)


def stop(process: subprocess.Popen[str], number: int, after: int = 3) -> tuple[int, list[str], str]:
    """Send a signal when some lines have come; the exit status, all lines, and what was said."""
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(after)]
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert "Traceback" not in err, err
    return process.returncode, [*lines, *out.splitlines()], err


def table(err: str) -> dict[str, list[str]]:
    """The rows of the summary: the cells of each behind its name."""
    rows = err[err.index("ms: p50 / p99") :].splitlines()[1:11]
    return {name: cells for name, *cells in (re.split(r" {2,}", row.strip()) for row in rows)}


# the end of a run


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_camera_that_is_stopped_exits_0_with_a_table_and_a_finished_recording(
    made: Made, tmp_path: Path, number: signal.Signals
) -> None:
    process = start(made, "--source", "synthetic", *SMALL, "--json", "--save", tmp_path / "out.mp4")
    code, lines, err = stop(process, number, after=20)
    assert code == 0, err
    rows = table(err)
    processed, captured, dropped = (int(rows[name][0]) for name in ("processed", "captured", "dropped"))
    assert processed == len(lines) and captured == processed + dropped
    assert list(rows)[4:] == ["capture", "queue", "preprocess", "infer", "answer", "all to result"]
    assert all(re.fullmatch(r"[\d.]+ / [\d.]+", rows[name][0]) for name in ("capture", "infer", "all to result"))
    assert err.splitlines()[-1].endswith(f"wrote {tmp_path / 'out.mp4'}; ended by {number.name}"), err
    with open_source(str(tmp_path / "out.mp4")) as source:
        assert len(list(source)) >= processed - 2
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]
    for line in lines:
        frame = json.loads(line)
        assert frame["source"] == "synthetic" and frame["captured"] >= frame["index"] + 1 and frame["dropped"] >= 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_what_has_an_end_and_is_interrupted_says_so_by_its_status(made: Made, number: signal.Signals, code: int) -> None:
    process = start(made, "--source", made.images, "--realtime", "--fps", 5)
    status, lines, err = stop(process, number)
    assert status == code and 3 <= len(lines) < 30
    assert f"ended by {number.name}" in err and "goes on from there" not in err and "p50 / p99" in err


def test_several_sources_have_a_column_and_a_recording_each(made: Made, tmp_path: Path) -> None:
    process = start(made, *("--source", "synthetic") * 2, *SMALL, "--limit", 20, "--save", tmp_path / "out.avi")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and len(out.splitlines()) == 20
    assert {line.split("  ")[0] for line in out.splitlines()} == {"synthetic", "synthetic #2"}
    rows = table(err)
    assert sum(map(int, rows["processed"])) == 20 and all(len(cells) == 2 for cells in rows.values())
    for number in (1, 2):
        with open_source(str(tmp_path / f"out-{number}.avi")) as source:
            assert list(source)
    assert f"wrote {tmp_path / 'out-1.avi'}, {tmp_path / 'out-2.avi'}" in err


@pytest.mark.parametrize("count", [1, 2])
def test_an_engine_that_fails_half_way_is_one_sentence_after_what_was_saved(made: Made, tmp_path: Path, count: int) -> None:
    process = start(made, *("--source", "synthetic") * count, *SMALL, "--save", tmp_path / "out.mp4", code=FAILS)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert [line for line in err.splitlines() if line.startswith("error: ")] == ["error: injected"] and "Traceback" not in err
    if count == 1:
        assert len(out.splitlines()) == 4, "after one run of the empty picture on opening"
        with open_source(str(tmp_path / "out.mp4")) as source:
            assert len(list(source)) >= 4 - 1
    assert not list(tmp_path.glob(".*"))


# where the answers go


def test_a_full_stdout_is_one_sentence_and_a_reader_that_leaves_is_none(made: Made) -> None:
    for arguments in (("--json",), ()):
        command = [sys.executable, "-m", "vitedge", "run", made.engines["openvino", "int8"], "--source", "synthetic", *SMALL]
        with Path("/dev/full").open("w") as full:
            done = subprocess.run(
                [*map(str, command), *arguments], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False
            )
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1] == "error: cannot write to standard output: No space left on device"
        process = start(made, "--source", "synthetic", *SMALL, *arguments)
        assert process.stdout is not None and process.stderr is not None and process.stdout.readline()
        process.stdout.close()
        said = process.stderr.read()
        process.wait(timeout=60)
        assert [line for line in said.splitlines() if not line.startswith("engine: ")] == []


def test_a_command_reads_what_is_printed_as_json(made: Made, tmp_path: Path) -> None:
    reads = f"cat > '{tmp_path / 'lines'}'"
    process = start(made, "--source", "synthetic", *SMALL, "--limit", 10, "--json", "--on-result", reads)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and (tmp_path / "lines").read_text() == out and len(out.splitlines()) == 10
    assert "note:" not in err


def test_a_command_that_ends_is_told_once(made: Made) -> None:
    process = start(made, "--source", "synthetic", *SMALL, "--limit", 60, "--on-result", "exit 4")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and len(out.splitlines()) == 60
    assert err.count("'exit 4' ended with status 4") == 1 and re.search(r"note: \d+ results did not reach 'exit 4'", err)


@contextlib.contextmanager
def small_disk(folder: Path, kib: int) -> Iterator[Path]:
    """A file system of its own, where one may be mounted."""
    folder.mkdir()
    mounted = shutil.which("mount") and os.geteuid() == 0
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "vitedge-test", str(folder)]
    if not mounted or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small file system can be mounted by root alone")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("name", ["out.mp4", "pictures"])
def test_a_full_disk_ends_the_run_with_one_sentence_and_a_readable_recording(made: Made, tmp_path: Path, name: str) -> None:
    with small_disk(tmp_path / "disk", 16 * 1024 + 700) as disk:
        process = start(made, "--source", "synthetic", "--size", "640x480", "--fps", 60, "--save", disk / name)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 1 and len(out.splitlines()) > 5
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and "MiB are free in" in errors[0] and "Traceback" not in err
        with open_source(str(disk / name)) as source:
            assert len(list(source)) > 5
        assert [path.name for path in disk.iterdir()] == [name]


def test_at_a_terminal_a_camera_has_a_line_that_is_kept_up_to_date(made: Made) -> None:
    process, screen = at_a_terminal(made, "--source", "synthetic", *SMALL)
    shown = read(screen, lambda text: text.count("fps") >= 4)
    process.send_signal(signal.SIGINT)
    shown = re.sub(r"\x1b\[\d*m", "", shown + read(screen, lambda text: "ended by SIGINT" in text))  # without colours
    assert process.wait(timeout=60) == 0
    assert re.search(r"synthetic +[\d.]+ fps +latency [\d.]+ +preprocess [\d.]+ +infer [\d.]+ ms +dropped \d+ +\S", shown), shown
    assert "\x1b[2K" in shown, "the line is written over"
    assert "p50 / p99" in shown and "Traceback" not in shown
    lines = re.findall(r"preprocess [\d.]+  infer [\d.]+ ms\r\n", shown)
    assert not lines, "no line an answer"


def test_at_a_terminal_a_folder_has_a_line_a_picture_and_json_is_json(made: Made) -> None:
    process, screen = at_a_terminal(made, "--source", made.images, "--limit", 5)
    shown = read(screen, lambda text: "5 frames" in text)
    assert process.wait(timeout=60) == 0 and len(re.findall(r"infer [\d.]+ ms", shown)) == 5
    process, screen = at_a_terminal(made, "--source", "synthetic", *SMALL, "--limit", 5, "--json")
    shown = read(screen, lambda text: "5 frames" in text)
    assert process.wait(timeout=60) == 0 and len(re.findall(r'^{"source": "synthetic".*}\r$', shown, re.MULTILINE)) == 5


def at_a_terminal(made: Made, *arguments: object) -> tuple[subprocess.Popen[bytes], int]:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "vitedge", "run", made.engines["openvino", "int8"], *arguments]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "160", "NO_COLOR": "1"}
    process = subprocess.Popen([*map(str, command)], cwd=ROOT, env=environment, stdout=theirs, stderr=theirs, stdin=theirs)
    os.close(theirs)
    return process, ours


def read(screen: int, enough: object) -> str:
    """What is shown until it is enough, or nothing more comes."""
    text, deadline = "", time.monotonic() + 60
    while not enough(text) and time.monotonic() < deadline:  # type: ignore[operator]
        if select.select([screen], [], [], 1)[0]:
            try:
                text += os.read(screen, 65536).decode(errors="replace")
            except OSError:  # the process has ended
                break
    return text


# mistakes


MISTAKES = {
    "size": (["--size", "large"], "WIDTHxHEIGHT, not 'large'"),
    "size of nothing": (["--size", "0x0"], "a size is"),
    "rate": (["--fps", "0"], "a rate of 0"),
    "pixel format": (["--pixel-format", "MJPEG"], "four letters"),
    "watchdog": (["--watchdog", "0"], "not for 0"),
    "token without a page": (["--token", "x"], "--token is for the page of --web"),
    "nothing to record to": (["--save", ""], "--save takes a video file or a folder of its own"),
    "no command": (["--on-result", ""], "--on-result is empty"),
    "no page": (["--web", ""], "--web is empty"),
    "no broker": (["--mqtt", ""], "--mqtt is empty"),
    "no source": (["--source", ""], "no source was given"),
    "port": (["--web", "eighty"], "not 'eighty'"),
    "port too high": (["--web", "65536"], "not '65536'"),
    "page for all without a token": (["--web", "0.0.0.0:0"], "token"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_said_before_the_engine_opens(made: Made, case: str) -> None:
    arguments, sentence = MISTAKES[case]
    opens = "import vitedge.runtime.live as live; live.open_engine = None\n"
    process = start(made, "--source", "synthetic", *arguments, code=opens)
    out, err = process.communicate(timeout=60)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert process.returncode == 1 and out == "" and len(errors) == 1 and sentence in errors[0], err


def test_options_that_do_nothing_are_named(made: Made) -> None:
    idle = ("--loop", "--realtime", "--pixel-format", "MJPG", "--transport", "udp")
    process = start(made, "--source", "synthetic", "--limit", 1, *idle)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0 and err.count("does nothing for a source like this") == 4, err


def test_the_shell_completes_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "syncopation.mp4").touch()
    (tmp_path / "clips").mkdir()
    assert complete_source("sync") == ["syncopation.mp4"] and complete_source("syn")[0] == "synthetic"
    (tmp_path / "clips" / "a.mp4").touch()
    assert complete_source("cl") == ["clips/"] and complete_source("cs") == ["csi://0"]
    assert complete_source("clips/") == ["clips/a.mp4"] and complete_source(f"{tmp_path}/s") == [f"{tmp_path}/syncopation.mp4"]
    assert complete_source("no/such/") == []


def test_a_token_in_the_environment_is_for_runs_with_a_page(made: Made) -> None:
    process = start(made, "--source", "synthetic", "--limit", 1, VITEDGE_TOKEN="secret")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and len(out.splitlines()) == 1 and "secret" not in err, err


def test_a_recording_is_named_by_its_beginning(made: Made, tmp_path: Path) -> None:
    process = start(made, "--source", "synthetic", "--limit", 2, "--save", tmp_path / "at-%Y.mp4")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0 and re.fullmatch(r"at-20\d\d\.mp4", next(tmp_path.iterdir()).name), err


def test_ctrl_c_ends_what_hangs_while_it_opens(made: Made) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/x"
        process = start(made, "--source", url, "--source", url)
        silent.settimeout(60)
        with silent.accept()[0]:
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=10)
    assert process.returncode == -signal.SIGINT and "Traceback" not in err, err


def test_a_port_in_use_is_said_before_the_engine_opens(made: Made) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        opens = "import vitedge.runtime.live as live; live.open_engine = None\n"
        process = start(made, "--source", "synthetic", "--web", port, code=opens)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and str(port) in err and err.count("error: ") == 1 and "Traceback" not in err, err
