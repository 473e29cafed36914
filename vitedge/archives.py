"""Pictures inside tar and parquet files: where they lie, what they are labelled, and their bytes, each read on its own.

    shard.tar      ->  list_tar      ->  Member(name, label, at = offset, size)   ->  read_tar      ->  bytes
    table.parquet  ->  list_parquet  ->  Member(name, label, at = row, size)      ->  read_parquet  ->  bytes

Nothing is unpacked, so what a name in an archive says of folders does not matter. Knows nothing of pictures: whether the bytes
are one is found out by whoever decodes them.
"""

from __future__ import annotations

import json
import struct
import tarfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from vitedge.errors import ImageError, VitEdgeError, first_line, import_package

MAX_BYTES = 2**28  # of one picture, and of one text beside it
ROWS = 32  # that are read from a parquet file at once
OPEN = 4  # parquet files that are kept open
PICTURE_COLUMNS = ("image", "img", "picture", "jpg", "png", "bytes")
LABEL_COLUMNS = ("label", "labels", "class", "cls", "category", "target", "fine_label")
LABEL_KEYS = ("label", "cls", "class", "category", "class_name", "wnid")
# what damaged headers make the standard library raise besides TarError
TAR_ERRORS = (tarfile.TarError, EOFError, ValueError, OverflowError, struct.error, UnicodeError)


@dataclass(frozen=True, slots=True)
class Member:
    """A picture in an archive. at: the offset of its bytes in a tar, its row in a parquet file. size: in bytes, 0 = not known."""

    name: str
    label: str | None
    at: int
    size: int = 0


def list_tar(path: Path, is_image: Callable[[str], bool]) -> list[Member]:
    """The pictures of a tar file, in order, labelled by a `.cls` or `.json` beside them, as in a webdataset, or by their folder.

    What lies beside a picture has its name up to the first dot. A tar that is compressed, damaged or cut short is a VitEdgeError.
    """
    pictures, texts, seen = list[Member](), dict[str, str](), -1
    try:
        with path.open("rb") as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
            for info in archive:
                if info.size < 0 or info.offset_data <= seen:  # else a hostile header leads around in circles
                    raise tarfile.ReadError("a header points backwards")
                seen = info.offset_data
                name = PurePosixPath(info.name)
                if not info.isreg() or info.issparse() or name.name.startswith("."):
                    continue
                if is_image(name.name):
                    pictures.append(Member(info.name, None, info.offset_data, info.size))
                elif name.suffix in (".cls", ".json") and info.size <= MAX_BYTES:
                    text = read_tar(path, info.offset_data, info.size)
                    if (label := _label_of(name.suffix, text)) is not None:
                        texts[_key(info.name)] = label
            stream.seek(archive.offset)
            if any(stream.read(tarfile.BLOCKSIZE)):  # tarfile takes a damaged header for the end
                raise tarfile.ReadError(f"the header at byte {archive.offset} is damaged")
    except TAR_ERRORS as error:
        compressed = path.suffix in (".gz", ".tgz", ".xz", ".bz2", ".zst")
        why = "it is compressed" if compressed else first_line(error)
        hint = "decompress it: only so can its pictures be read one by one" if compressed else "copy or download it again"
        raise VitEdgeError(f"{path} cannot be read as a tar file: {why}", hint=hint) from error
    folders = _folders([member.name for member in pictures])
    found: dict[str, Member] = {}
    for member, folder in zip(pictures, folders, strict=True):
        key = _key(member.name)
        label = texts.get(key, folder)
        # of a labelled sample the first picture is it: another one is a mask or the like
        found.setdefault(key if key in texts else member.name, Member(member.name, label, member.at, member.size))
    return list(found.values())


def read_tar(path: Path, at: int, size: int) -> bytes:
    """The bytes of a member; an ImageError where the file ends before it does, or where it is too large to be a picture."""
    if size > MAX_BYTES:
        raise ImageError(f"it has {size} bytes, more than the {MAX_BYTES} that one picture may have")
    with path.open("rb") as stream:
        stream.seek(at)
        content = stream.read(size)
    if len(content) < size:
        raise ImageError(f"{path.name} ends before it does")
    return content


def list_parquet(path: Path, column: str | None = None) -> list[Member]:
    """The rows of a parquet file as Hugging Face's datasets writes it: a column of pictures, and one of labels.

    column: that of the labels, where its name or type does not tell. A damaged file, or one without it, is a VitEdgeError.
    """
    try:
        with _Parquet(path) as file:
            pictures, labels, names = _columns(path, file.schema, column)
            stored = file.table([f"{pictures}.path"]) if "path" in file.fields(pictures) else None
            given = file.table([labels]) if labels else None
            count = file.rows
    except _arrow().ArrowException as error:
        raise VitEdgeError(
            f"{path} cannot be read as a parquet file: {first_line(error)}", hint="copy or download it again"
        ) from error
    files = [None] * count if stored is None else [(entry or {}).get("path") for entry in stored[pictures].to_pylist()]
    values = [None] * count if given is None else given[labels].to_pylist()
    rows = enumerate(zip(files, values, strict=True))
    return [Member(name or f"row {row}", _label_in(value, names), row) for row, (name, value) in rows]


def read_parquet(path: Path, at: int) -> bytes:
    """The bytes of the picture in row `at`; an ImageError where there are none. Rows one after the other are read ahead."""
    try:
        content = _reader(path).picture(at)
    except _arrow().ArrowException as error:
        raise ImageError(f"{path.name} is damaged: {first_line(error)}") from error
    if not content:
        raise ImageError(f"row {at} holds no bytes")
    return content


class _Parquet:
    """An open parquet file that gives pictures by the number of their row."""

    def __init__(self, path: Path) -> None:
        self._file = import_package("pyarrow.parquet", "data", "pyarrow").ParquetFile(path, memory_map=True)
        self._turn = threading.Lock()
        self._batches: Iterator[Any] = iter(())
        self._read: OrderedDict[int, Any] = OrderedDict()  # first row -> pictures; the last few, as threads do not keep the order
        self._next = -1  # row that comes next; -1 of none
        self._column = ""
        self._path = path

    @property
    def schema(self) -> Any:
        """Arrow's, with the metadata."""
        return self._file.schema_arrow

    @property
    def rows(self) -> int:
        """How many there are."""
        return int(self._file.metadata.num_rows)

    def fields(self, column: str) -> list[str]:
        """The names of the fields of a column; none of a plain one."""
        kind = self.schema.field(column).type
        return [kind.field(index).name for index in range(kind.num_fields)]

    def table(self, columns: Sequence[str]) -> Any:
        """Whole columns."""
        return self._file.read(columns=list(columns))

    def picture(self, row: int) -> bytes | None:
        """The bytes in one row."""
        with self._turn:
            if not (found := self._held(row)):
                self._seek(row)
                while not (found := self._held(row)):
                    self._advance()
            first, pictures = found
            value: bytes | None = pictures[row - first].as_py()
            return value

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _held(self, row: int) -> tuple[int, Any] | None:
        return next(((first, held) for first, held in self._read.items() if first <= row < first + len(held)), None)

    def _seek(self, row: int) -> None:
        """Go to the group of a row, unless it is among the next rows anyway."""
        if not 0 <= row < self.rows:
            raise ImageError(f"{self._path.name} has no row {row}")
        first, groups = 0, range(self._file.num_row_groups)
        for group in groups:
            count = self._file.metadata.row_group(group).num_rows
            if row < first + count:
                break
            first += count
        if not (first <= self._next <= row):
            self._next = first
            self._column = self._column or _columns(self._path, self.schema, None, labelled=False)[0]
            leaf = f"{self._column}.bytes" if self.fields(self._column) else self._column
            self._batches = self._file.iter_batches(ROWS, row_groups=list(groups)[group:], columns=[leaf], use_threads=False)

    def _advance(self) -> None:
        """Read the next rows."""
        try:
            column = next(self._batches).column(0)
        except StopIteration:
            raise ImageError(f"{self._path.name} ends before row {self._next}") from None
        except Exception:
            self._next = -1  # what comes after it is not known
            raise
        self._read[self._next] = column.field("bytes") if self.fields(self._column) else column
        self._next += len(column)
        while len(self._read) > 2:
            self._read.popitem(last=False)

    def __enter__(self) -> _Parquet:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


_readers: OrderedDict[Path, _Parquet] = OrderedDict()
_turn = threading.Lock()


def _reader(path: Path) -> _Parquet:
    """The open file `path`; a few are kept open."""
    with _turn:
        if path not in _readers:
            _readers[path] = _Parquet(path)
            while len(_readers) > OPEN:
                _readers.popitem(last=False)  # closed with its last reference: another thread may be reading
        _readers.move_to_end(path)
        return _readers[path]


def _arrow() -> Any:
    return import_package("pyarrow", "data")


def _columns(path: Path, schema: Any, column: str | None, *, labelled: bool = True) -> tuple[str, str, Sequence[str]]:
    """The columns of pictures and of labels ("": none), and the names of the classes where labels are numbers."""
    features = _features(schema)
    kinds = {field.name: str(field.type) for field in schema}
    pictures = [name for name, feature in features.items() if feature.get("_type") == "Image"] or [
        name for name, kind in kinds.items() if "binary" in kind and kind.startswith(("binary", "large_binary", "struct<"))
    ]
    picture = _chosen(pictures, PICTURE_COLUMNS)
    if picture is None:
        raise VitEdgeError(f"which column of {path} holds the pictures is not clear: {_listed(kinds)}", hint="call it image")
    if not labelled:
        return picture, "", ()
    labels = [name for name, feature in features.items() if feature.get("_type") == "ClassLabel"]
    labels = labels or [name for name in LABEL_COLUMNS if name in kinds]
    label = column or _chosen(labels, LABEL_COLUMNS[:1])
    if label is None and labels:
        hint = f"name one of them: --labels {labels[0]}"
        raise VitEdgeError(f"{path} has several columns of labels: {', '.join(labels)}", hint=hint)
    if label and label not in kinds:
        raise VitEdgeError(f"{path} has no column {label}", hint=f"its columns: {_listed(kinds)}")
    return picture, label or "", tuple(features.get(label or "", {}).get("names") or ())


def _features(schema: Any) -> dict[str, Any]:
    """What Hugging Face's metadata say of the columns; nothing of a file without."""
    try:
        content = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = content["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def _chosen(names: Sequence[str], known: Sequence[str]) -> str | None:
    """The only one of `names`, else the first of `known` among them."""
    return names[0] if len(names) == 1 else next((name for name in known if name in names), None)


def _listed(kinds: dict[str, str]) -> str:
    return ", ".join(f"{name} ({kind.partition('<')[0]})" for name, kind in list(kinds.items())[:10])


def _label_in(value: object, names: Sequence[str]) -> str | None:
    """A label as text; None where there is none, which Hugging Face writes as -1."""
    if value is None or value == -1:
        return None
    if names and isinstance(value, int) and 0 <= value < len(names):
        return str(names[value])
    return str(value)


def _key(name: str) -> str:
    """What all that belongs to one sample of a webdataset is called."""
    folder, slash, file = name.rpartition("/")
    return f"{folder}{slash}{file.partition('.')[0]}"


def _label_of(suffix: str, content: bytes) -> str | None:
    """The label that a `.cls` or `.json` file gives; None where it gives none."""
    try:
        text = content.decode("utf-8-sig").strip()
        if suffix == ".cls":
            return text or None
        found = json.loads(text)
    except ValueError:
        return None
    if isinstance(found, dict):
        found = next((found[key] for key in LABEL_KEYS if key in found), None)
    return str(found) if isinstance(found, (str, int)) and not isinstance(found, bool) else None


def _folders(names: Sequence[str]) -> list[str | None]:
    """For each name the first folder in which it does not lie together with all the others."""
    parts = [[part for part in PurePosixPath(name).parts[:-1] if part not in (".", "..", "/")] for name in names]
    while parts and all(len(part) > 1 and part[0] == parts[0][0] for part in parts):
        parts = [part[1:] for part in parts]
    return [part[0] if part else None for part in parts]
