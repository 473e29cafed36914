"""Data sets as they lie on disk: tables of labels with all that is wrong with them, ImageNet's layouts, empty folders."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitedge.bench.labels import match_labels
from vitedge.datasets import list_dataset
from vitedge.errors import VitEdgeError
from vitedge.imagenet import imagenet_names
from vitedge.images import list_images
from vitedge.specs import ModelCard, Preprocess


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    """Four pictures in one folder, and one below."""
    for name in ("a.png", "b.png", "c d.png", "e.png", "deep/f.png"):
        save(tmp_path / "set" / name)
    return tmp_path / "set"


def save(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((2, 2, 3), np.uint8)).save(path)


def labels(flat: Path, table: Path | None = None, notes: list[str] | None = None) -> dict[str, str | None]:
    return {file.path.name: file.label for file in list_dataset(flat, table, notes)}


WANTED = {"a.png": "cat", "b.png": "dog", "c d.png": "great, white shark", "e.png": "7", "f.png": "cat"}
ROWS = list(WANTED.items())
SHARK = '"great, white shark"'


@pytest.mark.parametrize(
    "text",
    [
        f"a.png,cat\nb.png,dog\nc d.png,{SHARK}\ne.png,7\nf.png,cat\n",
        f"\ufefffile,label\na.png,cat\nb.png,dog\nc d.png,{SHARK}\ne.png,7\ndeep/f.png,cat\n",
        f"Label, Filename\r\ncat, a.png\r\ndog, ./b.png\r\n{SHARK}, c d.png\r\n7, e.png\r\n\r\ncat, deep\\f.png\r\n",
        "id;width;class\na;1;cat\nb;2;dog\nc d;3;great, white shark\ne;4;7\nf;5;cat\n",
        "a.png\tcat\nb.png\tdog\nc d.png\tgreat, white shark\ne.png\t7\n/somewhere/else/f.png\tcat\n",
        f'"a.png","cat"\n"b.png","dog"\n"c d.png",{SHARK}\n"e.png","7"\n"f.png","cat"\na.png,cat\n',
    ],
    ids=["plain", "byte order mark and header", "columns the other way", "semicolons, stems, more columns", "tabs", "quotes"],
)
def test_a_table_in_any_usual_form_gives_the_labels(flat: Path, text: str) -> None:
    (flat / "labels.csv").write_text(text, "utf-8", newline="")
    notes: list[str] = []
    assert labels(flat, notes=notes) == WANTED
    assert not notes


@pytest.mark.parametrize(
    "content",
    [
        dict(ROWS),
        [{"file_name": name, "label": label} for name, label in ROWS],
        {"labels": [list(row) for row in ROWS]},
        {"cat": ["a.png", "deep/f.png"], "dog": ["b.png"], "great, white shark": ["c d.png"], "7": ["e.png"]},
        {**dict(ROWS), "e.png": 7},
    ],
    ids=["object", "list of objects", "pairs below a key", "files by label", "numbers"],
)
def test_json_in_any_usual_form_gives_the_labels(flat: Path, tmp_path: Path, content: object) -> None:
    (tmp_path / "truth.json").write_text(json.dumps(content))
    assert labels(flat, tmp_path / "truth.json") == WANTED


def test_an_object_a_line_gives_the_labels(flat: Path) -> None:
    (flat / "labels.jsonl").write_text("".join(json.dumps({"image": n, "class": c}) + "\n" for n, c in ROWS))
    assert labels(flat) == WANTED


def test_labels_alone_are_in_the_order_of_names(flat: Path) -> None:
    (flat / "labels.txt").write_text("\n".join("vwxyz") + "\n")
    assert [file.label for file in list_images(flat)] == [None] * 3 + ["deep", None]
    assert labels(flat) == {"a.png": "v", "b.png": "w", "c d.png": "x", "f.png": "y", "e.png": "z"}
    (flat / "labels.txt").write_text("v\nw\n")
    with pytest.raises(VitEdgeError, match="2 labels and names no files, and there are 5 images"):
        labels(flat)


def test_rows_and_images_without_the_other_are_told(flat: Path) -> None:
    (flat / "labels.csv").write_text("a.png,cat\nzzz.png,dog\ne.png,\n")
    notes: list[str] = []
    assert labels(flat, notes=notes) == {"a.png": "cat", "b.png": None, "c d.png": None, "e.png": None, "f.png": None}
    assert len(notes) == 2
    assert "1 rows of" in notes[0] and "zzz.png" in notes[0]
    assert "no label for 4 of 5 images" in notes[1]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("a.png,cat\na.png,dog\n", "gives a.png two labels: 'cat' and 'dog'"),
        ("x.png,cat\ny.png,dog\n", "no row of .* names an image"),
        ("", "is empty"),
        ("file,label\n", "is empty"),
        ("a.png,1,2\nb.png,3,4\n", "which column .* holds the labels is not clear"),
        ("a.png,cat\nb.png\n", "line 2 of .* has 1 cells"),
        ('a.png,"cat\n', "is not CSV"),
    ],
)
def test_a_table_that_cannot_be_right_is_one_sentence(flat: Path, text: str, match: str) -> None:
    (flat / "labels.csv").write_text(text)
    with pytest.raises(VitEdgeError, match=match):
        labels(flat)


@pytest.mark.parametrize("content", ["{", "3", '{"a.png": {"x": 1}}', '{"a.png": 0.5}', '[{"label": "x"}]', "[" * 100_000])
def test_json_that_cannot_be_right_is_one_sentence(flat: Path, content: str) -> None:
    (flat / "labels.json").write_text(content)
    with pytest.raises(VitEdgeError) as caught:
        labels(flat)
    assert "\n" not in str(caught.value)


def test_other_encodings_missing_tables_and_two_tables_are_refused(flat: Path, tmp_path: Path) -> None:
    (flat / "labels.csv").write_bytes(b"a.png,caf\xe9\n")
    with pytest.raises(VitEdgeError, match="not text in UTF-8"):
        labels(flat)
    with pytest.raises(VitEdgeError, match="cannot read"):
        labels(flat, tmp_path / "none.csv")
    (flat / "labels.json").write_text("{}")
    with pytest.raises(VitEdgeError, match=r"holds labels\.csv and labels\.json"):
        labels(flat)


def test_a_name_that_two_images_share_must_be_a_path(flat: Path) -> None:
    save(flat / "other" / "f.png")
    (flat / "labels.csv").write_text("f.png,cat\n")
    with pytest.raises(VitEdgeError, match=r"several images are called f\.png"):
        labels(flat)
    (flat / "labels.csv").write_text("deep/f.png,cat\nother/f.png,dog\n")
    assert [file.label for file in list_dataset(flat) if file.path.name == "f.png"] == ["cat", "dog"]


def test_folders_without_images_are_told(tmp_path: Path) -> None:
    save(tmp_path / "cat" / "1.png")
    (tmp_path / "dog").mkdir()
    (tmp_path / "eel" / "deeper").mkdir(parents=True)
    notes: list[str] = []
    assert [file.label for file in list_dataset(tmp_path, notes=notes)] == ["cat"]
    assert len(notes) == 1 and "2 of 3 folders" in notes[0] and "dog, eel" in notes[0]


def test_one_image_is_a_data_set(tmp_path: Path) -> None:
    save(tmp_path / "1.png")
    (file,) = list_dataset(tmp_path / "1.png")
    assert file.label is None


# ImageNet

WNIDS = tuple(imagenet_names())


def card(names: tuple[str, ...]) -> ModelCard:
    return ModelCard("vit", "classify", Preprocess((2, 2), (0.0,) * 3, (1.0,) * 3), labels=names)


def test_the_table_is_imagenets() -> None:
    assert len(WNIDS) == 1000 and list(WNIDS) == sorted(WNIDS)
    assert (WNIDS[0], WNIDS[207], WNIDS[999]) == ("n01440764", "n02099601", "n15075141")
    assert imagenet_names()["n02099601"] == ("golden retriever",)


@pytest.mark.parametrize(
    "names",
    [
        tuple(", ".join(names) for names in imagenet_names().values()),  # as Hugging Face has them
        tuple(names[0] for names in imagenet_names().values()),  # as torchvision has them
        tuple(f"LABEL_{i}" for i in range(1000)),
        WNIDS,
    ],
    ids=["all names", "first names", "no names", "wnids"],
)
def test_wnids_match_any_imagenet_model(names: tuple[str, ...]) -> None:
    assert match_labels(WNIDS, card(names)) == {wnid: index for index, wnid in enumerate(WNIDS)}


def test_wnids_match_a_model_of_some_of_the_classes_by_name() -> None:
    names = ("Golden Retriever", "tench", "car")
    assert match_labels(("n01440764", "n02099601", "n01443537"), card(names)) == {"n01440764": 1, "n02099601": 0}
    with pytest.raises(VitEdgeError):
        match_labels(("n01443537",), card(names))


def test_any_name_of_a_label_will_do_and_an_exact_one_goes_before() -> None:
    names = ("tench, Tinca tinca", "goldfish, Carassius auratus", "Tinca tinca")
    assert match_labels(("tinca_tinca", "Tench", "carassius auratus"), card(names)) == {
        "tinca_tinca": 2,
        "Tench": 0,
        "carassius auratus": 1,
    }


def test_the_flat_validation_set_takes_each_of_its_tables(tmp_path: Path) -> None:
    for number in range(1, 4):
        save(tmp_path / "val" / f"ILSVRC2012_val_{number:08}.png")
    tables = {
        "val.txt": "".join(f"ILSVRC2012_val_{n:08}.JPEG {n * 10}\n" for n in range(1, 4)),
        "LOC_val_solution.csv": "ImageId,PredictionString\nILSVRC2012_val_00000002,n03995372 85 1 499 272 \n"
        "ILSVRC2012_val_00000001,n01440764 1 2 3 4 n01440764 5 6 7 8 \nILSVRC2012_val_00000003,n02099601 1 2 3 4 \n",
        "synsets.txt": "n01440764\nn03995372\nn02099601\n",
    }
    for name, text in tables.items():
        (tmp_path / name).write_text(text)
    named = ["n01440764", "n03995372", "n02099601"]
    assert [file.label for file in list_dataset(tmp_path / "val", tmp_path / "val.txt")] == ["10", "20", "30"]
    assert [file.label for file in list_dataset(tmp_path / "val", tmp_path / "LOC_val_solution.csv")] == named
    assert [file.label for file in list_dataset(tmp_path / "val", tmp_path / "synsets.txt")] == named
    (tmp_path / "ILSVRC2012_validation_ground_truth.txt").write_text("490\n361\n171\n")
    with pytest.raises(VitEdgeError, match="development kit"):
        list_dataset(tmp_path / "val", tmp_path / "ILSVRC2012_validation_ground_truth.txt")


def test_wnids_at_the_end_of_names_are_labels(tmp_path: Path) -> None:
    save(tmp_path / "ILSVRC2012_val_00000293_n01440764.png")
    save(tmp_path / "ILSVRC2012_val_00000294_n02099601.png")
    assert [file.label for file in list_dataset(tmp_path)] == ["n01440764", "n02099601"]
