"""The doctor's model is what doctor.py says it is, and it runs on every backend installed here."""

import importlib.util
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from vitedge import doctor
from vitedge.backends import load_backend
from vitedge.backends.cuda import find_gpu
from vitedge.backends.tensorrt import TensorRT
from vitedge.compiler.graph import set_metadata
from vitedge.doctor import MODEL, Finding, examine
from vitedge.errors import EngineError, MissingPackageError
from vitedge.specs import ModelCard, Preprocess, TensorSpec
from vitedge.workspace import sha256

RUN_HERE = ("openvino", "onnxruntime")


def doctor_model() -> bytes:
    """The bytes of vitedge/doctor.onnx; `python -m tests.test_doctor` writes the file."""
    constants = {
        "patches.scale": np.float32(2.0**-7),
        "patches.zero_point": np.int8(0),
        "weight.int8": np.arange(16, dtype=np.int8).reshape(4, 4),
        "weight.scale": np.ones(4, np.float32),
        "weight.zero": np.zeros(4, np.int8),
    }
    nodes = [
        helper.make_node("DequantizeLinear", ["patches", "patches.scale", "patches.zero_point"], ["patches.float"]),
        helper.make_node("DequantizeLinear", ["weight.int8", "weight.scale", "weight.zero"], ["weight"], axis=1),
        helper.make_node("MatMul", ["patches.float", "weight"], ["scores"]),
    ]
    inputs = [helper.make_tensor_value_info("patches", TensorProto.INT8, ["batch", 4, 4])]
    outputs = [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", 4, 4])]
    initializers = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "doctor", inputs, outputs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9, producer_name="vitedge")
    preprocess = Preprocess(size=(4, 4), mean=(0.5,), std=(0.5,), channels=1)
    specs = (TensorSpec("patches", (None, 4, 4), "int8"),), (TensorSpec("scores", (None, 4, 4), "float32"),)
    set_metadata(model, card=ModelCard("doctor", "dense", preprocess, patch=2, inputs=specs[0], outputs=specs[1]), variant="fp32")
    onnx.checker.check_model(model)
    return model.SerializeToString(deterministic=True)


def installed() -> list[Finding]:
    """The findings on all backends but those that are not installed."""
    return [finding for finding in examine() if finding.passed is not None]


def test_packaged_model_is_the_documented_one() -> None:
    assert MODEL.read_bytes() == doctor_model()
    assert sha256(MODEL) == doctor.SHA256


def test_every_installed_backend_passes() -> None:
    findings = {finding.backend: finding for finding in examine()}
    assert findings["openvino"].passed is True, findings["openvino"]
    assert findings["onnxruntime"].passed is True, findings["onnxruntime"]


@pytest.mark.skipif(find_gpu() is not None, reason="there is a GPU here")
def test_a_gpu_backend_without_a_gpu_is_no_failure() -> None:
    findings = {finding.backend: finding for finding in examine()}
    assert findings["tensorrt"].passed is None and findings["tensorrt"].hint
    if importlib.util.find_spec("tensorrt_rtx_bindings"):
        assert findings["tensorrt-rtx"].passed is True and "no NVIDIA GPU" in findings["tensorrt-rtx"].text


def test_tensorrt_without_pycuda_says_that_and_not_that_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def lack() -> None:
        raise MissingPackageError("pycuda", "gpu")

    monkeypatch.setattr(TensorRT, "version", lambda self: "10.3.0")
    monkeypatch.setattr(doctor, "find_gpu", lambda: None)
    monkeypatch.setattr(doctor, "require_gpu", lack)
    finding = next(finding for finding in examine() if finding.backend == "tensorrt")
    assert (finding.passed, finding.text) == (None, "10.3.0, but the package 'pycuda' is not installed")
    assert str(finding.hint).startswith("pip install pycuda; ")


@pytest.mark.parametrize("damage", ["missing", "cut short", "one byte"])
def test_a_damaged_model_is_a_finding_that_blames_no_backend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    data = bytearray(MODEL.read_bytes())
    data[len(data) // 2] ^= 0x80
    if damage != "missing":
        (tmp_path / "doctor.onnx").write_bytes(data[:-100] if damage == "cut short" else data)
    monkeypatch.setattr(doctor, "MODEL", tmp_path / "doctor.onnx")
    for finding in installed():
        assert finding.passed is False and finding.text == f"{tmp_path / 'doctor.onnx'} is missing or damaged"
        assert finding.hint == "install vitedge again"


@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
def test_what_fails_without_advice_is_to_be_installed_again_under_its_own_package(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def fail() -> str:
        raise EngineError("libtbb.so.12 is missing")

    monkeypatch.setattr(load_backend(name), "version", fail)
    monkeypatch.setattr(load_backend(name), "PACKAGE", "the-package")
    finding = next(finding for finding in examine() if finding.backend == name)
    assert (finding.passed, finding.text) == (False, "libtbb.so.12 is missing")
    assert finding.hint == "pip install --force-reinstall the-package"


def test_wrong_numbers_are_a_finding_whatever_their_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    for scores in (doctor.SCORES + 1, doctor.SCORES[:, :3, :3]):
        monkeypatch.setattr(doctor, "SCORES", scores)
        assert [finding.passed for finding in installed() if finding.backend in RUN_HERE] == [False, False]


if __name__ == "__main__":
    MODEL.write_bytes(doctor_model())
