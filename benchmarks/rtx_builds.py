"""Nine Vision Transformers in, their TensorRT-RTX engines for three generations of GPUs out, and what each build cost.

    model  ->  fp32.onnx, fp16.onnx, int8.onnx (floats in FP16)  ->  rtx_child.py, once a type and capability
                                                                 ->  results/rtx_builds.json

    pip install -e '.[compile,cpu,camera,hf,rtx]'
    python -m benchmarks.rtx_builds [--only 'deit*' focus-vits14] [--output FILE]

With --only, what the file says of other models stays. No GPU is needed and none is used: nothing is run, so this says nothing
of speed or accuracy. Two models are trained and quantized by the recipe int8; the others have the sizes of real ones and random
weights, and are quantized by int8-fast on the images of examples/focus. On a busy machine `seconds` say little, `cpu_seconds`,
of all threads, more. What cannot be done is a row with its error. Knows nothing of Markdown: that is readme.py.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import onnx
from torch import nn

from benchmarks.cpu_latency import FOCUS, ROOT, err
from benchmarks.subjects import FASHION
from tests.compiler.families import EVA02, save_random
from vitedge.bench.environment import environment
from vitedge.compiler.calibrate import calibrate
from vitedge.compiler.export import export
from vitedge.compiler.models import load_model
from vitedge.compiler.precision import convert
from vitedge.compiler.quantize import leave_float, quantize
from vitedge.errors import VitEdgeError
from vitedge.images import ImageFile, list_images
from vitedge.specs import Recipe, Target
from vitedge.workspace import BUILTIN_RECIPES, read_json, write_json

CAPABILITIES = ("8.6", "8.9", "12.0")
TYPES = ("fp32", "fp16", "int8")
TIMEOUT_S = 600
FLOAT16 = Recipe(name="fp16", method="none", float_type="fp16")
WIDE192 = {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "intermediate_size": 768}
WIDE384 = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536}
SPREAD = 0.02  # of the noise on all weights, as transformers starts them itself


@dataclass(frozen=True, slots=True)
class Model:
    """What is built. source: gives the name for load_model, and may write the model into the folder that it is given first."""

    source: Callable[[Path], str]
    checkpoint: Path | None = None
    images: Path = FOCUS / ".cache" / "calibration"
    recipe: str = "int8-fast"


@dataclass(frozen=True, slots=True)
class Graph:
    """One type of a model. kept: nodes of an FP16 graph that stay in FP32."""

    path: Path
    kept: int
    weights_mib: float


def main() -> None:
    """Build all that is asked for and write what it cost as JSON."""
    arguments = parse()
    chosen = [name for name in MODELS if any(fnmatch(name, pattern) for pattern in arguments.only)]
    if not chosen:
        raise VitEdgeError(f"no model is called {' or '.join(arguments.only)}", hint=f"there are {', '.join(MODELS)}")
    facts = {**environment(), "command": shlex.join(["python", "-m", "benchmarks.rtx_builds", *sys.argv[1:]])}
    rows = earlier_rows(arguments.output, chosen)
    for name in chosen:
        rows += model_rows(name, CAPABILITIES)
        rows.sort(key=lambda row: list(MODELS).index(row["model"]))
        write_json(arguments.output, {"environment": facts, "batch": Target().batch, "rows": rows})
    err.print(f"{arguments.output}: written")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser("python -m benchmarks.rtx_builds", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--only", nargs="+", metavar="NAME", default=["*"], help="models by name or shell pattern")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "rtx_builds.json")
    return parser.parse_args()


def earlier_rows(path: Path, chosen: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of an earlier run about other models than those chosen now."""
    return [row for row in read_json(path)["rows"] if row["model"] not in chosen] if path.is_file() else []


def model_rows(name: str, capabilities: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """A row for every type and capability of a model, as they are done."""
    weights = "trained" if MODELS[name].checkpoint else "random"
    with tempfile.TemporaryDirectory() as folder:
        for kind, graph in typed_graphs(name, Path(folder)):
            facts: dict[str, Any] = {"model": name, "weights": weights, "type": kind}
            if isinstance(graph, str):
                yield told({**facts, "error": graph})
                continue
            facts |= {"weights_mib": rounded(graph.weights_mib), "kept_in_fp32": graph.kept}
            for capability in capabilities:
                yield told({**facts, "capability": capability, **build_alone(graph.path, capability)})


def typed_graphs(name: str, folder: Path) -> Iterator[tuple[str, Graph | str]]:
    """The model's graph in each of TYPES, or why there is none."""
    model, float_path = MODELS[name], folder / "fp32.onnx"
    try:
        files = calibration_images(model.images)
        module, card = load_model(model.source(folder / name), model.checkpoint)
        export(module, card, float_path)
    except VitEdgeError as error:
        yield from ((kind, f"export: {error}") for kind in TYPES)
        return
    yield "fp32", Graph(float_path, 0, weights_mib(float_path))
    yield "fp16", in_half(float_path, "fp16", FLOAT16, files)
    yield "int8", in_half(float_path, "int8", BUILTIN_RECIPES[model.recipe], files)


def calibration_images(folder: Path) -> list[ImageFile]:
    """The images of an example, which its own script fetches where they are missing."""
    if not folder.exists():
        script = FASHION / "dataset.py" if folder.is_relative_to(FASHION) else FOCUS / "fetch.py"
        subprocess.run([sys.executable, str(script)], check=True, stdout=sys.stderr)
    return list_images(folder)


def in_half(float_path: Path, kind: str, recipe: Recipe, files: list[ImageFile]) -> Graph | str:
    """The graph under a recipe with its floats in FP16, or why there is none."""
    single, path = float_path.with_name(f"{kind}.single.onnx"), float_path.with_name(f"{kind}.onnx")
    try:
        if recipe.method == "none":
            leave_float(float_path, recipe, single)
        else:
            quantize(float_path, calibrate(float_path, files, recipe).table, single, files)
        kept = convert(single, "fp16", path, files)
    except VitEdgeError as error:
        return f"{kind}: {error}"
    return Graph(path, len(kept), weights_mib(path))


def weights_mib(path: Path) -> float:
    """What the constants of a graph take in the types that they have there, in MiB."""
    return sum(onnx.numpy_helper.to_array(tensor).nbytes for tensor in onnx.load(path).graph.initializer) / 2**20


def build_alone(path: Path, capability: str) -> dict[str, Any]:
    """What rtx_child.py says of one build, without timings of earlier ones; of one that fails its error."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.rtx_child", str(path), capability, folder]
        environ = {**os.environ, "XDG_CACHE_HOME": folder}
        try:
            done = subprocess.run(command, cwd=ROOT, env=environ, text=True, capture_output=True, timeout=TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired:
            return {"error": f"still building after {TIMEOUT_S} s"}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]}
    return {key: rounded(value) for key, value in json.loads(done.stdout.splitlines()[-1]).items()}


def told(row: dict[str, Any]) -> dict[str, Any]:
    """The row itself, once it has been shown."""
    err.print(", ".join(f"{key} {value}" for key, value in row.items()), soft_wrap=True)
    return row


def rounded(value: float) -> float:
    """Four significant digits: more than a second or a MiB here means."""
    return float(f"{value:.4g}")


def saved(make: Callable[[Any], nn.Module], size: int, folder: Path) -> str:
    """The name of a model of transformers with random weights, once it is in `folder`. size: of its images, in pixels."""
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": size, "width": size}}
    return f"hf:{save_random(make, folder, processor, SPREAD)}"


def deit(t: Any) -> nn.Module:
    """DeiT-Ti/16."""
    return t.DeiTForImageClassification(t.DeiTConfig(num_labels=1000, **WIDE192))


def dinov2(t: Any) -> nn.Module:
    """DINOv2-S/14 at 224 pixels."""
    sizes = {key: value for key, value in WIDE384.items() if key != "intermediate_size"}
    return t.Dinov2Model(t.Dinov2Config(image_size=224, patch_size=14, **sizes))


def beit(t: Any) -> nn.Module:
    """BEiT of DeiT-Ti's width; the smallest published one is twelve times as large."""
    return t.BeitForImageClassification(t.BeitConfig(num_labels=1000, use_relative_position_bias=True, **WIDE192))


def swin(t: Any) -> nn.Module:
    """Swin-T."""
    return t.SwinForImageClassification(t.SwinConfig(num_labels=1000))


def siglip(t: Any) -> nn.Module:
    """SigLIP of ViT-S's width; the smallest published one is four times as large."""
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 50}
    return t.SiglipModel(t.SiglipConfig(text_config=text, vision_config={"image_size": 224, "patch_size": 16, **WIDE384}))


def mobilevit(t: Any) -> nn.Module:
    """MobileViT-S."""
    return t.MobileViTForImageClassification(t.MobileViTConfig(num_labels=1000))


MODELS = {
    "fashion-vit": Model(
        lambda folder: f"{FASHION / 'model.py'}:vit", FASHION / "vit.safetensors", FASHION / ".cache" / "calibration", "int8"
    ),
    "focus-vits14": Model(lambda folder: f"{FOCUS / 'model.py'}:focus", FOCUS / ".cache" / "focus.safetensors", recipe="int8"),
    "deit-ti16": Model(partial(saved, deit, 224)),
    "dinov2-s14": Model(partial(saved, dinov2, 224)),
    "beit-192": Model(partial(saved, beit, 224)),
    "swin-t": Model(partial(saved, swin, 224)),
    "siglip-384": Model(partial(saved, siglip, 224)),
    "eva02-ti14": Model(lambda folder: f"{EVA02}:ti14"),
    "mobilevit-s": Model(partial(saved, mobilevit, 256)),
}


if __name__ == "__main__":
    try:
        main()
    except VitEdgeError as error:
        sys.exit(f"error: {error}\nhint: {error.hint}" if error.hint else f"error: {error}")
