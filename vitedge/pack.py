"""ONNX files and a Target in, a bundle out from which one command builds the engines on the machine that runs them.

    BUNDLE/  build.sh  README.md  manifest.json  SHA256SUMS  requirements.txt
             engines/MODEL/VARIANT-SHA.onnx  engines/MODEL/labels.txt  engines/targets/TARGET.toml
             calibration/recipes/RECIPE.toml  images/LABEL/NN.jpg  vitedge/

A GPU's plan is of one architecture, operating system and release of the vendor's package, so it is made where it runs. A
bundle is a workspace and needs nothing but a Python there. It is a folder, or a .tar.gz that holds one. Converts no graph
and knows neither torch nor onnx.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import re
import shlex
import shutil
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from vitedge import __version__
from vitedge.backends import load_backend
from vitedge.backends.build import Source, check_graph, check_quantized, check_untyped, read_source
from vitedge.errors import EngineError, ImageError, VitEdgeError
from vitedge.images import ImageFile, is_image, read_bytes, sample
from vitedge.specs import FloatType, ModelCard, Recipe, Target, from_dict, to_dict
from vitedge.workspace import read_json, sha256, staged

PACKAGE = Path(__file__).parent
TEMPLATE = PACKAGE / "bundle"
DEVICE_COMPILER = ("__init__.py", "catalogue.py")  # of compiler/: what `vitedge models` reads; all else needs torch
JUDGED = 64  # images that are packed at most
NAME_BYTES = 255  # of a file's name on Linux
ARCHIVE = ".tar.gz"
OTHER_ARCHIVES = (".zip", ".tgz", ".tar", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar")
Content = Path | bytes

# What pip installs on the device, as in pyproject.toml but for TensorRT, which JetPack brings. Its Python bindings up to 10.13
# are compiled against NumPy 1 (read from the wheels), as is all that Ubuntu 22.04 and 24.04 ship; Python 3.13 has only NumPy 2.
NUMPY = ("numpy>=1.24",)
NUMPY_1 = ("numpy>=1.24,<2; python_version < '3.13'", "numpy>=2.1; python_version >= '3.13'")
ALWAYS = ("pillow>=10.0", "typer>=0.12", "rich>=13.0", "tomli>=2.0; python_version < '3.11'")
REQUIREMENTS = {
    "openvino": (*NUMPY, "openvino>=2025.2"),
    "onnxruntime": (*NUMPY, "onnxruntime>=1.20"),
    "tensorrt": (*NUMPY_1, "pycuda>=2024.1", "cuda-bindings>=12.8"),
    "tensorrt-rtx": (
        *NUMPY,
        "tensorrt-rtx-cu13-bindings>=1.7",
        "tensorrt-rtx-cu13-libs>=1.7",
        "pycuda>=2024.1",
        "cuda-bindings>=12.8",
    ),
}
SYSTEM_MODULE = {"tensorrt": "tensorrt"}  # backend -> what no pip installs: the device has it or not


@dataclasses.dataclass(frozen=True, slots=True)
class Packed:
    """One graph of a bundle: its path there, and what it is."""

    file: str
    card: ModelCard
    variant: str
    recipe: Recipe | None
    float_type: FloatType


@dataclasses.dataclass(frozen=True, slots=True)
class Bundle:
    """The manifest of a bundle. files: path -> SHA-256 in hex, of every file but the manifest and SHA256SUMS."""

    vitedge: str
    target: Target
    graphs: tuple[Packed, ...]
    images: int
    files: dict[str, str]


def pack(graphs: Sequence[Path], target: Target, output: Path, images: Sequence[ImageFile] = ()) -> Bundle:
    """Write the bundle of `graphs` for `target` to `output`, a folder or a .tar.gz, in place of an older bundle.

    images: at most JUDGED of them go along, drawn evenly from the labels, for the device to measure on.
    EngineError: a graph whose float type is not the one that its recipe asks for on the target. VitEdgeError: an output that
    holds what no bundle brought.
    """
    _check_output(output)
    sources = {graph: _checked(graph, target) for graph in graphs}
    contents = _workspace(sources, target) | _pictures(images) | _code()
    packed = tuple(_packed(graph, source) for graph, source in sources.items())
    contents["requirements.txt"] = "".join(f"{line}\n" for line in sorted(_requirements(target))).encode()
    contents |= _texts(packed, target, bool(images), _title(output))
    sums = {path: _sha256(content) for path, content in sorted(contents.items())}
    bundle = Bundle(__version__, target, packed, len(_pictures(images)), sums)
    contents["manifest.json"] = (json.dumps(to_dict(bundle), indent=2) + "\n").encode()
    contents["SHA256SUMS"] = _sums({**sums, "manifest.json": _sha256(contents["manifest.json"])})
    with staged(output) as temporary:
        if _is_archive(output):
            _write_archive(contents, temporary, _title(output))
        else:
            _write_folder(contents, temporary)
    return bundle


def _checked(graph: Path, target: Target) -> Source:
    """What a graph is; an EngineError where no engine could be built of it for the target, whatever machine that is."""
    backend = load_backend(target.backend)
    if not backend.TYPED:  # the device's processor decides what it computes in, and `vitedge build` there says so
        source = read_source(graph)
        check_quantized(graph, source)
        check_untyped(graph, source, target)
        return source
    if target.capability is None:
        raise EngineError(
            f"the target {target.name} does not say which GPU it is",
            hint='give it a capability: "8.7" is an Orin, "11.0" a Thor (JetPack 7), "8.6" an RTX 30',
        )
    return check_graph(graph, target)[0]


def _packed(graph: Path, source: Source) -> Packed:
    return Packed(_name(graph, source), source.card, source.variant, source.recipe, source.float_type)


def _name(graph: Path, source: Source) -> str:
    """Where a graph lies in the bundle, such that MODEL/VARIANT.onnx finds it."""
    return f"engines/{source.card.name}/{source.variant}-{sha256(graph)[:12]}.onnx"


def _workspace(sources: Mapping[Path, Source], target: Target) -> dict[str, Content]:
    """The graphs, with their labels and recipes, and the target."""
    contents: dict[str, Content] = {f"engines/targets/{target.name}.toml": _toml(target)}
    contents["calibration/README.md"] = PACKAGE / "template" / "calibration" / "README.md"
    for graph, source in sources.items():
        contents[_name(graph, source)] = graph
        contents[f"engines/{source.card.name}/labels.txt"] = "".join(f"{label}\n" for label in source.card.labels).encode()
        if source.recipe:
            path, text = f"calibration/recipes/{source.recipe.name}.toml", _toml(source.recipe)
            if contents.setdefault(path, text) != text:
                raise VitEdgeError(
                    f"two of the graphs were made by different recipes that are both called {source.recipe.name}",
                    hint="pack them one by one",
                )
    return contents


def _pictures(images: Sequence[ImageFile]) -> dict[str, Content]:
    """At most JUDGED images, numbered, in a folder for each label; where one cannot be that, with a table of labels."""
    chosen = list(enumerate(sample(images, JUDGED, 0))) if images else []
    named = all(file.label is None or _is_folder_name(file.label) for _, file in chosen)
    found: dict[str, Content] = {}
    labels = dict[str, str | None]()
    for index, file in chosen:
        name = f"{index:02}{_suffix(file)}"
        labels[name] = file.label
        found["/".join(filter(None, ("images", file.label if named else None, name)))] = _content(file)
    if not named:
        found["images/labels.json"] = json.dumps(labels, indent=1).encode()
    return found


def _is_folder_name(label: str) -> bool:
    """Whether a label can be a folder's name: one out of a table or an archive may be anything, such as ../../etc."""
    return bool(label) and not label.startswith(".") and not re.search(r"[/\0]", label) and len(label.encode()) <= NAME_BYTES


def _suffix(file: ImageFile) -> str:
    """A row of a parquet file need not have any, and what it is is seen from its bytes."""
    return PurePosixPath(file.member or file.path.name).suffix.lower() if is_image(file.member or file.path.name) else ".jpg"


def _content(file: ImageFile) -> Content:
    """The encoded image; nothing of one that cannot be read out of its archive, as if it were a damaged file."""
    try:
        return read_bytes(file) if file.member else file.path
    except (OSError, ImageError):
        return b""


def _code() -> dict[str, Content]:
    """The vitedge that packs, without its compiler."""
    files = (path for path in PACKAGE.rglob("*") if path.is_file())
    return {f"vitedge/{path.relative_to(PACKAGE).as_posix()}": path for path in files if _is_needed(path.relative_to(PACKAGE))}


def _is_needed(path: Path) -> bool:
    if "__pycache__" in path.parts or any(part.startswith(".") for part in path.parts):
        return False
    return path.parts[0] != "compiler" or path.name in DEVICE_COMPILER


def _requirements(target: Target) -> tuple[str, ...]:
    return (*ALWAYS, *REQUIREMENTS[target.backend])


def _texts(packed: Sequence[Packed], target: Target, measured: bool, title: str) -> dict[str, Content]:
    """build.sh and README.md, with the names filled in."""
    bench = (
        "`vitedge bench` measures them side by side on `images/`: a table, `bench.json`, `report.html`."
        if measured
        else "Nothing is measured, since no images were packed: `vitedge bench ENGINE... --images DIR` does it."
    )
    told = (
        f"| `{graph.file}` | {graph.recipe.name if graph.recipe else 'none: the float model'} | {graph.float_type} |"
        for graph in packed
    )
    words = {
        "TARGET": shlex.quote(target.name), "GRAPHS": " ".join(dict.fromkeys(graph.file for graph in packed)),
        "MODULE": SYSTEM_MODULE.get(target.backend, ""), "VERSION": __version__, "TITLE": title,
        "BENCH": bench, "ROWS": "\n".join(told),
    }  # fmt: skip
    return {name: _filled(TEMPLATE / name, words) for name in ("build.sh", "README.md")}


def _filled(path: Path, words: Mapping[str, str]) -> bytes:
    text = path.read_text("utf-8")
    for word, value in words.items():
        text = text.replace(f"@{word}@", value)
    return text.encode()


def _toml(spec: Any) -> bytes:
    """A Recipe or Target as the TOML file that loads as it, its name left to the file's. JSON is TOML for such values."""
    return "".join(_toml_lines({key: value for key, value in to_dict(spec).items() if key != "name"}, "")).encode()


def _toml_lines(table: Mapping[str, Any], path: str) -> list[str]:
    """The keys of a table, and behind them its tables under headings of their own."""
    lines = [f"{key} = {json.dumps(v)}\n" for key, v in table.items() if v is not None and not isinstance(v, dict)]
    for key, value in table.items():
        if isinstance(value, dict):
            lines += [f"\n[{path}{key}]\n", *_toml_lines(value, f"{path}{key}.")]
    return lines


def _sha256(content: Content) -> str:
    return hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else sha256(content)


def _sums(sums: Mapping[str, str]) -> bytes:
    """Lines that `sha256sum -c` reads; a name with a backslash or a line break is written as it expects."""
    lines = []
    for path, digest in sums.items():
        escaped = path.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
        lines.append(f"{chr(92) if escaped != path else ''}{digest}  {escaped}\n")
    return os.fsencode("".join(lines))


def _is_archive(output: Path) -> bool:
    return output.name.endswith(ARCHIVE)


def _title(output: Path) -> str:
    """The name of the bundle's folder."""
    return output.name.removesuffix(ARCHIVE)


def _write_folder(contents: Mapping[str, Content], folder: Path) -> None:
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            shutil.copyfile(content, path)


def _write_archive(contents: Mapping[str, Content], path: Path, title: str) -> None:
    """A .tar.gz of one folder, its manifest first; of who packed it, the archive says nothing."""
    ordered = sorted(contents.items(), key=lambda item: (item[0] != "manifest.json", item[0]))
    with tarfile.open(path, "w:gz", compresslevel=6) as archive:
        for name, content in ordered:
            entry = tarfile.TarInfo(f"{title}/{name}")
            entry.mode = 0o644
            if isinstance(content, bytes):
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
            else:
                entry.size = content.stat().st_size
                with content.open("rb") as file:
                    archive.addfile(entry, file)


def _check_output(output: Path) -> None:
    """Refuse to replace what is no bundle, or a bundle in which something else lies by now, such as engines."""
    if _title(output) in ("", ".."):
        raise VitEdgeError(f"{output} is no name for a bundle", hint="give --output a name, such as my-bundle.tar.gz")
    if output.suffix in OTHER_ARCHIVES and not _is_archive(output) and not output.is_dir():
        hint = f"give --output a folder, or {output.name.removesuffix(output.suffix).removesuffix('.tar')}{ARCHIVE}"
        raise VitEdgeError(f"{output} would be a folder: the only archive that a bundle is written as is {ARCHIVE}", hint=hint)
    if not output.exists() and not output.is_symlink():
        return
    hint = "give another --output, or remove it"
    if _is_archive(output) != output.is_file() or output.is_symlink():
        raise VitEdgeError(f"{output} exists, and is no {'archive' if _is_archive(output) else 'folder'}", hint=hint)
    if _is_archive(output):
        if not _holds_manifest(output):
            raise VitEdgeError(f"{output} exists, and is no bundle of vitedge", hint=hint)
        return
    present = {path.relative_to(output).as_posix() for path in output.rglob("*") if not path.is_dir()}
    if not present:
        return
    foreign = sorted(present - _files_of(output))
    if foreign:
        raise VitEdgeError(f"{output} exists and holds what no bundle brought, such as {foreign[0]}", hint=hint)


def _files_of(folder: Path) -> set[str]:
    """What the bundle in a folder brought; nothing where there is none."""
    try:
        return {"manifest.json", "SHA256SUMS", *from_dict(Bundle, read_json(folder / "manifest.json")).files}
    except VitEdgeError:
        return set()


def _holds_manifest(path: Path) -> bool:
    """Whether an archive begins with the manifest of a bundle."""
    try:
        with tarfile.open(path) as archive:
            entry = archive.next()
            file = archive.extractfile(entry) if entry and entry.name.endswith("/manifest.json") else None
            return file is not None and bool(from_dict(Bundle, json.loads(file.read())))
    except (tarfile.TarError, OSError, EOFError, ValueError, VitEdgeError):
        return False
