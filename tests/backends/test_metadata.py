"""The metadata of an ONNX file is read as the onnx package reads it, and damaged files are one sentence."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.engines import ROOT, Made
from vitedge.backends.build import read_source
from vitedge.backends.metadata import count_operators, count_quantized_products, has_external_data, read_metadata
from vitedge.errors import ModelError

onnx = pytest.importorskip("onnx")

DOCTOR = ROOT / "vitedge" / "doctor.onnx"


def expected(path: Path) -> dict[str, str]:
    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


def write_model(path: Path, properties: dict[str, str], weights: int = 10, version: int = 10) -> None:
    """A model with every kind of field that ModelProto has, and `weights` floats."""
    helper = onnx.helper
    value = helper.make_tensor("w", onnx.TensorProto.FLOAT, [weights], bytes(4 * weights), raw=True)
    output = helper.make_tensor_value_info("w", onnx.TensorProto.FLOAT, [weights])
    function = helper.make_function(
        "here", "f", ["a"], ["b"], [helper.make_node("Neg", ["a"], ["b"])], [helper.make_opsetid("", 20)]
    )
    graph = helper.make_graph([], "graph", [], [output], [value])
    model = helper.make_model(graph, producer_name="x" * 300, functions=[function], opset_imports=[helper.make_opsetid("", 20)])
    model.ir_version, model.model_version, model.doc_string, model.domain = version, -1, "Grüße", "here"
    helper.set_model_props(model, properties)
    path.write_bytes(model.SerializeToString())


def test_the_packaged_model_and_exported_ones_are_read_as_onnx_reads_them(made: Made) -> None:
    for path in (DOCTOR, *made.graphs.values()):
        assert read_metadata(path) == expected(path)
        assert read_metadata(path)["vitedge.variant"] in ("fp32", "int8")


@pytest.mark.parametrize(
    "properties",
    [{}, {"a": "b"}, {"empty": ""}, {"": "no key"}, {"Grüße 熊": "x" * 70_000}, {str(i): str(i) * i for i in range(300)}],
    ids=["none", "one", "empty value", "empty key", "long", "many"],
)
def test_any_metadata_are_read_as_onnx_reads_them(tmp_path: Path, properties: dict[str, str]) -> None:
    write_model(tmp_path / "m.onnx", properties, weights=200_000)
    assert read_metadata(tmp_path / "m.onnx") == expected(tmp_path / "m.onnx") == properties


def test_a_file_cut_short_anywhere_is_refused_or_lacks_metadata(tmp_path: Path) -> None:
    """A cut between two fields leaves a valid protobuf message, so there the card is simply missing."""
    write_model(tmp_path / "m.onnx", {"vitedge.card": "{}", "vitedge.variant": "fp32"})
    data = (tmp_path / "m.onnx").read_bytes()
    full = read_metadata(tmp_path / "m.onnx")
    refused = 0
    for length in range(len(data)):
        (tmp_path / "cut.onnx").write_bytes(data[:length])
        try:
            assert read_metadata(tmp_path / "cut.onnx") != full or data[length:].startswith(b"\xca\x01")  # the functions
        except ModelError as error:
            refused += 1
            assert "cut.onnx is not a readable ONNX model" in str(error) and error.hint
    assert refused > 0.9 * len(data)


@pytest.mark.parametrize("content", [b"\xff" * 100, b"\x73\x00", b"\x72\x05", b"\x72\x02\x12\x00", b"\x72\x04\x0a\x02\xff\xfe"])
def test_bytes_that_are_no_onnx_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(ModelError, match=r"m\.onnx is not a readable ONNX model"):
        read_metadata(tmp_path / "m.onnx")


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        read_metadata(tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="is a folder, and no ONNX file"):
        read_metadata(tmp_path)


def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ModelError, match=r"^cannot read .*m\.onnx: Permission denied$"):
        read_metadata(tmp_path / "m.onnx")


def test_a_large_file_is_not_loaded(tmp_path: Path) -> None:
    """A sparse file with 4 GiB of weights in front of its metadata."""
    size = 4 << 30
    head = b"\x3a" + bytes(byte | 0x80 for byte in (size & 0x7F, size >> 7 & 0x7F, size >> 14 & 0x7F, size >> 21 & 0x7F))
    with (tmp_path / "m.onnx").open("wb") as file:
        file.write(head + bytes([size >> 28]))
        file.seek(size, 1)
        file.write(b"\x72\x06\x0a\x01k\x12\x01v")
    assert read_metadata(tmp_path / "m.onnx") == {"k": "v"}


def test_operators_are_counted_as_onnx_counts_them(made: Made) -> None:
    for path in (DOCTOR, *made.graphs.values()):
        assert count_operators(path) == Counter(node.op_type for node in onnx.load(path).graph.node)


def test_quantized_products_are_counted_as_the_compiler_counts_them(made: Made) -> None:
    from vitedge.compiler.work import count_work

    for path in (DOCTOR, *made.graphs.values()):
        found = sum(layer.type == "int8" for layer in count_work(onnx.load(path)))
        assert count_quantized_products(path) == (found, found)
    assert count_quantized_products(made.graphs["fp32"]) == (0, 0) and 0 < found == read_source(made.graphs["int8"]).int8_products


def test_weights_in_other_files_are_noticed(made: Made, tmp_path: Path) -> None:
    path = tmp_path / "split.onnx"
    onnx.save(onnx.load(made.graphs["int8"]), path, save_as_external_data=True, location="weights.bin")
    assert has_external_data(path) and not any(map(has_external_data, made.graphs.values()))
    with pytest.raises(ModelError, match="has weights in other files") as caught:
        read_source(path)
    command = str(caught.value.hint).partition(": ")[2]
    subprocess.run(["sh", "-c", command.replace("python", sys.executable, 1)], check=True)
    assert read_source(path).variant == "int8"


def test_a_graph_without_nodes_has_no_operators(tmp_path: Path) -> None:
    write_model(tmp_path / "m.onnx", {}, weights=200_000)
    assert count_operators(tmp_path / "m.onnx") == Counter()
