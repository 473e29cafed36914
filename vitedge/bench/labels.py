"""What images are labelled and what a model knows in, class indices out.

    labels of files + ModelCard  ->  {label: class index}

Knows nothing of images or engines.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from vitedge.errors import VitEdgeError
from vitedge.images import ImageFile, labels_of
from vitedge.specs import ModelCard

UNKNOWN = -1  # the class of an image without a usable label


def match_labels(folders: Sequence[str], card: ModelCard) -> dict[str, int]:
    """The class index of each folder name that has one.

    A name is a label of the model exactly, or but for case, spaces, hyphens and underscores; where no name is, and all are
    whole numbers, they are class indices. A name that fits two labels is left out. Raises VitEdgeError where none fits.
    """
    found = {**_matches(folders, card.labels, _loose), **_matches(folders, card.labels, str)}  # an exact name goes first
    count = len(card.labels) or (card.outputs[0].shape[-1] if card.outputs else None)
    if not found and all(re.fullmatch("[0-9]+", folder) for folder in folders):
        found = {folder: int(folder) for folder in folders if count is None or int(folder) < count}
    if not found:
        indices = f"class index, 0 to {count - 1}" if count else "class index"
        raise VitEdgeError(
            f"the image folders ({_some(folders)}) match none of the labels of {card.name} ({_some(card.labels)})",
            hint=f"name the folders like the labels or by {indices}; until then there is no top-1",
        )
    return found


def known_classes(card: ModelCard, files: Sequence[ImageFile], problems: list[str]) -> dict[str, int]:
    """Label -> class index for one model; labels without one are told to `problems`, once a model."""
    folders = labels_of(files)
    if card.task != "classify" or not folders:
        return {}
    try:
        found = match_labels(folders, card)
        strangers = [folder for folder in folders if folder not in found]
        problem = f"{card.name} has no label for {_some(strangers)}: their images do not count for top-1" if strangers else ""
    except VitEdgeError as error:
        found, problem = {}, f"{error}: {error.hint}"
    if problem and problem not in problems:
        problems.append(problem)
    return found


def _matches(folders: Sequence[str], labels: Sequence[str], form: Callable[[str], str]) -> dict[str, int]:
    """Index of the one label whose `form` is that of the folder, for the folders that have one."""
    indices: dict[str, list[int]] = {}
    for index, label in enumerate(labels):
        indices.setdefault(form(label), []).append(index)
    return {folder: at[0] for folder in folders if len(at := indices.get(form(folder), [])) == 1}


def _loose(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name).casefold()


def _some(names: Sequence[str]) -> str:
    return ", ".join([*map(repr, names[:3]), *["..."][: len(names) > 3]]) or "it has none"
