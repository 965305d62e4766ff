"""The blocks of MAE's decoder: how the tokens of hidden patches come to know of the visible ones.

`self`: all tokens attend to all (He et al. 2022, arXiv 2111.06377). `cross`: queries, one for each hidden patch that is
rebuilt, attend to the visible tokens and not to each other (CrossMAE, Fu et al. 2024, arXiv 2401.14391): each is rebuilt
by itself, so that any part of them gives an unbiased loss, at the cost of that part. Each block sees its own weighted sum
of what went into the encoder's blocks and came out of them ("inter-block attention", section 3.4).
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers.mlp import Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from selfsight.blocks import LastBlock, attend, mlp_of_norm, quicken
from selfsight.kept import linear_of_norm
from selfsight.objectives.configs import MAEConfig


def decoder_blocks(config: MAEConfig, seen: int) -> nn.ModuleList:
    """The blocks of a decoder, first to last; the last of a `self` decoder is asked for the hidden patches alone.

    Args:
        seen: the encoder's width.
    """
    width, heads, depth = config.decoder_width, config.decoder_heads, config.decoder_depth
    if config.decoder == "cross":
        return nn.ModuleList(CrossBlock(width, heads, seen) for _ in range(depth))
    kinds = [Block] * (depth - 1) + [LastBlock]
    blocks = nn.ModuleList(kind(width, heads, qkv_bias=True) for kind in kinds)
    quicken(blocks)
    return blocks


class BlockSums(nn.Module):
    """Weighted sums of the tokens before and after an encoder's blocks, one for each block of a decoder; the weights are learned."""

    def __init__(self, given: int, sums: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(sums, given)))

    def forward(self, given: Sequence[Tensor]) -> Sequence[Tensor]:
        """Tokens (B, K, E) of each place: the sums of them, of the same shape."""
        # Image by image: the gradient of so few weights is a sum over all tokens and channels, which as one product of
        # length 10^7 might be one multiprocessor's work.
        stacked = torch.stack([*given], 1)
        sums = torch.bmm(self.weight.expand(len(stacked), -1, -1), stacked.flatten(2))
        return sums.unflatten(2, stacked.shape[2:]).unbind(1)


class CrossAttention(nn.Module):
    """Attention of queries (width D) to a memory (width E); every head has D / heads channels."""

    def __init__(self, width: int, heads: int, seen: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(seen, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, memory: Tensor, norm: nn.Module, norm_memory: nn.Module) -> Tensor:
        """Queries, `norm` of x (B, M, D), and `norm_memory` of memory (B, K, E): (B, M, D)."""
        keys_and_values = linear_of_norm(self.kv, norm_memory, memory)
        return self.proj(attend(self.heads, linear_of_norm(self.q, norm, x), keys_and_values))


class CrossBlock(nn.Module):
    """Cross-attention and MLP, each of a layer norm of the queries and added to them (CrossMAE, figure 3)."""

    def __init__(self, width: int, heads: int, seen: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.norm_memory = nn.LayerNorm(seen, eps=1e-6)
        self.attn = CrossAttention(width, heads, seen)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp: Any = Mlp(width, 4 * width)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """Queries (B, M, D) and memory (B, K, E): (B, M, D)."""
        x = x + self.attn(x, memory, self.norm1, self.norm_memory)
        return x + mlp_of_norm(self.mlp, self.norm2, x)
