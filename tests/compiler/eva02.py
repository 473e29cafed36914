"""EVA-02 as its paper describes it, with random weights: what a plain ViT is not, in one module.

    images float32[B, 3, H, W]  ->  patches, class token, positions  ->  pre-norm blocks  ->  mean of the patches  ->  logits

A block's attention turns queries and keys by the place of their patch (rotary embedding, over rows and columns, the class
token left alone), and its MLP is a SwiGLU with a LayerNorm before its last Linear. Keys have no bias.
Fang et al. 2023, "EVA-02: A Visual Representation for Neon Genesis". Its weights would not fit: this is about graphs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from vitedge.specs import ModelCard, Preprocess

BASE = 10_000.0  # of the rotary angles: the fastest turns by 1 a patch, the slowest by little more than 1 / BASE


def tiny() -> tuple[nn.Module, ModelCard]:
    """For tests: 2 blocks of width 32 on 32 x 32 pixels."""
    return _seeded(size=32, patch=8, width=32, depth=2, heads=2, hidden=88), _card("eva02-tests", 32)


def ti14() -> tuple[nn.Module, ModelCard]:
    """EVA-02-Ti/14: 12 blocks of width 192 on 224 x 224 pixels, 5.7 M parameters with 1000 classes."""
    return _seeded(size=224, patch=14, width=192, depth=12, heads=3, hidden=512), _card("eva02-ti14", 224)


class Eva02(nn.Module):
    """float32[B, 3, size, size] -> logits float32[B, classes]. hidden: the width within the SwiGLU."""

    def __init__(self, *, size: int, patch: int, width: int, depth: int, heads: int, hidden: int, classes: int = 1000) -> None:
        super().__init__()
        side = size // patch
        self.patch_embed = nn.Conv2d(3, width, patch, patch)
        self.token = nn.Parameter(torch.randn(1, 1, width) / 10)
        self.positions = nn.Parameter(torch.randn(1, 1 + side * side, width) / 10)
        self.blocks = nn.ModuleList(Block(width, heads, hidden) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)
        angles = rotary_angles(side, width // heads)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.positions
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return self.head(self.norm(x[:, 1:].mean(dim=1)))


class Block(nn.Module):
    """One pre-norm block."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width), SwiGLU(width, hidden)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), cos, sin)
        return x + self.mlp(self.norm2(x))


class Attention(nn.Module):
    """Self-attention whose queries and keys are turned."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(width, width, bias=bias) for bias in (True, False, True))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (linear(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for linear in (self.q, self.k, self.v))
        q, k = (turned(t, cos, sin) for t in (q, k))
        return self.proj(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """proj(norm(silu(gate(x)) * value(x)))."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.value = nn.Linear(width, hidden), nn.Linear(width, hidden)
        self.norm, self.proj = nn.LayerNorm(hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.norm(functional.silu(self.gate(x)) * self.value(x)))


def rotary_angles(side: int, head: int) -> Tensor:
    """[patches, head]: how far each feature is turned at each patch; half of the pairs go by its row, half by its column."""
    frequencies = BASE ** -torch.arange(0, 1, 4 / head)  # a quarter of the features: pairs, of one half
    places = torch.arange(side)[:, None] * frequencies  # [side, head / 4]
    rows, columns = places[:, None].expand(-1, side, -1), places[None].expand(side, -1, -1)
    return torch.cat([rows, columns], dim=2).flatten(0, 1).repeat(1, 2)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries or keys [B, heads, 1 + patches, head], all but the class token turned; feature i pairs with i + head / 2."""
    token, patches = x[:, :, :1], x[:, :, 1:]
    first, second = patches.chunk(2, dim=3)
    return torch.cat([token, patches * cos + torch.cat([-second, first], dim=3) * sin], dim=2)


def _seeded(**sizes: int) -> Eva02:
    """The same weights at every call; the norms differ from the identity."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Eva02(**sizes).eval().requires_grad_(False)
        for norm in (m for m in module.modules() if isinstance(m, nn.LayerNorm)):
            norm.weight.uniform_(0.5, 2)
            norm.bias.normal_(0, 0.2)
    return module


def _card(name: str, size: int) -> ModelCard:
    return ModelCard(name, "classify", Preprocess((size, size), (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)))
