"""The blocks of MAE's decoder: how the tokens of hidden patches come to know of the visible ones.

`self`: all tokens attend to all (He et al. 2022, arXiv 2111.06377). `cross`: queries, one for each hidden patch that is
rebuilt, attend to the visible tokens and not to each other (CrossMAE, Fu et al. 2024, arXiv 2401.14391): each is rebuilt
by itself, so that any part of them gives an unbiased loss, at the cost of that part.
"""

from typing import Any

from timm.layers.mlp import Mlp
from torch import Tensor, nn
from torch.nn import functional as F


class CrossAttention(nn.Module):
    """Attention of queries to a memory of the same width; every head has width / heads channels."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """Queries (B, M, D) and memory (B, K, D): (B, M, D)."""
        q = self.q(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(memory).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class CrossBlock(nn.Module):
    """Cross-attention and MLP, each of a layer norm of the queries and added to them (CrossMAE, figure 3)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = CrossAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp: Any = Mlp(width, 4 * width)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """Queries (B, M, D) and memory (B, K, D): (B, M, D)."""
        x = x + self.attn(self.norm1(x), memory)
        return x + self.mlp(self.norm2(x))
