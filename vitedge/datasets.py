"""A data set as it lies on disk in, a list of image files with their labels out.

    folder by class, folder + table of labels, ImageNet's val, parquet files, webdataset shards  ->  [ImageFile, ...]

Says where each picture lies and what it is labelled; images.py reads them. What is odd and does not stop the reading is told in
notes. Knows nothing of models: which label is which class is bench/labels.py's to say.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from vitedge.archives import Member, list_parquet, list_tar
from vitedge.errors import VitEdgeError
from vitedge.images import ImageFile, is_image, list_images, walk
from vitedge.label_table import label_files

ARCHIVES = (".tar", ".parquet")
COMPRESSED = (".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".tar.zst", ".zip", ".7z")
TABLES = ("labels.csv", "labels.tsv", "labels.txt", "labels.json", "labels.jsonl")  # looked for in the folder itself
VALIDATION = re.compile(r".*_(n\d{8})$")  # ILSVRC2012_val_00000293_n01440764.JPEG, as Hugging Face's archive has it
BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
MOST_SHARDS = 100_000


def list_dataset(images: Path, labels: Path | None = None, notes: list[str] | None = None) -> list[ImageFile]:
    """Every image of a data set, in an order that depends on names alone.

    images: a folder of images, of tar shards or of parquet files, searched at any depth; one such file; or shards by a pattern,
    `train-{000..127}.tar`. Labels are those in the archive, or the first folder below the root. labels: a table that goes before
    these, CSV or JSON (see docs/datasets.md); also found as labels.csv and the like in the folder; or a column of parquet files.
    notes: receives sentences on folders without images and on rows that fit no image. What cannot be read is a VitEdgeError.
    """
    told = [] if notes is None else notes
    shards = _shards(images)
    if shards:
        column = str(labels) if labels and not labels.exists() and shards[0].suffix == ".parquet" else None
        files = [file for shard in shards for file in _archived(shard, column)]
        table = None if column else labels
        if not files:
            hint = "it has no rows" if shards[0].suffix.lower() == ".parquet" else "pictures in a tar are known by their suffix"
            raise VitEdgeError(f"there are no images in {images}", hint=hint)
    else:
        files = list_images(images)
        table = labels or _table_in(images)
        told += _empty_folders(images)
    if table is None:
        return _validation(files)
    return label_files(files, images, table, told)


def _shards(images: Path) -> list[Path]:
    """The archives that make up a data set; none where it is made up of image files."""
    if BRACES.search(images.name) and not images.exists():
        return _expanded(images)
    if images.name.lower().endswith(COMPRESSED) and images.is_file():
        raise VitEdgeError(f"{images} is compressed, so its pictures cannot be read one by one", hint="unpack it first")
    if images.suffix.lower() in ARCHIVES and images.is_file():
        return [images]
    if not images.is_dir() or next(walk(images), None):
        return []
    found = sorted(walk(images, lambda name: name.lower().endswith(ARCHIVES)), key=Path.as_posix)
    if len({path.suffix.lower() for path in found}) > 1:
        raise VitEdgeError(f"there are tar and parquet files in {images}", hint="give a folder that holds the data set alone")
    return found


def _expanded(pattern: Path) -> list[Path]:
    """The shards that a pattern such as name-{000..127}.tar stands for; every one must be there."""
    names = [pattern.name]
    while match := BRACES.search(names[0]):
        first, last = match.groups()
        numbers = range(int(first), int(last) + 1)
        if len(numbers) * len(names) > MOST_SHARDS:
            raise VitEdgeError(f"{pattern.name} stands for more than {MOST_SHARDS} files")
        width = len(first) if first.startswith("0") else 0
        names = [BRACES.sub(str(number).zfill(width), name, count=1) for name in names for number in numbers]
        if not names:
            raise VitEdgeError(f"{pattern.name} stands for no file: {first} is above {last}")
    paths = [pattern.with_name(name) for name in names]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise VitEdgeError(f"{len(missing)} of {len(paths)} shards of {pattern} are missing: {_some(missing)}")
    if paths[0].suffix.lower() not in ARCHIVES:
        raise VitEdgeError(f"{pattern} is neither a tar nor a parquet file")
    return paths


def _archived(shard: Path, column: str | None) -> Iterator[ImageFile]:
    """The images in one archive."""
    members: Iterable[Member] = list_parquet(shard, column) if shard.suffix.lower() == ".parquet" else list_tar(shard, is_image)
    return (ImageFile(shard, member.label, member.name, member.at, member.size) for member in members)


def _validation(files: Sequence[ImageFile]) -> list[ImageFile]:
    """The files, labelled by the wnid at the end of their names where all have one and no other label."""
    found = [None if file.label else VALIDATION.fullmatch(Path(file.name).stem) for file in files]
    if not all(found):
        return list(files)
    return [replace(file, label=match[1]) for file, match in zip(files, found, strict=True) if match]


def _empty_folders(images: Path) -> list[str]:
    """A sentence on the class folders that hold no image."""
    if not images.is_dir():
        return []
    folders = sorted(entry.name for entry in images.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    empty = [name for name in folders if next(walk(images / name), None) is None]
    if not empty:
        return []
    return [f"no image is in {len(empty)} of {len(folders)} folders of {images}: {_some(empty)}"]


def _table_in(images: Path) -> Path | None:
    """The table of labels that lies in a folder of images."""
    found = [images / name for name in TABLES if images.is_dir() and (images / name).is_file()]
    if len(found) > 1:
        raise VitEdgeError(f"{images} holds {' and '.join(path.name for path in found)}", hint="say which with --labels")
    return found[0] if found else None


def _some(names: Sequence[str]) -> str:
    return ", ".join([*names[:3], *["..."][: len(names) > 3]])
