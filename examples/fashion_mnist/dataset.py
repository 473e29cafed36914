"""Fashion-MNIST's IDX files in, folders of PNG images by class out.

    python examples/fashion_mnist/dataset.py     ->  .cache/test (10,000 images), .cache/calibration (1,024 training images)

The data is MIT-licensed (data/LICENSE). The folders are whole or absent, and kept if they are there.
"""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).parent
LABELS = ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
PARTS = {"test": "t10k", "calibration": "train1k"}


def read_idx(path: Path) -> np.ndarray:
    """Read a gzipped IDX file of bytes: uint8[N] labels or uint8[N, 28, 28] images."""
    data = gzip.decompress(path.read_bytes())
    dims = np.frombuffer(data, ">u4", count=data[3], offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(dims)


def unpack(part: str) -> Path:
    """Write the images of "test" or "calibration" as .cache/PART/LABEL/NNNNN.png, and return that folder."""
    folder, name = HERE / ".cache" / part, PARTS[part]
    if folder.is_dir():
        return folder
    images = read_idx(HERE / "data" / f"{name}-images-idx3-ubyte.gz")
    labels = read_idx(HERE / "data" / f"{name}-labels-idx1-ubyte.gz")
    partial = folder.with_name(f"{part}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for label in LABELS:
        (partial / label).mkdir(parents=True)
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        Image.fromarray(image).save(partial / LABELS[label] / f"{index:05}.png", compress_level=1)
    return partial.rename(folder)


if __name__ == "__main__":
    for part in PARTS:
        print(unpack(part))
