"""The 1000 classes of ImageNet (ILSVRC 2012): their WordNet numbers and names, in the order of the models' outputs.

The table imagenet.tsv was taken from timm 1.0.31 (timm/data/_info, Apache License 2.0), which has its names from WordNet 3.0.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

WNID = re.compile(r"n\d{8}")


@cache
def imagenet_names() -> dict[str, tuple[str, ...]]:
    """wnid -> the names of the class, for the 1000 classes in order."""
    text = Path(__file__).with_name("imagenet.tsv").read_text("utf-8")
    rows = (line.split("\t") for line in text.splitlines())
    return {wnid: tuple(names.split(", ")) for wnid, names in rows}
