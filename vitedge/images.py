"""Image files, and members of archives, in; decoded images out, one at a time.

    folder  ->  [ImageFile(path, label)]  ->  a seeded, balanced sample  ->  (ImageFile, uint8[H, W, 3] RGB) ...

A label is the name of the sub-folder of the root that a file lies in. Whatever order the file system has, the order here
is that of the names. Knows nothing of models, sizes or quantization.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import struct
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from vitedge.archives import read_parquet, read_tar
from vitedge.errors import ImageError, VitEdgeError

# Pillow reads far more, and some of it by starting other programs (EPS) or as documents (PDF): not from a data set.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "JPEG2000")
SUFFIXES = (".jpg", ".jpeg", ".jfif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".png", ".webp", ".bmp", ".gif", ".jp2")
LOOK_AHEAD = 4
KEYED = 64  # whose content is hashed: enough to tell other pixels under the same names
# What damaged files make Pillow raise besides OSError; found by flipping bytes in files of each format.
PILLOW_ERRORS = (SyntaxError, ValueError, EOFError, MemoryError, struct.error, zlib.error, Image.DecompressionBombError)


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image on disk, with its label if it has one: a file, or a member of an archive at `path`.

    member: its name in the archive, "" of a file. at, size: where it lies in there (see archives.py).
    """

    path: Path
    label: str | None
    member: str = ""
    at: int = 0
    size: int = 0

    @property
    def name(self) -> str:
        """Short, for people: its label and what the picture itself is called."""
        own = PurePosixPath(self.member).name or self.path.name
        return f"{self.label}/{own}" if self.label else own

    def __str__(self) -> str:
        return f"{self.path}: {self.member}" if self.member else str(self.path)


def list_images(folder: Path) -> list[ImageFile]:
    """Every image file in `folder` and below, by name, sorted by relative path; links are followed, hidden names skipped.

    A single image file is a list of one. A VitEdgeError says what is missing.
    """
    if not folder.exists():
        raise VitEdgeError(f"there is no folder {folder}", hint="give a folder of images, one sub-folder a label")
    suffixes = " ".join(SUFFIXES)
    if not folder.is_dir():
        if not is_image(folder.name):
            raise VitEdgeError(f"{folder} is not an image file", hint=f"known suffixes: {suffixes}")
        return [ImageFile(folder, None)]
    try:
        found = [path.relative_to(folder) for path in walk(folder)]
    except OSError as error:
        raise VitEdgeError(f"cannot read {error.filename}: {error.strerror}") from error
    if not found:
        raise VitEdgeError(f"there are no images in {folder}", hint=f"it is searched at any depth for {suffixes}")
    found.sort(key=Path.as_posix)
    return [ImageFile(folder / path, path.parts[0] if len(path.parts) > 1 else None) for path in found]


def labels_of(files: Sequence[ImageFile]) -> tuple[str, ...]:
    """The distinct labels, sorted."""
    return tuple(sorted({file.label for file in files if file.label is not None}))


def sample(files: Sequence[ImageFile], count: int, seed: int) -> list[ImageFile]:
    """At most `count` of `files`, drawn without replacement, the same ones whatever the order of `files`.

    Labels take turns in shuffled order, so that any leading part of the sample is as balanced as the files allow.
    """
    if count < 1:
        raise VitEdgeError(f"the number of images to draw must be positive, not {count}")
    random = np.random.default_rng(seed)
    by_label: dict[str | None, list[ImageFile]] = {}
    for file in sorted(files, key=lambda file: (file.path.as_posix(), file.at)):
        by_label.setdefault(file.label, []).append(file)
    shuffled = [[group[i] for i in random.permutation(len(group))] for group in by_label.values()]
    turns = itertools.zip_longest(*(shuffled[i] for i in random.permutation(len(shuffled))))
    return list(itertools.islice((file for turn in turns for file in turn if file is not None), min(count, len(files))))


def stream(files: Sequence[ImageFile], skipped: list[str]) -> Iterator[tuple[ImageFile, NDArray[np.uint8]]]:
    """Each file with its image, uint8[H, W, 3] RGB, in order; at most LOOK_AHEAD images are decoded in advance.

    A file that cannot be decoded is left out and its error message appended to `skipped`: a message, since an exception
    would keep the picture it was raised over alive. A VitEdgeError, at the end, if no file could be decoded.
    """
    usable = 0
    for file, image in decoded(files):
        if isinstance(image, ImageError):
            skipped.append(str(image))
            continue
        usable += 1
        yield file, image
    if not usable:
        reason = f"; the first: {skipped[-len(files)]}" if files else ""
        raise VitEdgeError(f"none of {len(files)} images could be decoded{reason}")


def decoded(files: Sequence[ImageFile]) -> Iterator[tuple[ImageFile, NDArray[np.uint8] | ImageError]]:
    """Each file with its image or the reason why there is none, in order; at most LOOK_AHEAD images are decoded in advance."""
    remaining = iter(files)
    ahead: deque[tuple[ImageFile, Future[NDArray[np.uint8]]]] = deque()
    with ThreadPoolExecutor(min(LOOK_AHEAD, os.cpu_count() or 1)) as pool:  # Pillow decodes without the GIL
        while True:
            for file in itertools.islice(remaining, LOOK_AHEAD - len(ahead)):
                ahead.append((file, pool.submit(decode, file)))
            if not ahead:
                return
            file, decoding = ahead.popleft()
            try:
                image = decoding.result()
            except ImageError as error:
                yield file, ImageError(str(error), hint=error.hint)  # without the traceback, which holds the picture
            else:
                yield file, image


def decode(file: ImageFile | Path) -> NDArray[np.uint8]:
    """The image in a file as uint8[H, W, 3] RGB, upright as its EXIF orientation says; read-only.

    Grey of 16 bits is scaled to 8, grey of floats is taken as 0..1, of an animation the first picture. An ImageError
    names the file and the reason: missing, truncated, no image, of a mode without RGB, or more pixels than Pillow allows.
    """
    archived = isinstance(file, ImageFile) and file.member
    path = file.path if isinstance(file, ImageFile) else file
    try:
        with Image.open(io.BytesIO(read_bytes(file)) if archived else path, formats=FORMATS) as image:  # type: ignore[arg-type]
            if image.format != "TIFF":  # which turns itself while it loads; Pillow 10.0 would then turn it twice
                ImageOps.exif_transpose(image, in_place=True)
            return _rgb(image)
    except UnidentifiedImageError as error:
        empty = not archived and not path.stat().st_size
        reason = "the file is empty" if empty else "not an image of a known format"
        raise ImageError(f"cannot decode {file}: {reason}", hint=f"known formats: {', '.join(FORMATS)}") from error
    except ImageError as error:
        raise ImageError(f"cannot decode {file}: {error}") from error
    except OSError as error:
        raise ImageError(f"cannot decode {file}: {error.strerror or error}") from error
    except PILLOW_ERRORS as error:
        raise ImageError(f"cannot decode {file}: {str(error) or type(error).__name__}") from error


def read_bytes(file: ImageFile) -> bytes:
    """The encoded image. What cannot be read is an OSError, or in an archive an ImageError."""
    if not file.member:
        return file.path.read_bytes()
    if file.path.suffix.lower() == ".parquet":
        return read_parquet(file.path, file.at)
    return read_tar(file.path, file.at, file.size)


def images_key(files: Sequence[ImageFile]) -> str:
    """Changes with the images: a hash of the name, size and label of each, and of the whole content of KEYED of them; "" of none.

    Not of all content, since that would read everything once more, and sets of millions of images lie on slow disks.
    """
    state = hashlib.sha256()
    for index, file in enumerate(files):
        size = file.size
        with suppress(OSError):
            size = size or file.path.stat().st_size
        state.update(f"{file.name}\0{file.at}\0{size}\0{file.label}\n".encode("utf-8", "surrogateescape"))
        if index % max(1, len(files) // KEYED) == 0:
            with suppress(OSError, ImageError):
                state.update(hashlib.sha256(read_bytes(file)).digest())
    return state.hexdigest()[:16] if files else ""


def jpeg(image: NDArray[np.uint8], side: int, most: int) -> bytes:
    """uint8[H, W, 3] as a small JPEG: at most `side` pixels on its longer side, and `most` bytes if any quality allows that."""
    picture = Image.fromarray(image)
    picture.thumbnail((side, side))
    for quality in (85, 70, 50, 30, 10):
        content = io.BytesIO()
        picture.save(content, "JPEG", quality=quality, optimize=True)
        if content.tell() <= most:
            break
    return content.getvalue()


def is_image(name: str) -> bool:
    """Whether a file's name ends as that of an image does."""
    return name.lower().endswith(SUFFIXES)


def walk(folder: Path, wanted: Callable[[str], bool] = is_image, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """The files in `folder` and below whose name is wanted; links are followed, hidden names skipped."""
    here = folder.resolve()
    if here in above:  # a link to a folder that it lies in
        return
    for entry in os.scandir(folder):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from walk(folder / entry.name, wanted, (*above, here))
        elif wanted(entry.name):
            yield folder / entry.name


def _rgb(image: Image.Image) -> NDArray[np.uint8]:
    if image.mode.startswith("I"):
        grey = _from_16_bits(np.asarray(image))
    elif image.mode == "F":
        grey = _from_floats(np.asarray(image))
    else:
        # drops alpha instead of blending it with a background, as the loaders that models were trained with do
        return np.asarray(image.convert("RGB"))
    return np.repeat(grey[..., None], 3, axis=2)


def _from_16_bits(grey: NDArray[np.integer]) -> NDArray[np.uint8]:
    """0..65535 as 0..255, rounded, where Pillow would clip at 255."""
    low, high = int(grey.min()), int(grey.max())
    if low < 0 or high > 65535:
        raise ValueError(f"its values, {low} to {high}, do not fit in 16 bits")
    return ((grey.astype(np.uint32) + 128) // 257).astype(np.uint8)  # 65535 = 255 * 257


def _from_floats(grey: NDArray[np.float32]) -> NDArray[np.uint8]:
    low, high = float(grey.min()), float(grey.max())
    if not (low >= 0 and high <= 1):  # so that NaN is refused, too
        raise ValueError(f"its values are floats from {low:g} to {high:g}, not from 0 to 1")
    return np.rint(grey * 255).astype(np.uint8)
