"""timm's blocks in another form where that is faster or keeps less: the same weights, names and maths, other products and
copies."""

from typing import Any

import torch
from timm.layers.attention import Attention
from timm.layers.mlp import Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from selfsight.kept import linear_of_gelu, linear_of_norm, product_of_norm, unwatched

MOST_KEYS = 1025  # 512 pixels in patches of 16, and a class token


def attend(heads: int, *packed: Tensor) -> Tensor:
    """Attention of several heads, scaled by the root of their width: (B, M, heads d).

    Args:
        packed: queries, keys and values side by side, (B, N, 3 heads d); or queries (B, M, heads d), and keys and values
            (B, N, 2 heads d).
    """
    if by_products(packed[-1]):
        return _Products.apply(heads, *packed)
    q, k, v = (part for one in _by_head(packed, heads) for part in one)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def by_products(x: Tensor) -> bool:
    """Whether attention is two products and a softmax, and not torch's fused kernel: on a CPU, in bf16, of keys (B, N, ...)
    that are not too many.

    Forward and backward of ViT-S's heads of 64 took the fused kernel 5.3, 5.6, 2.8, 2.7, 2.3 and 2.3 times as long at 50,
    65, 197, 257, 577 and 1,025 tokens, heads of 32 7.2, 6.3, 2.9 and 2.7 times at the first four, forward alone 1.2 to 2.0
    times (AVX-512 with bf16, one thread, torch 2.15); the gain is gone at 1,569, and the maps, which are kept for the
    backward pass, are then 350 MiB for each layer of a ViT-S with four clips. In fp32 it is the faster one, and on a GPU always.
    A rule, not a trial at start: a run that is resumed must add up in the same order.
    """
    fits = x.device.type == "cpu" and x.dtype == torch.bfloat16 and x.shape[1] <= MOST_KEYS
    return fits and not torch.compiler.is_compiling()


def quicken(module: nn.Module) -> None:
    """Let all of timm's plain attentions and blocks in there take the form here, in place; tensors and names stay."""
    for part in module.modules():
        if type(part) in QUICK:
            part.__class__ = QUICK[type(part)]


class QuickAttention(Attention):
    """timm's attention; where it would call the fused kernel, `attend`."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Tokens (B, N, D): (B, N, D)."""
        if attn_mask is not None or is_causal or not self.fused_attn or not self.plain:
            return super().forward(x, attn_mask, is_causal)
        return self._from(self.qkv(x))

    def of_norm(self, norm: nn.Module, x: Tensor) -> Tensor:
        """`self(norm(x))`, which keeps x and not its norm for the backward pass, where there is nothing else to it."""
        if not self.fused_attn or not self.plain:
            return self(norm(x))
        return self._from(linear_of_norm(self.qkv, norm, x))

    def _from(self, qkv: Tensor) -> Tensor:
        return self.proj_drop(self.proj(attend(self.num_heads, qkv)))

    @property
    def plain(self) -> bool:
        """Whether nothing happens between its products, and nobody watches its keys (as merging.py does)."""
        between = self.q_norm, self.k_norm, self.norm
        own = self.gate is None and not self.attn_drop.p and all(type(part) is nn.Identity for part in between)
        return own and not self.k_norm._forward_hooks


class QuickBlock(Block):
    """timm's block, of whose norms and GELU only the inputs are kept."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Tokens (B, N, D): (B, N, D)."""
        watched = not (unwatched(self.attn) and unwatched(self.mlp))
        if attn_mask is not None or is_causal or type(self.attn) is not QuickAttention or watched:
            return super().forward(x, attn_mask, is_causal)
        x = x + self.drop_path1(self.ls1(self.attn.of_norm(self.norm1, x)))
        return x + self.drop_path2(self.ls2(mlp_of_norm(self.mlp, self.norm2, x)))


def mlp_of_norm(mlp: Any, norm: nn.Module, x: Tensor) -> Tensor:
    """`mlp(norm(x))` for tokens (B, N, D); a plain one keeps x and what goes into its GELU for the backward pass."""
    if type(mlp) is not Mlp or type(mlp.norm) is not nn.Identity or mlp.drop1.p:
        return mlp(norm(x))
    return mlp.drop2(linear_of_gelu(mlp.fc2, mlp.act, linear_of_norm(mlp.fc1, norm, x)))


QUICK: dict[type[nn.Module], type[nn.Module]] = {Attention: QuickAttention, Block: QuickBlock}


class LastBlock(Block):
    """timm's plain block where only some tokens are wanted of it: all have keys and values, only those have queries and go
    through the projection and the MLP."""

    def forward(self, x: Tensor, count: int) -> Tensor:  # type: ignore[override]
        """Tokens (B, N, D): the last `count` of what comes out of the block, (B, count, D)."""
        attn: Any = self.attn
        width = x.shape[-1]
        normed = self.norm1(x)
        weight, bias, wanted = attn.qkv.weight, attn.qkv.bias, x[:, -count:]
        q = product_of_norm(normed[:, -count:], weight[:width], bias[:width], self.norm1, wanted)
        kv = product_of_norm(normed, weight[width:], bias[width:], self.norm1, x)
        x = wanted + attn.proj(attend(attn.num_heads, q, kv))
        return x + mlp_of_norm(self.mlp, self.norm2, x)


class _Products(torch.autograd.Function):
    """`attend` by batched products over memory in their own order, one copy in and one out in either direction."""

    @staticmethod
    def forward(ctx: Any, heads: int, *packed: Tensor) -> Tensor:
        parts = [one.contiguous().flatten(1, 2) for one in _by_head(packed, heads)]
        q, k, v = (part for one in parts for part in one)
        ctx.heads, ctx.scale = heads, q.shape[-1] ** -0.5
        maps = torch.baddbmm(q.new_empty(()), q, k.mT, beta=0, alpha=ctx.scale).softmax(-1)
        ctx.save_for_backward(maps, *parts)
        return _side_by_side(torch.bmm(maps, v)[None], heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        maps, *parts = ctx.saved_tensors
        q, k, v = (part for one in parts for part in one)
        out = gradients[0].unflatten(2, (ctx.heads, -1)).transpose(1, 2).flatten(0, 1)
        made = [torch.empty_like(one) for one in parts]
        dq, dk, dv = (part for one in made for part in one)
        torch.bmm(maps.mT, out, out=dv)
        scores = torch._softmax_backward_data(torch.bmm(out, v.mT), maps, -1, maps.dtype)
        torch.baddbmm(dq, scores, k, beta=0, alpha=ctx.scale, out=dq)
        torch.baddbmm(dk, scores.mT, q, beta=0, alpha=ctx.scale, out=dk)
        return None, *(_side_by_side(one, ctx.heads) for one in made)


def _by_head(packed: tuple[Tensor, ...], heads: int) -> list[Tensor]:
    """Views (parts, B, heads, N, d), where the parts are queries, keys and values, or what there is of them."""
    counts = (3,) if len(packed) == 1 else (1, 2)
    return [
        one.unflatten(2, (count, heads, -1)).permute(2, 0, 3, 1, 4) for one, count in zip(packed, counts, strict=True)
    ]


def _side_by_side(parts: Tensor, heads: int) -> Tensor:
    """(parts, B heads, N, d) -> (B, N, parts heads d)."""
    return parts.unflatten(1, (-1, heads)).permute(1, 3, 0, 2, 4).flatten(2)
