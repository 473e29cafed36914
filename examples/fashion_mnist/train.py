"""Train the Fashion-MNIST ViT of model.py on a CPU, seeded, and write vit.safetensors beside this file.

    python examples/fashion_mnist/train.py DIR_WITH_THE_FOUR_IDX_GZ_FILES [--epochs 16]

The data is Debian's package `dataset-fashion-mnist` (MIT licence), or https://github.com/zalandoresearch/fashion-mnist.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from dataset import read_idx
from model import MEAN, STD, ViT
from safetensors.torch import save_file
from torch import Tensor, nn

BATCH = 128
HERE = Path(__file__).parent


def load(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Return normalised float32[N, 1, 28, 28] images and int64[N] labels of "train" or "t10k"."""
    images = read_idx(folder / f"{part}-images-idx3-ubyte.gz").astype(np.float32) / 255
    labels = read_idx(folder / f"{part}-labels-idx1-ubyte.gz").astype(np.int64)
    return torch.from_numpy((images - MEAN) / STD)[:, None], torch.from_numpy(labels)


def augment(images: Tensor) -> Tensor:
    """Flip half of the batch left to right, and shift each image by up to two pixels."""
    flip = torch.rand(len(images)) < 0.5
    images = torch.where(flip[:, None, None, None], images.flip(3), images)
    padded = nn.functional.pad(images, (2, 2, 2, 2), value=-MEAN / STD)
    rows = torch.randint(5, (len(images), 1, 1)) + torch.arange(28)[None, :, None]
    columns = torch.randint(5, (len(images), 1, 1)) + torch.arange(28)[None, None, :]
    return padded[torch.arange(len(images))[:, None, None], 0, rows, columns][:, None]


@torch.inference_mode()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Top-1 in percent."""
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in zip(images.split(500), labels.split(500), strict=True))
    return 100 * right / len(labels)


def train(folder: Path, epochs: int, seed: int = 0) -> ViT:
    """Train with AdamW and a one-cycle learning rate; print loss and test accuracy after each epoch."""
    torch.manual_seed(seed)
    model = ViT()
    images, labels = load(folder, "train")
    test_images, test_labels = load(folder, "t10k")
    steps = len(images) // BATCH
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=epochs * steps, pct_start=0.2)
    for epoch in range(epochs):
        started, total = time.perf_counter(), 0.0
        model.train()
        for chosen in torch.randperm(len(images))[: steps * BATCH].split(BATCH):
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(augment(images[chosen]))
            loss = nn.functional.cross_entropy(logits.float(), labels[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
        model.eval()
        top1 = accuracy(model, test_images, test_labels)
        seconds = time.perf_counter() - started
        print(f"epoch {epoch + 1:2}  loss {total / steps:.4f}  top-1 {top1:.2f} %  {seconds:.0f} s", flush=True)
        save_file(model.state_dict(), HERE / "vit.safetensors")
    return model


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--epochs", type=int, default=16)
    arguments = parser.parse_args()
    train(arguments.folder, arguments.epochs)
