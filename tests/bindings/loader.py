"""NVIDIA's own Python bindings of each supported release of TensorRT, made to run without NVIDIA's libraries and without a GPU.

    PyPI: tensorrt_cu12_bindings 10.3.0, ...  ->  .cache/trt-bindings/               the bindings, about 1 MB each
    relay.cpp                                 ->  libnvinfer.so.10, ...              in place of the libraries
    both, and TensorRT-RTX                    ->  a process in which `import tensorrt` is that release

Parser, builder and runtime are those of TensorRT-RTX; the bindings, and with them the types of every argument and answer, are
those of the release. Says nothing about kernels, speed or accuracy.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.engines import ROOT

CACHE = ROOT / ".cache" / "trt-bindings" / str(sys.implementation.cache_tag)
RELEASES = {  # release -> the package on PyPI
    "10.3.0": "tensorrt_cu12_bindings",
    "10.13.3.9": "tensorrt_cu12_bindings",
    "10.16.1.11": "tensorrt_cu12_bindings",
    "11.0.0.114": "tensorrt_cu13_bindings",
    "11.4.0.106": "tensorrt_cu13_bindings",
}
RTX = "rtx"
RTX_LIBRARIES = ("libtensorrt_rtx.so.1", "libtensorrt_onnxparser_rtx.so.1")
LIBRARIES = ("libnvinfer", "libnvonnxparser", "libnvinfer_plugin")
RELAY = Path(__file__).with_name("relay.cpp")
MODULES = {  # what `import tensorrt` is, as in NVIDIA's own packages; and no libraries, should they be installed
    "tensorrt": "from tensorrt_bindings import *\nfrom tensorrt_bindings import __version__\n",
    "tensorrt_libs": "",
    "tensorrt_rtx_libs": "",
}
FLAGS = {"set_flag": "BuilderFlag", "get_flag": "BuilderFlag", "clear_flag": "BuilderFlag"}  # method -> what it takes
MASKS = {"create_network": "NetworkDefinitionCreationFlag"}  # method -> what its argument has a bit for
OTHER_MASKS = ("flags", "flags=", "get_tactic_sources", "set_tactic_sources")  # not translated, so not to be called


@dataclasses.dataclass(frozen=True, slots=True)
class Probed:
    """The bindings of a release. functions: class -> member -> its virtual functions, and the class of the result."""

    functions: dict[str, dict[str, tuple[list[int], str]]]
    numbers: dict[str, dict[str, int]]


class Unavailable(Exception):  # noqa: N818
    """Something is missing that another machine may have: a network, a compiler, TensorRT-RTX."""


def fetch() -> None:
    """Download the bindings of every release and unpack them, those that are there already aside."""
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(_fetch, RELEASES))


def _fetch(release: str) -> None:
    folder, partial, requirement = CACHE / release, CACHE / f"{release}.partial", f"{RELEASES[release]}=={release}"
    if folder.is_dir():
        return
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--only-binary=:all:",
    ]
    done = subprocess.run([*command, "-d", str(CACHE), requirement], capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unavailable(f"pip cannot download {requirement}: {done.stderr.strip().splitlines()[-1]}")
    (wheel,) = CACHE.glob(f"{RELEASES[release]}-{release}-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(partial)
    partial.rename(folder)
    wheel.unlink()


class Bindings:
    """Processes with the bindings of a release. folder: for the compiled relay, and what it needs."""

    def __init__(self, folder: Path) -> None:
        specs = [importlib.util.find_spec(name) for name in ("tensorrt_rtx_libs", "tensorrt_rtx_bindings")]
        if not all(spec and spec.origin for spec in specs):
            raise Unavailable("TensorRT-RTX is not installed: pip install '.[rtx]'")
        self._rtx, self._rtx_bindings = (Path(str(spec and spec.origin)).parent for spec in specs)
        self._folder = folder
        self._compile()
        for name, source in MODULES.items():
            (folder / "modules" / name).mkdir(parents=True)
            (folder / "modules" / name / "__init__.py").write_text(source, "utf-8")

    def run(self, release: str, *arguments: object, record: bool = False, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run Python in a process whose `tensorrt` is `release`, on TensorRT-RTX, or where `record` on nothing at all."""
        relay = "record" if record else str(self._routes(release))
        return self._run(release, relay, *map(str, arguments), **environment)

    def probed(self, release: str) -> Probed:
        """What the bindings of a release, or of TensorRT-RTX, call, found by calling it."""
        return Probed(**json.loads(self.probed_file(release).read_text("utf-8")))

    def probed_file(self, release: str) -> Path:
        """The same as probe.py prints it."""
        kept = self._folder / f"{release}.json"
        if not kept.is_file():
            done = self._run(release, "record", "-W", "ignore::DeprecationWarning", "-m", "tests.bindings.probe")
            if done.returncode:
                raise RuntimeError(f"the bindings of {release} cannot be probed ({done.returncode}):\n{done.stdout}{done.stderr}")
            kept.write_text(done.stdout, "utf-8")
        return kept

    def names(self, release: str) -> dict[tuple[str, int], str]:
        """What relay.cpp's classes and numbers mean: (class, function) -> "Class.member"."""
        names: dict[tuple[str, int], str] = {}
        for kind, members in self.probed(release).functions.items():
            for member, (functions, _) in members.items():
                for function in functions:
                    names.setdefault((kind, function), f"{kind}.{member}")
        return names

    def _routes(self, release: str) -> Path:
        """The file that tells relay.cpp where each call goes."""
        ours, theirs = self.probed(release), self.probed(RTX)
        lines = {
            f"{kind} {function} {target} {result} {_translation(member, ours.numbers, theirs.numbers)}\n"
            for kind, members in ours.functions.items()
            for member, (functions, result) in members.items()
            if member in theirs.functions.get(kind, {}) and member not in OTHER_MASKS
            for function, target in zip(functions, theirs.functions[kind][member][0], strict=True)
        }
        path = self._folder / f"{release}.routes"
        path.write_text("".join(sorted(lines)), "utf-8")
        return path

    def _run(self, release: str, relay: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        bindings = self._rtx_bindings.parent if release == RTX else CACHE / release
        libraries = [self._folder / release, *([] if relay == "record" else [self._rtx])]
        plain = {"RELAY_LOGGER": "plain"} if release.startswith("10.") else {}
        added = plain | {
            "PYTHONPATH": os.pathsep.join(map(str, (self._folder / "modules", bindings, ROOT))),
            "LD_LIBRARY_PATH": os.pathsep.join(map(str, libraries)),
            "BINDINGS": "tensorrt_rtx_bindings" if release == RTX else "tensorrt",
            "RELAY": relay,
            "RELAY_LIBRARY": str(self._relay),
            **environment,
        }
        command = [sys.executable, "-X", "faulthandler", *arguments]
        return subprocess.run(command, cwd=ROOT, env=os.environ | added, capture_output=True, text=True, check=False, timeout=300)

    def _compile(self) -> None:
        """Compile relay.cpp, and give it the names of the libraries that the bindings of each release load."""
        compiler = shutil.which("g++")
        if compiler is None:
            raise Unavailable("there is no g++")
        self._relay = self._folder / "relay.so"
        command = [
            compiler,
            "-std=c++17",
            "-O1",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-shared",
            "-fPIC",
            str(RELAY),
            "-o",
            str(self._relay),
            "-ldl",
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr)
        for release in (RTX, *RELEASES):
            names = RTX_LIBRARIES if release == RTX else [f"{name}.so.{release.split('.')[0]}" for name in LIBRARIES]
            (self._folder / release).mkdir()
            for name in names:
                (self._folder / release / name).symlink_to(self._relay)


def _translation(member: str, ours: dict[str, dict[str, int]], theirs: dict[str, dict[str, int]]) -> str:
    """What the numbers that a method takes are in TensorRT-RTX, as relay.cpp reads it; "-" where it takes none."""
    name = FLAGS.get(member) or MASKS.get(member)
    if name is None:
        return "-"
    pairs = [(number, theirs[name][flag]) for flag, number in ours[name].items() if flag in theirs[name]]
    return ",".join(f"{1 << old}:{1 << new}" if member in MASKS else f"{old}:{new}" for old, new in pairs)
