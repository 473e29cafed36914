"""What images are labelled and what a model knows in, class indices out.

    labels of files + ModelCard  ->  {label: class index}

Knows nothing of images or engines.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence

from vitedge.errors import VitEdgeError
from vitedge.imagenet import WNID, imagenet_names
from vitedge.images import ImageFile, labels_of
from vitedge.specs import ModelCard

UNKNOWN = -1  # the class of an image without a usable label
NAMED_ALIKE = 0.8  # of 1000 labels: then the others are ImageNet's too, under other names


def match_labels(folders: Sequence[str], card: ModelCard) -> dict[str, int]:
    """The class index of each folder name that has one.

    A name is a label of the model exactly, or but for case, spaces, hyphens and underscores, or one of the names that a label
    lists between commas; or a wnid of ImageNet, for a model of these classes or of some of them. Where no name is, and all are
    whole numbers, they are class indices. A name that fits two labels is left out. Raises VitEdgeError where none fits.
    """
    count = len(card.labels) or (card.outputs[0].shape[-1] if card.outputs else None)
    found = _wnids(folders, card.labels, count)
    for forms in (_synonyms, lambda label: {_loose(label)}, lambda label: {label}):  # what is more exact goes before
        found |= _matches(folders, card.labels, forms)
    if not found and all(re.fullmatch("[0-9]+", folder) for folder in folders):
        found = {folder: int(folder) for folder in folders if count is None or int(folder) < count}
    if not found:
        indices = f"class index, 0 to {count - 1}" if count else "class index"
        raise VitEdgeError(
            f"the labels of the images ({_some(folders)}) match none of those of {card.name} ({_some(card.labels)})",
            hint=f"name the folders like the model's labels or by {indices}, or give --labels; until then there is no top-1",
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


def _matches(folders: Sequence[str], labels: Sequence[str], forms: Callable[[str], set[str]]) -> dict[str, int]:
    """Index of the one label that has a form in common with the folder, for the folders that have one."""
    indices = defaultdict[str, set[int]](set)
    for index, label in enumerate(labels):
        for form in forms(label):
            indices[form].add(index)
    found = {folder: set().union(*(indices.get(form, ()) for form in forms(folder))) for folder in folders}
    return {folder: at.pop() for folder, at in found.items() if len(at) == 1}


def _wnids(folders: Sequence[str], labels: Sequence[str], count: int | None) -> dict[str, int]:
    """The class index of each folder that is named by a wnid."""
    wnids = [folder for folder in folders if WNID.fullmatch(folder) and folder in imagenet_names()]
    if not wnids:
        return {}
    names = imagenet_names()
    if count == len(names) and _is_imagenet(labels):
        return {wnid: index for index, wnid in enumerate(names) if wnid in wnids}
    by_name = _matches([", ".join(names[wnid]) for wnid in wnids], labels, _synonyms)
    return {wnid: by_name[name] for wnid in wnids if (name := ", ".join(names[wnid])) in by_name}


def _is_imagenet(labels: Sequence[str]) -> bool:
    """Whether 1000 labels are the names of ImageNet's classes in order, or no names at all."""
    if all(re.fullmatch("(label_)?[0-9]+", label, re.IGNORECASE) for label in labels):
        return True
    pairs = zip(labels, imagenet_names().values(), strict=True)
    return sum(bool(_synonyms(label) & set(map(_loose, names))) for label, names in pairs) > NAMED_ALIKE * len(labels)


def _synonyms(label: str) -> set[str]:
    """What a label lists between commas, loosely."""
    return {_loose(name) for name in label.split(",")}


def _loose(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name).casefold()


def _some(names: Sequence[str]) -> str:
    return ", ".join([*map(repr, names[:3]), *["..."][: len(names) > 3]]) or "it has none"
