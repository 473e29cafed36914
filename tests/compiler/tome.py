"""Token merging as the paper describes it (Bolya et al., ICLR 2023), in torch with sorting, gather and scatter: the reference.

Written from the paper and sharing nothing with vitedge.compiler.merging. `merged` runs the blocks of a ViT; a block has norm1,
attention (Linears qkv, or q, k and v, and proj), norm2 and either mlp or fc1 and fc2; scale1 and scale2 where it has LayerScale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Merged:
    """tokens [B, n, C]; size [B, n, 1]: how many first tokens each stands for; source [B, n, N]: which, as 0 and 1.

    margin: how near the nearest decision came to being another one, as a difference of cosines.
    """

    tokens: Tensor
    size: Tensor
    source: Tensor
    margin: float

    @property
    def restored(self) -> Tensor:
        """[B, N, C]: each first token with the value of the one it was merged into."""
        return self.source.transpose(1, 2) @ self.tokens


def merged(x: Tensor, blocks: Sequence[Any], heads: int, counts: Sequence[int], prefix: int) -> Merged:
    """Run blocks on x [B, N, C], of which the first `prefix` tokens are protected, merging counts[i] tokens in block i."""
    size = torch.ones(*x.shape[:2], 1)
    source = torch.eye(x.shape[1]).expand(len(x), -1, -1)
    margin = float("inf")
    for block, wanted in zip(blocks, counts, strict=True):
        answer, key = attend(block.attention, block.norm1(x), heads, size)
        x = x + getattr(block, "scale1", 1) * answer
        count = min(wanted, (x.shape[1] - prefix) // 2)
        if count:
            merge, near = match(key.mean(1), count, prefix)
            margin = min(margin, near)
            total = merge(x * size)
            size, source = merge(size), merge(source)
            x = total / size
        x = x + getattr(block, "scale2", 1) * mlp(block)(block.norm2(x))
    return Merged(x, size, source, margin)


def attend(attention: Any, x: Tensor, heads: int, size: Tensor) -> tuple[Tensor, Tensor]:
    """Attention in which a token counts as many times as its size; its answer, and the keys [B, heads, n, D]."""
    if hasattr(attention, "qkv"):
        q, k, v = attention.qkv(x).chunk(3, dim=-1)
    else:
        q, k, v = attention.q(x), attention.k(x), attention.v(x)
    q, k, v = (each.unflatten(2, (heads, -1)).transpose(1, 2) for each in (q, k, v))
    scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5 + size.log()[:, None, None, :, 0]
    return attention.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)), k


def mlp(block: Any) -> Callable[[Tensor], Tensor]:
    """The second half of a block."""
    return block.mlp if hasattr(block, "mlp") else lambda x: block.fc2(nn.functional.gelu(block.fc1(x)))


def match(metric: Tensor, count: int, prefix: int) -> tuple[Callable[[Tensor], Tensor], float]:
    """Bipartite soft matching: a function that sums merged tokens, and how near the choice was to another one."""
    metric = nn.functional.normalize(metric, dim=-1)
    even, odd = (torch.arange(start, metric.shape[1], 2) for start in (0, 1))
    scores = metric[:, even] @ metric[:, odd].transpose(1, 2)
    scores[:, even < prefix] = -torch.inf
    scores[:, :, odd < prefix] = -torch.inf
    best, partner = scores.max(dim=2)
    order = best.argsort(dim=1, descending=True)
    chosen, left = order[:, :count], order[:, count:].sort(dim=1).values
    partners = partner.gather(1, chosen)

    def merge(x: Tensor) -> Tensor:
        wide = x.shape[-1]
        a, b = x[:, even], x[:, odd].clone()
        moved = a.gather(1, chosen[..., None].expand(-1, -1, wide))
        b = b.scatter_add(1, partners[..., None].expand(-1, -1, wide), moved)
        a = a.gather(1, left[..., None].expand(-1, -1, wide))
        first = [part[:, : len(number[number < prefix])] for part, number in ((a, even), (b, odd))]
        front = torch.stack([first[i % 2][:, i // 2] for i in range(prefix)], 1) if prefix else x[:, :0]
        return torch.cat([front, a[:, first[0].shape[1] :], b[:, first[1].shape[1] :]], dim=1)

    return merge, float(
        min(gap(best, count), *(gap(row, 1) for row in scores.gather(1, chosen[..., None].expand(-1, -1, len(odd)))))
    )


def gap(values: Tensor, count: int) -> float:
    """How far the `count`-th largest of the last axis lies above the next one, at least."""
    if count >= values.shape[-1]:
        return float("inf")
    found = values.topk(count + 1, dim=-1).values
    return float((found[..., count - 1] - found[..., count]).min())
