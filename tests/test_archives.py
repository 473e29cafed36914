"""Pictures in tar and parquet files: read one by one, labelled, and what damaged or hostile archives come to."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vitedge import archives
from vitedge.archives import list_parquet
from vitedge.compiler.activations import images_sha256
from vitedge.datasets import list_dataset
from vitedge.errors import ImageError, VitEdgeError
from vitedge.images import ImageFile, decode, images_key, read_bytes, sample, stream


def png(value: int) -> bytes:
    content = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), value, np.uint8)).save(content, "PNG")
    return content.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def write_parquet(path: Path, columns: dict[str, object], features: dict[str, object] | None = None, rows: int = 7) -> Path:
    table = pa.table(columns)
    if features:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=rows)
    return path


def structs(values: list[int], named: bool = True) -> object:
    return [{"bytes": png(value), "path": f"{value:03}.png" if named else None} for value in values]


def value_of(file: ImageFile) -> int:
    return int(decode(file)[0, 0, 0])


HF = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["cat", "dog"]}}


# tar


def test_a_webdataset_has_its_labels_beside_the_pictures(tmp_path: Path) -> None:
    members = {"a/1.png": png(1), "a/1.cls": b"3\n", "a/2.png": png(2), "a/2.json": b'{"label": "dog"}', "a/3.cls": b"7"}
    files = list_dataset(write_tar(tmp_path / "shard.tar", {**members, "a/3.png": png(3), "a/3.seg.png": png(9)}))
    assert [(file.member, file.label, value_of(file)) for file in files] == [
        ("a/1.png", "3", 1),
        ("a/2.png", "dog", 2),
        ("a/3.png", "7", 3),  # and not the mask beside it
    ]


def test_a_tar_of_folders_by_class_has_them_as_labels_whatever_lies_above(tmp_path: Path) -> None:
    files = list_dataset(
        write_tar(tmp_path / "x.tar", {"./val/cat/a.b.png": png(1), "./val/cat/a.c.png": png(2), "./val/dog/x.png": png(3)})
    )
    assert [(file.label, value_of(file)) for file in files] == [("cat", 1), ("cat", 2), ("dog", 3)]
    (only,) = list_dataset(write_tar(tmp_path / "one.tar", {"cat/1.png": png(1)}))
    assert only.label == "cat"


def test_names_in_a_tar_that_lead_elsewhere_do_no_harm(tmp_path: Path) -> None:
    files = list_dataset(write_tar(tmp_path / "x.tar", {"../../etc/1.png": png(1), "/root/2.png": png(2), ".hidden.png": png(3)}))
    assert [value_of(file) for file in files] == [1, 2]
    assert all(".." not in (file.label or "") for file in files)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.tar"]


def test_links_in_a_tar_are_no_pictures(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", {"1.png": png(1)})
    with tarfile.open(path, "a") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            info = tarfile.TarInfo("link.png")
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    assert [file.member for file in list_dataset(path)] == ["1.png"]


@pytest.mark.parametrize("kept", [300, 512 + 100, -700])
def test_a_tar_that_is_cut_short_is_one_sentence(tmp_path: Path, kept: int) -> None:
    path = write_tar(tmp_path / "x.tar", {f"{i}.png": bytes(2000) for i in range(20)})
    path.write_bytes(path.read_bytes()[: 20 * 2560][:kept])
    with pytest.raises(VitEdgeError, match=r"x\.tar cannot be read as a tar file") as caught:
        list_dataset(path)
    assert "again" in str(caught.value.hint)


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", {f"{i}.png": png(i) for i in range(3)})
    content = bytearray(path.read_bytes())
    content[1024] ^= 1  # the name of the second
    path.write_bytes(content)
    with pytest.raises(VitEdgeError, match="the header at byte 1024 is damaged"):
        list_dataset(path)


def test_a_compressed_tar_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "x.tar.gz").write_bytes(b"")
    with pytest.raises(VitEdgeError, match="compressed"):
        list_dataset(tmp_path / "x.tar.gz")


def test_bytes_that_are_no_tar_never_crash(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    whole = write_tar(tmp_path / "x.tar", {f"c/{i}.png": png(i) for i in range(5)}).read_bytes()
    for trial in range(60):
        content = bytearray(whole)
        for at in random.integers(0, 5 * 1024, 3):
            content[at] = random.integers(256)
        path = tmp_path / f"{trial}.tar"
        path.write_bytes(content)
        try:
            list(stream(list_dataset(path), []))
        except VitEdgeError as error:
            assert "\n" not in str(error)


def test_a_picture_too_large_to_be_one_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MAX_BYTES", 1000)
    files = list_dataset(write_tar(tmp_path / "x.tar", {"1.png": bytes(1001), "2.png": png(2)}))
    skipped = list[str]()
    assert [file.member for file, _ in stream(files, skipped)] == ["2.png"]
    assert "1001 bytes" in skipped[0] and "1.png" in skipped[0]


def test_shards_are_taken_by_folder_or_by_pattern(tmp_path: Path) -> None:
    for shard in range(12):
        write_tar(tmp_path / f"val-{shard:03}.tar", {f"{shard}.png": png(shard)})
    assert [value_of(file) for file in list_dataset(tmp_path)] == list(range(12))
    assert [value_of(file) for file in list_dataset(tmp_path / "val-{003..011}.tar")] == list(range(3, 12))
    with pytest.raises(VitEdgeError, match=r"1 of 13 shards .* missing: val-012\.tar"):
        list_dataset(tmp_path / "val-{000..012}.tar")


# parquet


def test_hugging_faces_layout_is_read_with_its_names(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", {"image": structs([5, 6, 7]), "label": [1, 0, -1]}, HF)
    files = list_dataset(path)
    assert [(file.member, file.label, value_of(file)) for file in files] == [
        ("005.png", "dog", 5),
        ("006.png", "cat", 6),
        ("007.png", None, 7),
    ]


def test_plain_columns_are_known_by_name_and_type(tmp_path: Path) -> None:
    columns = {"id": [1, 2], "jpg": [png(1), png(2)], "cls": ["a", None], "score": [0.5, 0.7]}
    files = list_dataset(write_parquet(tmp_path / "x.parquet", columns))
    assert [(file.member, file.label, value_of(file)) for file in files] == [("row 0", "a", 1), ("row 1", None, 2)]


def test_one_of_several_columns_of_labels_is_named(tmp_path: Path) -> None:
    kinds = {"fine": {"_type": "ClassLabel", "names": ["f0", "f1"]}, "coarse": {"_type": "ClassLabel", "names": ["c0", "c1"]}}
    path = write_parquet(
        tmp_path / "x.parquet", {"image": structs([1, 2]), "fine": [0, 1], "coarse": [1, 0]}, {"image": HF["image"], **kinds}
    )
    with pytest.raises(VitEdgeError, match="several columns of labels: fine, coarse") as caught:
        list_dataset(path)
    assert caught.value.hint == "name one of them: --labels fine"
    assert [file.label for file in list_dataset(path, Path("coarse"))] == ["c1", "c0"]
    with pytest.raises(VitEdgeError, match="no column age"):
        list_dataset(path, Path("age"))


def test_rows_are_found_in_any_order(tmp_path: Path) -> None:
    files = list_dataset(
        write_parquet(tmp_path / "x.parquet", {"image": structs(list(range(200)), named=False), "label": [0] * 200}, rows=70)
    )
    order = np.random.default_rng(0).permutation(200).tolist()
    assert [value_of(files[i]) for i in order] == order
    assert [int(image[0, 0, 0]) for _, image in stream(files, [])] == list(range(200))


def test_rows_in_order_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "x.parquet", {"image": structs(list(range(200)))}, rows=100)
    files, batches = list_dataset(path), list[int]()
    advance = archives._Parquet._advance
    monkeypatch.setattr(archives._Parquet, "_advance", lambda self: (batches.append(self._next), advance(self)))
    assert len(list(stream(files, []))) == 200
    assert len(batches) <= 10  # of 32 rows; threads may change places at most


def test_what_is_no_picture_in_a_row_is_skipped(tmp_path: Path) -> None:
    rows = [
        {"bytes": png(1), "path": None},
        {"bytes": None, "path": "/etc/passwd"},
        None,
        {"bytes": b"no picture", "path": "x.png"},
    ]
    files, skipped = list_dataset(write_parquet(tmp_path / "x.parquet", {"image": rows})), list[str]()
    assert len(list(stream(files, skipped))) == 1
    assert len(skipped) == 3 and all("x.parquet" in sentence for sentence in skipped)


@pytest.mark.parametrize("kept", [0, 100, -20])
def test_a_parquet_file_that_is_cut_short_is_one_sentence(tmp_path: Path, kept: int) -> None:
    path = write_parquet(tmp_path / "x.parquet", {"image": structs([1, 2, 3])})
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(VitEdgeError, match=r"x\.parquet cannot be read as a parquet file"):
        list_dataset(path)


def test_damage_within_a_parquet_file_is_a_skipped_picture(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", {"image": structs(list(range(40)))}, rows=4)
    files = list_dataset(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 4 : len(content) // 4 + 300] = bytes(300)
    path.write_bytes(content)
    skipped = list[str]()
    read = list(stream(files, skipped))
    assert len(read) + len(skipped) == 40 and skipped and read


def test_no_column_of_pictures_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(VitEdgeError, match=r"which column .* holds the pictures is not clear: text \(string\)"):
        list_parquet(write_parquet(tmp_path / "x.parquet", {"text": ["a"], "label": [1]}))


# both


def test_hashes_are_of_members_and_not_of_archives(tmp_path: Path) -> None:
    one = list_dataset(write_tar(tmp_path / "a.tar", {"cat/1.png": png(1), "cat/2.png": png(2)}))
    (tmp_path / "plain" / "cat").mkdir(parents=True)
    for i in (1, 2):
        (tmp_path / "plain" / "cat" / f"{i}.png").write_bytes(png(i))
    assert images_sha256(one) == images_sha256(list_dataset(tmp_path / "plain"))
    assert images_sha256(one[:1]) != images_sha256(one[1:])
    assert [read_bytes(file) for file in one] == [png(1), png(2)]
    other = list_dataset(write_tar(tmp_path / "b.tar", {"cat/1.png": png(1), "cat/2.png": png(3)}))
    assert images_key(one) != images_key(other) and images_key([]) == ""


def test_a_sample_of_an_archive_does_not_depend_on_order(tmp_path: Path) -> None:
    files = list_dataset(write_tar(tmp_path / "a.tar", {f"{c}/{i}.png": png(i) for c in "ab" for i in range(9)}))
    assert sample(files, 6, 0) == sample(files[::-1], 6, 0)
    assert sorted(str(file.label) for file in sample(files, 6, 0)) == ["a"] * 3 + ["b"] * 3


def test_a_member_that_is_gone_is_an_image_error(tmp_path: Path) -> None:
    (file,) = list_dataset(write_tar(tmp_path / "a.tar", {"1.png": png(1)}))
    file.path.write_bytes(file.path.read_bytes()[:520])
    with pytest.raises(ImageError, match=r"a\.tar: 1\.png"):
        decode(file)
