"""The doctor's model is what doctor.py says it is, and it runs on every backend installed here."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from vitedge.compiler.graph import set_metadata
from vitedge.doctor import MODEL, examine
from vitedge.specs import ModelCard, Preprocess, TensorSpec


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


def test_packaged_model_is_the_documented_one() -> None:
    assert MODEL.read_bytes() == doctor_model()


def test_every_installed_backend_passes() -> None:
    findings = {finding.backend: finding for finding in examine()}
    assert findings["openvino"].passed is True, findings["openvino"]
    assert findings["onnxruntime"].passed is True, findings["onnxruntime"]


if __name__ == "__main__":
    MODEL.write_bytes(doctor_model())
