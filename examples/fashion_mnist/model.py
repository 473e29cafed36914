"""A small pure Vision Transformer for Fashion-MNIST, in plain PyTorch.

28 x 28 grey pixels -> 49 patches of 4 x 4 -> 4 pre-norm blocks of width 96 -> 10 classes; 0.45 M parameters.

    vitedge make examples/fashion_mnist/model.py:vit --checkpoint examples/fashion_mnist/vit.safetensors ...

`vit()` returns the module together with its ModelCard, which is how any model
tells vitedge how its images are prepared.
"""

import torch
from dataset import LABELS
from torch import Tensor, nn

from vitedge import ModelCard, Preprocess

SIZE, PATCH, WIDTH, DEPTH, HEADS = 28, 4, 96, 4, 3
MEAN, STD = 0.2860, 0.3530  # of the 60,000 training images, on the 0..1 scale


class Attention(nn.Module):
    """Multi-head self-attention over [B, N, WIDTH] tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, HEADS, WIDTH // HEADS)).permute(2, 0, 3, 1, 4).unbind(0)
        x = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(WIDTH), Attention()
        self.norm2 = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """float32[B, 1, 28, 28], normalised with MEAN and STD -> logits float32[B, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(1, WIDTH, kernel_size=PATCH, stride=PATCH)
        self.class_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 1 + (SIZE // PATCH) ** 2, WIDTH))
        self.blocks = nn.Sequential(*(Block() for _ in range(DEPTH)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, len(LABELS))

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], dim=1) + self.positions
        return self.head(self.norm(self.blocks(x)[:, 0]))


def vit() -> tuple[nn.Module, ModelCard]:
    """The untrained module and its card; `--checkpoint` brings the weights."""
    preprocess = Preprocess(size=(SIZE, SIZE), mean=(MEAN,), std=(STD,), interpolation="bilinear", channels=1)
    return ViT(), ModelCard("fashion-vit", "classify", preprocess, labels=LABELS)
