"""Images and a table that says what they show in, the images with these labels out.

    a.jpg,cat                       CSV, TSV or text, with or without a header, in any order of columns
    {"a.jpg": "cat"}                JSON: an object, a list of objects or of pairs, {"cat": ["a.jpg"]}; or an object a line
    cat                             one label a line, in the order of the files' names

Knows nothing of models: a label is a text, be it a name, a number or a wnid.
"""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from vitedge.errors import VitEdgeError
from vitedge.images import ImageFile, is_image

FILE_KEYS = ("file", "file_name", "filename", "image", "image_id", "imageid", "img", "path", "name", "id")
LABEL_KEYS = ("label", "labels", "class", "class_name", "category", "target", "wnid", "synset", "predictionstring", "cls")
NESTED = ("labels", "images", "annotations", "data")  # keys of a JSON object under which the table lies
BOXED = re.compile(r"(n\d{8})\s+\d")  # Kaggle's ImageNet: the class, and where in the picture it is
DEVKIT = "ILSVRC2012_validation_ground_truth.txt"
EXAMINED = 1000  # rows that tell which column names the files
Rows = Sequence[tuple[str, str]]  # what names a file, and its label


def label_files(files: Sequence[ImageFile], images: Path, table: Path, notes: list[str]) -> list[ImageFile]:
    """The files with the labels that `table` gives them in place of their own; None where it gives none.

    images: the data set, below which the table names files; the end of a path will do where it is unlike any other.
    notes: receives sentences on rows that fit no file and on files without a row. A table that cannot be read, that fits no
    file or that contradicts itself is a VitEdgeError.
    """
    names = _Names(files, images)
    rows = _read(table, names)
    if not rows:
        raise VitEdgeError(f"{table} is empty", hint="a line of it says: file,label")
    if all(name == "" for name, _ in rows):
        return _in_order(files, table, [label for _, label in rows])
    labels, strangers = dict[int, str](), list[str]()
    for name, label in rows:
        if (index := names.find(name)) is None:
            strangers.append(name)
        elif label and labels.setdefault(index, label) != label:
            raise VitEdgeError(
                f"{table} gives {files[index].name} two labels: {labels[index]!r} and {label!r}", hint="leave one row"
            )
    if len(strangers) == len(rows):
        hint = f"the images are called {_some([str(file.path.name) for file in files])}"
        raise VitEdgeError(f"no row of {table} names an image in {images}: {_some(strangers)}", hint=hint)
    if strangers:
        notes.append(f"{len(strangers)} rows of {table} name no image in {images}: {_some(strangers)}")
    if missing := [file.name for index, file in enumerate(files) if index not in labels]:
        notes.append(f"{table} has no label for {len(missing)} of {len(files)} images: {_some(missing)}")
    return [replace(file, label=labels.get(index)) for index, file in enumerate(files)]


class _Names:
    """All that a file may be called by."""

    def __init__(self, files: Sequence[ImageFile], images: Path) -> None:
        self._indices: dict[str, int] = {}
        self._shared = set[str]()
        for index, file in enumerate(files):
            whole = PurePosixPath(file.member or _relative(file.path, images))
            for name in {str(whole), whole.name, str(whole.with_suffix("")), whole.stem}:
                if self._indices.setdefault(name, index) != index:
                    self._shared.add(name)

    def find(self, name: str) -> int | None:
        """The number of the file that is called so; None of none. A name that several share is a VitEdgeError."""
        for form in _forms(name):
            if form in self._indices:
                if form in self._shared:
                    raise VitEdgeError(f"several images are called {form}", hint="name them by their paths below the folder")
                return self._indices[form]
        return None

    def known(self, name: str) -> bool:
        """Whether a file, or several, are called so."""
        return any(form in self._indices for form in _forms(name))


def _forms(name: str) -> list[str]:
    """What a table may mean by a name: the whole path, its end, or the same picture in another format."""
    path = PurePosixPath(name.strip().replace("\\", "/"))
    return [str(path), path.name, *([path.stem] if is_image(path.name) else [])]


def _relative(path: Path, images: Path) -> str:
    return (path.relative_to(images) if path.is_relative_to(images) and path != images else Path(path.name)).as_posix()


def _read(table: Path, names: _Names) -> Rows:
    """The rows of a table; of one that holds labels alone, each with "" for a name."""
    try:
        text = table.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise VitEdgeError(f"{table} is not text in UTF-8", hint="save it again as CSV in UTF-8") from error
    except OSError as error:
        raise VitEdgeError(f"cannot read {table}: {error.strerror}", hint="--labels names a CSV or JSON file") from error
    try:
        if table.suffix == ".jsonl":
            return list(_from_json([json.loads(line) for line in text.splitlines() if line.strip()], table))
        if table.suffix == ".json":
            return list(_from_json(json.loads(text), table))
    except (ValueError, RecursionError) as error:
        raise VitEdgeError(f"{table} is not JSON: {error}", hint='write {"a.jpg": "cat"}') from error
    return list(_from_cells(_cells(text, table), names, table))


def _from_json(content: Any, table: Path) -> Iterator[tuple[str, str]]:
    """Rows of any of the forms that the module's docstring names."""
    if isinstance(content, Mapping):
        nested = next((content[key] for key in NESTED if isinstance(content.get(key), (list, Mapping))), None)
        if nested is not None:
            yield from _from_json(nested, table)
            return
        for key, value in content.items():
            if isinstance(value, list):  # a label and its files
                yield from ((str(name), key) for name in value)
            else:
                yield key, _text(value, table)
        return
    if not isinstance(content, list):
        raise VitEdgeError(f"{table} holds neither an object nor a list", hint='write {"a.jpg": "cat"}')
    for entry in content:
        if isinstance(entry, Mapping):
            lowered = {str(key).lower(): value for key, value in entry.items()}
            name, label = (next((lowered[key] for key in keys if key in lowered), None) for keys in (FILE_KEYS, LABEL_KEYS))
            if name is None:
                raise VitEdgeError(f"an entry of {table} names no file: {_some(list(lowered))}", hint=f"call it {FILE_KEYS[0]}")
            yield str(name), _text(label, table)
        elif isinstance(entry, list) and len(entry) == 2:
            yield str(entry[0]), _text(entry[1], table)
        else:
            yield "", _text(entry, table)


def _text(label: Any, table: Path) -> str:
    """A label in JSON; "" of null."""
    if label is None:
        return ""
    if isinstance(label, (str, int)):
        return str(label)
    raise VitEdgeError(f"{table} holds a label that is neither text nor a whole number: {json.dumps(label)[:60]}")


def _cells(text: str, table: Path) -> list[list[str]]:
    """The lines of a table, split by what its first line is split by: a tab, comma, semicolon, bar, or else white space."""
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        return []
    counts = {mark: lines[0].count(mark) for mark in "\t,;|"}
    mark = max(counts, key=lambda mark: counts[mark])
    if not counts[mark]:
        return [line.split(None, 1) for line in lines]
    try:
        return [[cell.strip() for cell in row] for row in csv.reader(lines, delimiter=mark, skipinitialspace=True, strict=True)]
    except csv.Error as error:
        raise VitEdgeError(f"{table} is not CSV: {error}", hint="see that every quote is closed") from error


def _from_cells(cells: list[list[str]], names: _Names, table: Path) -> Iterator[tuple[str, str]]:
    """The rows of a table: which column names files is seen from what it holds, which has the labels from its header."""
    if not cells:
        return
    header = [cell.strip().lower() for cell in cells[0]]
    width, headed = len(header), any(cell in (*FILE_KEYS, *LABEL_KEYS) for cell in header)
    rows = cells[1:] if headed else cells
    if width == 1:
        yield from (("", row[0].strip()) for row in rows)
        return
    known = Counter(index for row in rows[:EXAMINED] for index, cell in enumerate(row[:width]) if names.known(cell))
    file = known.most_common(1)[0][0] if known else next((header.index(key) for key in FILE_KEYS if key in header), 0)
    label = next((header.index(key) for key in LABEL_KEYS if key in header and header.index(key) != file), None)
    if label is None and width > 2:
        raise VitEdgeError(f"which column of {table} holds the labels is not clear: {_some(cells[0])}", hint="call it label")
    label = 1 - file if label is None else label
    for number, row in enumerate(rows, 1 + headed):
        if len(row) <= max(file, label):
            raise VitEdgeError(f"line {number} of {table} has {len(row)} cells, where the first line has {width}")
        boxed = BOXED.match(row[label])
        yield row[file], boxed[1] if boxed else row[label].strip()


def _in_order(files: Sequence[ImageFile], table: Path, labels: Sequence[str]) -> list[ImageFile]:
    """The files with labels in the order of their names."""
    if len(labels) != len(files):
        raise VitEdgeError(
            f"{table} has {len(labels)} labels and names no files, and there are {len(files)} images",
            hint="write file,label in each line",
        )
    if table.name == DEVKIT:
        raise VitEdgeError(
            f"{table} numbers the classes as ImageNet's development kit does, which is no order of names",
            hint="give a table of wnids (n01440764), or class indices in the order of the wnids",
        )
    return [replace(file, label=label or None) for file, label in zip(files, labels, strict=True)]


def _some(names: Sequence[str]) -> str:
    return ", ".join([*names[:3], *["..."][: len(names) > 3]])
