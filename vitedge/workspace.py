"""Where things lie: the folders calibration/ and engines/, TOML files, content keys and atomic writes.

A workspace is any folder with `calibration/` and `engines/` in it; it is looked for upwards from the current folder, and
the current folder itself serves where there is none. Knows where recipes, targets and engines lie, and nothing of how they
are used.
"""

from __future__ import annotations

import dataclasses
import errno
import glob
import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from vitedge.errors import VitEdgeError
from vitedge.specs import Recipe, Target, from_dict

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")
ABANDONED_S = 86_400  # a temporary file of this age belongs to nobody: no build takes a day
TEMPLATE = Path(__file__).with_name("template")
BUILTIN_TARGETS = TEMPLATE / "engines" / "targets"
GPU_KEYS = {"capability", "workspace_mib", "optimization_level", "hardware", "version_compatible", "refit"}
PLAIN_LIST = re.compile(r"\[\n[^][{}\"]*\]")  # of numbers; text is left alone, since it may hold anything
BUILTIN_RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(),
        Recipe(name="int8-fast", smoothing="fixed", rounding="nearest", images=32),
        Recipe(name="int8-attention", attention=True),
        Recipe(name="int8-mixed", min_sqnr_db=40.0),
        Recipe(name="fp16", method="none", float_type="fp16"),
        Recipe(name="bf16", method="none", float_type="bf16"),
    )
}


def find_root(start: Path | None = None) -> Path:
    """The nearest folder at or above `start` (default: the current one) that holds a workspace, else `start`."""
    start = (start or Path.cwd()).resolve()
    for folder in (start, *start.parents):
        if (folder / "calibration").is_dir() and (folder / "engines").is_dir():
            return folder
    return start


def cache_folder() -> Path:
    """Where what saves time is kept between workspaces: vitedge/ in $XDG_CACHE_HOME, or in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vitedge"


def init_workspace(folder: Path) -> dict[Path, bool]:
    """Put the files of a new workspace into `folder`; path -> whether it was written (False: it was there, and is kept)."""
    written = {}
    for template in sorted(path for path in TEMPLATE.rglob("*") if path.is_file()):
        path = folder / template.relative_to(TEMPLATE)
        written[path] = not path.exists()
        if written[path]:
            write_file(path, template.read_bytes())
    return written


def short_path(path: Path) -> str:
    """The path from the current folder, where it is below it, for people to read and type."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def known_engines() -> dict[Path, str]:
    """The engine directories of the workspace, and MODEL/VARIANT of each."""
    manifests = find_root().glob("engines/*/[!.]*/manifest.json")  # a hidden one is of a build that was broken off
    return {manifest.parent: f"{manifest.parts[-3]}/{manifest.parts[-2].rpartition('-')[0]}" for manifest in manifests}


def known_recipes() -> list[str]:
    """The names that `load_recipe` finds."""
    return sorted(BUILTIN_RECIPES.keys() | {path.stem for path in (find_root() / "calibration" / "recipes").glob("*.toml")})


def known_targets() -> list[str]:
    """The names that `load_target` finds."""
    folders = (BUILTIN_TARGETS, find_root() / "engines" / "targets")
    return sorted({path.stem for folder in folders for path in folder.glob("*.toml")})


def find_engines(name: Path) -> list[Path]:
    """The engine directory `name`, or for MODEL/VARIANT those of the workspace, the one built, or found fresh, last first."""
    if name.exists() or len(name.parts) > 2:
        return [name]
    engines = known_engines()
    found = [folder for folder, known in engines.items() if known == name.as_posix()]
    if not found:
        hint = f"there are {', '.join(sorted(set(engines.values())))}" if engines else "`vitedge make` builds them"
        raise VitEdgeError(f"there is no engine {name}", hint=hint)
    return sorted(found, key=lambda folder: (folder / "manifest.json").stat().st_mtime_ns, reverse=True)


def find_graph(name: Path) -> Path:
    """The ONNX file `name`, or for MODEL/VARIANT.onnx the one of that variant that was made last in the workspace."""
    if name.exists() or len(name.parts) != 2:
        return name
    graphs = list(find_root().glob("engines/*/[!.]*-*.onnx"))
    known = {path: f"{path.parent.name}/{path.stem.rpartition('-')[0]}.onnx" for path in graphs}
    found = [path for path in graphs if known[path] == name.as_posix()]
    if not found:
        hint = f"there are {', '.join(sorted(set(known.values())))}" if known else "`vitedge make` and `vitedge export` make them"
        raise VitEdgeError(f"there is no ONNX file {name}", hint=hint)
    return max(found, key=lambda path: path.stat().st_mtime_ns)


def load_recipe(name: str) -> Recipe:
    """The recipe in the file `name`, or in calibration/recipes/<name>.toml, or one of BUILTIN_RECIPES."""
    return _load(Recipe, name, find_root() / "calibration" / "recipes", BUILTIN_RECIPES)


def load_target(name: str, backend: str | None = None) -> Target:
    """The target in the file `name`, or in engines/targets/<name>.toml of the workspace, or of those that vitedge brings.

    backend: in place of its own.
    """
    own = find_root() / "engines" / "targets"
    brought = not (own / f"{name}.toml").is_file() and (BUILTIN_TARGETS / f"{name}.toml").is_file()
    folder = BUILTIN_TARGETS if brought else own
    target = _load(Target, name, folder, {})
    if backend:
        return dataclasses.replace(target, backend=backend)
    keys = read_toml(path) if (path := _path(name, folder)).is_file() else {}
    if "backend" not in keys and (gpu := sorted(keys.keys() & GPU_KEYS)):
        what = f"{path} says {', '.join(gpu)}, which {'is' if len(gpu) == 1 else 'are'} for GPUs, and no backend"
        raise VitEdgeError(what, hint='add backend = "tensorrt" or backend = "tensorrt-rtx"')
    return target


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file as a dict; a VitEdgeError names the file and the line that is wrong."""
    try:
        content: dict[str, Any] = tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise VitEdgeError(f"cannot read {path}: {error}") from error
    return content


def read_spec(cls: type[T], path: Path, *, named: bool = False) -> T:
    """The dataclass `cls` from a TOML file, which a VitEdgeError names. named: after the file, if not in it."""
    data = read_toml(path)
    if named and "name" not in data:
        if "".join(path.stem.split()) != path.stem:
            hint = f'rename it to {"-".join(path.stem.split())}.toml, or give it a name: name = "..."'
            raise VitEdgeError(f"{path} is named after what it holds, and no name has a space", hint=hint)
        data = {"name": path.stem, **data}
    try:
        return from_dict(cls, data)
    except VitEdgeError as error:
        raise VitEdgeError(f"{path}: {error}", hint=error.hint) from error


def read_json(path: Path) -> Any:
    """A JSON file; a VitEdgeError names the file where it is missing or damaged."""
    try:
        return json.loads(path.read_text("utf-8-sig"))
    except OSError as error:
        raise VitEdgeError(f"cannot read {path}: {error.strerror or error}", hint="see that the path is right") from error
    except (ValueError, RecursionError) as error:
        raise VitEdgeError(f"cannot read {path}: {error}", hint="the file is damaged, or is no JSON") from error


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hex."""
    state = hashlib.sha256()  # hashlib.file_digest would do, but JetPack 6 ships Python 3.10
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                state.update(block)
        return state.hexdigest()
    except OSError as error:
        raise VitEdgeError(f"cannot read {path}: {error.strerror}") from error


def content_key(*parts: Any) -> str:
    """Twelve hex digits that change when any of `parts` (JSON-able) changes."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an operating-system error while `path` is written into one sentence."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        hint = "free some space; nothing that was there before has been touched" if full else None
        raise VitEdgeError(f"cannot write {path}: {error.strerror or error}", hint=hint) from error


def write_file(path: Path, data: bytes | str) -> None:
    """Write a whole file or nothing: under a temporary name, flushed to disk, then renamed.

    A link stays, and what it leads to is written; a pipe or device, such as /dev/stdout, is written to and never replaced.
    Names of files that are not UTF-8 are written with escapes.
    """
    content = data.encode(errors="backslashreplace") if isinstance(data, str) else data
    with writing(path):
        place = path.resolve() if path.is_symlink() else path
        if path.exists() and not path.is_file() and not path.is_dir():
            path.write_bytes(content)
            return
    with staged(place) as temporary, temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, data: Any) -> None:
    """Write `data` as indented JSON, a list of plain values on one line, whole or not at all."""
    write_file(path, PLAIN_LIST.sub(_one_line, json.dumps(data, indent=2)) + "\n")


def _one_line(found: re.Match[str]) -> str:
    return "[" + " ".join(found[0][1:-1].split()) + "]"


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` to write a file or a folder under; renamed to `path` if the block succeeds.

    The suffix is kept, since writers choose a format by it. A reader sees the old content or the new, never half of it.
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path, temporary)
        try:
            yield temporary
            _replace(temporary, path)
        finally:
            _remove(temporary)


def _path(name: str, folder: Path) -> Path:
    return Path(name) if name.endswith(".toml") else folder / f"{name}.toml"


def _load(cls: type[T], name: str, folder: Path, builtin: dict[str, T]) -> T:
    path = _path(name, folder)
    if path.is_file():
        return read_spec(cls, path, named=True)
    if name in builtin:
        return builtin[name]
    known = known_recipes() if cls is Recipe else known_targets()
    kind = cls.__name__.lower()
    raise VitEdgeError(f"there is no {kind} {name!r}", hint=f"known: {', '.join(known)}; or give the path of a .toml file")


def _remove_leftovers(path: Path, temporary: Path) -> None:
    """Remove what processes that were killed while writing `path` left behind."""
    patterns = (f".{glob.escape(path.stem)}.*.partial{glob.escape(path.suffix)}", f".{glob.escape(path.name)}.*.old")
    for leftover in [found for pattern in patterns for found in path.parent.glob(pattern)]:
        with suppress(FileNotFoundError):  # others clean up too
            if leftover == temporary or time.time() - leftover.stat().st_mtime > ABANDONED_S:
                _remove(leftover)


def _replace(temporary: Path, path: Path) -> None:
    """Rename `temporary` to `path`. A folder cannot replace a folder, so that one is moved aside; others may do the same."""
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    while True:
        try:
            temporary.replace(path)
            break
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # a file never replaces a folder
                raise
        _remove(old)  # of a process that was killed; in containers, process numbers come back
        with suppress(FileNotFoundError):
            path.replace(old)
            _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
