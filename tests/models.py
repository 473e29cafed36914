"""Tiny models with random weights, tiny float graphs and folders of noise: what the tests of the compiler work on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from PIL import Image
from torch import Tensor, nn

from vitedge.specs import ModelCard, Preprocess, Recipe

SIZE, PATCH, WIDTH, DEPTH, HEADS, CLASSES = (32, 24), 8, 32, 2, 4, 5  # height and width differ: 4 rows of 3 patches
TOKENS = (SIZE[0] // PATCH) * (SIZE[1] // PATCH)
PLAIN = Recipe(name="plain", smoothing="none", rounding="nearest", bias_correction=False, min_images=4)  # ranges, no more


class Attention(nn.Module):
    """Multi-head self-attention with a Linear each for Q, K and V."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (linear(x).unflatten(2, (HEADS, -1)).transpose(1, 2) for linear in (self.q, self.k, self.v))
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """One pre-norm block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(WIDTH), Attention(), nn.LayerNorm(WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))


class TinyViT(nn.Module):
    """float32[B, 3, 32, 24] -> logits float32[B, 5]."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.positions = nn.Parameter(torch.randn(1, 1 + TOKENS, WIDTH))
        self.blocks = nn.Sequential(*(Block() for _ in range(DEPTH)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        return self.head(self.norm(self.blocks(x)[:, 0]))


def tiny_vit() -> tuple[TinyViT, ModelCard]:
    """The same TinyViT at every call, and its card; its norms differ from the identity."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = TinyViT().eval().requires_grad_(False)
        for norm in (m for m in module.modules() if isinstance(m, nn.LayerNorm)):
            norm.weight.uniform_(0.5, 2)
            norm.bias.normal_(0, 0.2)
    return module, ModelCard("tiny-vit", "classify", tiny_preprocess())


def tiny_preprocess() -> Preprocess:
    """A mean and deviation a channel that would show if two were swapped."""
    return Preprocess(SIZE, (0.2, 0.5, 0.7), (0.2, 0.25, 0.4), interpolation="bilinear")


def write_noise(folder: Path, count: int, size: tuple[int, int] = SIZE) -> Path:
    """`count` pictures of seeded noise of different brightness, in the sub-folders a and b."""
    random = np.random.default_rng(0)
    for index in range(count):
        path = folder / "ab"[index % 2] / f"{index:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        top = int(random.integers(64, 257))
        Image.fromarray(random.integers(0, top, (*size, 3), np.uint8)).save(path)
    return folder


def random_images(count: int, spec: Preprocess) -> NDArray[np.uint8]:
    """uint8[count, height, width, channels], black and white among them."""
    random = np.random.default_rng(1)
    images = random.integers(0, 256, (count, *spec.size, spec.channels), np.uint8)
    images[0, : spec.size[0] // 2] = 0
    images[-1, :, : spec.size[1] // 2] = 255
    return images


def engine_rows(images: NDArray[np.uint8], card: ModelCard) -> NDArray[Any]:
    """The images as rows of the engine's input, written out loop by loop from the contract in the design."""
    if card.patch is None:
        return images
    side, (height, width) = card.patch, card.preprocess.size
    rows = [
        [
            image[y : y + side, x : x + side].astype(np.int16).reshape(-1) - 128
            for y in range(0, height, side)
            for x in range(0, width, side)
        ]
        for image in images
    ]
    return np.array(rows).astype(np.int8)


def torch_input(images: NDArray[np.uint8], spec: Preprocess) -> Tensor:
    """The images as torch gets them: float32[B, C, H, W], normalised."""
    scaled = (images.astype(np.float64) / 255 - np.array(spec.mean)) / np.array(spec.std)
    return torch.from_numpy(scaled.transpose(0, 3, 1, 2).astype(np.float32))


def float_graph(
    nodes: Sequence[NodeProto], constants: Mapping[str, NDArray[Any]], shape: Sequence[int], outputs: Sequence[str] = ("y",)
) -> ModelProto:
    """A model of opset 20 with the input x, float32[batch, *shape]."""
    entry = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *shape])
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    values = [numpy_helper.from_array(np.asarray(array, order="C"), name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "graph", [entry], ends, values)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def run_graph(model: ModelProto, rows: NDArray[Any], tensors: Sequence[str] | None = None) -> list[NDArray[Any]]:
    """The outputs of a model, or any of its tensors, computed node by node without onnxruntime's own rewrites."""
    probe = ModelProto()
    probe.CopyFrom(model)
    if tensors is not None:
        del probe.graph.output[:]
        probe.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in tensors)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(probe.SerializeToString(), options, providers=["CPUExecutionProvider"])
    values: list[NDArray[Any]] = session.run(tensors, {session.get_inputs()[0].name: rows})
    return values


def operators(model: ModelProto) -> list[str]:
    """The operators of a graph, in order."""
    return [node.op_type for node in model.graph.node]
