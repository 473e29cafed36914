"""kernels/patchify.cu as NVIDIA's compiler makes machine code of it, for every GPU that vitedge may meet; that needs no GPU.

python -m tests.backends.test_patchify_nvrtc    prints registers and code size for each architecture
"""

from __future__ import annotations

import functools
import itertools
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from vitedge.backends.patchify import FUNCTION, SHARED_BYTES, THREADS, launch, source
from vitedge.specs import ModelCard, Preprocess

nvrtc: Any = pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings is not installed")

# Turing, A100, Ampere, Orin, Ada, Hopper, Blackwell, Thor, GeForce Blackwell
ARCHITECTURES = (75, 80, 86, 87, 89, 90, 100, 110, 120)
FORMATS = ("RGB", "BGR", "GREY", "YUYV", "NV12")
REGISTERS = 64  # a thread; with more, fewer than 1024 threads would find room on a multiprocessor
KPARAM_INFO = 0x17  # an entry of .nv.info about one parameter
VALUE_WITHIN = 3  # up to this kind of entry, its two last bytes are its value, else the number of bytes that follow


@dataclass(frozen=True, slots=True)
class Compiled:
    """Machine code, and what the assembler said about it."""

    cubin: bytes
    log: str

    def number(self, pattern: str) -> int:
        """The number that stands where `pattern` has a group."""
        found = re.search(pattern, self.log)
        assert found, self.log
        return int(found[1])


@functools.cache
def supported() -> tuple[int, ...]:
    """The architectures that this NVRTC compiles for."""
    try:
        status, architectures = nvrtc.nvrtcGetSupportedArchs()
    except RuntimeError as error:  # its library is missing
        pytest.skip(str(error).partition("\n")[0])
    assert not status
    return tuple(architectures)


@functools.cache
def compiled(architecture: int, pixels: str, channels: int, patch: int) -> Compiled:
    if architecture not in supported():
        pytest.skip(f"NVRTC {nvrtc.nvrtcVersion()[1:]} does not know sm_{architecture}")
    defines = (f"-DPIXELS={pixels}", f"-DCHANNELS={channels}", f"-DPATCH={patch}")
    options = (f"-arch=sm_{architecture}", "--ptxas-options=-v", *defines)
    program = asked("nvrtcCreateProgram", source().encode(), b"patchify.cu", 0, [], [])
    (failed,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    log = contents("nvrtcGetProgramLog", program).decode()
    assert not failed, log
    cubin = contents("nvrtcGetCUBIN", program)
    asked("nvrtcDestroyProgram", program)
    return Compiled(cubin, log)


def contents(function: str, program: Any) -> bytes:
    buffer = bytearray(asked(f"{function}Size", program))
    asked(function, program, buffer)
    return bytes(buffer)


def asked(function: str, *arguments: Any) -> Any:
    status, *answer = getattr(nvrtc, function)(*arguments)
    assert not status, f"{function}: {status}"
    return answer[0] if answer else None


EVERY = [*itertools.product(ARCHITECTURES, FORMATS, (1, 3), (14,)), *itertools.product((87,), FORMATS, (1, 3), (0,))]


@pytest.mark.parametrize(("architecture", "pixels", "channels", "patch"), EVERY, ids=lambda part: f"{part}")
def test_nothing_spills_and_many_blocks_fit(architecture: int, pixels: str, channels: int, patch: int) -> None:
    made = compiled(architecture, pixels, channels, patch)
    assert "warning" not in made.log
    assert made.number(r"(\d+) bytes stack frame") == 0  # which is all of a thread's local memory
    assert made.number(r"(\d+) bytes spill stores") == made.number(r"(\d+) bytes spill loads") == 0
    assert made.number(r"(\d+) bytes gmem") == 0
    assert not re.search(r"\d+ bytes smem", made.log)  # all of it is dynamic
    assert 0 < made.number(r"Used (\d+) registers") <= REGISTERS
    assert made.number(r"used (\d+) barriers") == 1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_machine_code_takes_the_arguments_that_a_launch_gives(architecture: int) -> None:
    """Two addresses, four of tables, nine int32, where the C ABI puts them: read off the cubin itself."""
    plan = launch(1080, 1920, 1920, "nv12", ModelCard("m", "embed", Preprocess((224, 224), (0.5,) * 3, (0.5,) * 3), 14))
    sizes = [8] * (2 + len(plan.tables)) + [4] * len(plan.scalars)
    offsets = [0, *itertools.accumulate(sizes)][:-1]
    cubin = compiled(architecture, "NV12", 3, 14).cubin
    assert sorted(parameters(section(cubin, f".nv.info.{FUNCTION}"))) == list(zip(offsets, sizes, strict=True))
    assert plan.defines == ("PIXELS=NV12", "CHANNELS=3", "PATCH=14")


def test_the_kernel_and_its_planner_agree_on_the_largest_block() -> None:
    assert f"THREADS = {THREADS}," in source() and SHARED_BYTES == 48 * 1024


def section(elf: bytes, name: str) -> bytes:
    """A section of a 64-bit little-endian ELF file."""
    (table,) = struct.unpack_from("<Q", elf, 40)
    size, count, names = struct.unpack_from("<3H", elf, 58)
    headers = [struct.unpack_from("<IIQQQQ", elf, table + index * size) for index in range(count)]
    strings = headers[names][4]
    for label, _, _, _, start, length in headers:
        if elf[strings + label :].startswith(name.encode() + b"\0"):
            return elf[start : start + length]
    raise AssertionError(f"no section {name}")


def parameters(info: bytes) -> Iterator[tuple[int, int]]:
    """(offset, bytes) of each parameter that a .nv.info section names."""
    at = 0
    while at < len(info):
        kind, attribute, value = struct.unpack_from("<BBH", info, at)
        if attribute == KPARAM_INFO:
            _, _, offset, packed = struct.unpack_from("<IHHI", info, at + 4)
            yield offset, packed >> 18
        at += 4 if kind <= VALUE_WITHIN else 4 + value


def main() -> None:
    """Print the registers, of all formats, channels and with patches or not, and the largest code, by architecture."""
    print("nvrtc", *nvrtc.nvrtcVersion()[1:])
    for architecture in supported():
        made = [compiled(architecture, *rest) for rest in itertools.product(FORMATS, (1, 3), (0, 14))]
        registers = [each.number(r"Used (\d+) registers") for each in made]
        spilled = sum(each.number(r"(\d+) bytes stack frame") for each in made)
        code = max(len(section(each.cubin, f".text.{FUNCTION}")) for each in made)
        print(f"sm_{architecture}: {min(registers)} - {max(registers)} registers, {spilled} bytes spilled, {code} bytes of code")


if __name__ == "__main__":
    main()
