"""Token merging (Bolya et al. 2023, arXiv 2210.09461): in each block the most similar patch tokens become one.

A trained ViT runs faster so, without training anew, and its features change a little. The steps are those of the authors'
release: keys averaged over heads tell who is similar, class and register tokens stay out of it, and later blocks attend to
a merged token as to the patches that it holds.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block
from torch import Tensor

from selfsight.blocks import QuickAttention, QuickBlock
from selfsight.encoder import LAST4, Encoder, Tokens, pool_layers, pool_tokens, take
from selfsight.errors import UsageError


def check_merging(encoder: Encoder, merge: int, pools: Sequence[str] = ()) -> None:
    """Say no to what cannot be merged.

    Raises:
        UsageError: a negative number, another backbone than a vit_* without rotary positions, or the backbone's own pool.
    """
    if merge < 0:
        raise UsageError(f"merge: {merge} tokens a block; give 0 (none) or more")
    if not merge:
        return
    name = encoder.config.name
    if not encoder.plain or any(
        type(b) not in (Block, QuickBlock) or type(b.attn) not in (Attention, QuickAttention) for b in encoder.blocks
    ):
        why = "rotary positions or other blocks" if encoder.plain else "no plain sequence of tokens"
        raise UsageError(f"merge: {name} has {why}; tokens are merged in a vit_* with timm's plain blocks")
    if "head" in pools:
        raise UsageError(f"merge: the pool `head` is {name}'s own and knows no sizes; use mean or cls")


def embed_merged(encoder: Encoder, images: Tensor, pools: Sequence[str], merge: int) -> dict[str, Tensor]:
    """`Encoder.embed_pools` with so many patch tokens merged away in each block; means count every patch once.

    A block merges at most half of its patch tokens. 0: nothing is merged, the plain path.

    Raises:
        UsageError: as `check_merging`.
    """
    check_merging(encoder, merge, pools)
    if not merge:
        return encoder.embed_pools(images, pools)
    prefix, kept = encoder.prefix_tokens, 4 if LAST4 in pools else 1
    x, _ = encoder.begin(images)
    sizes: Tensor | None = None
    layers: list[tuple[Tokens, Tensor]] = []
    for depth, block in enumerate(encoder.blocks):
        x, sizes = merging_block(block, x, sizes, merge, prefix)
        if depth >= len(encoder.blocks) - kept:
            layers.append((encoder.normed(x), sizes[:, prefix:]))
    return {pool: pool_merged(layers, pool, encoder.has_class_token) for pool in pools}


def merging_block(block: Any, x: Tensor, sizes: Tensor | None, merge: int, prefix: int) -> tuple[Tensor, Tensor]:
    """A timm block that attends in proportion to sizes (section 3, equation 1) and merges before its MLP.

    Args:
        x: tokens (B, T, D), `prefix` ones first.
        sizes: (B, T), how many patches each holds, 1 for a prefix token; None: one each.
    """
    keys: list[Tensor] = []
    hook = block.attn.k_norm.register_forward_hook(lambda module, given, out: keys.append(out))
    shares = None if sizes is None else sizes.log()[:, None, None].to(x.dtype)
    try:
        x = x + block.drop_path1(block.ls1(block.attn(block.norm1(x), attn_mask=shares)))
    finally:
        hook.remove()
    sizes = x.new_ones(x.shape[:2]) if sizes is None else sizes
    x, sizes = merge_tokens(x, sizes, keys[0].mean(1), merge, prefix)
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x)))), sizes


def merge_tokens(x: Tensor, sizes: Tensor, keys: Tensor, merge: int, prefix: int) -> tuple[Tensor, Tensor]:
    """Bipartite soft matching (section 3 and appendix D): every other patch token is led to its most similar one of the rest,
    and the `merge` most similar of these pairs become one token, their mean weighted by sizes.

    Args:
        x: tokens (B, T, D), `prefix` ones first, which stay as they are.
        sizes: (B, T).
        keys: (B, T, d), compared by cosine.
    """
    merge = min(merge, (x.shape[1] - prefix) // 2)
    if merge <= 0:
        return x, sizes
    first = prefix % 2  # even places of the whole sequence are led to odd ones, as in the release
    near = keys[:, prefix:] / keys[:, prefix:].norm(dim=-1, keepdim=True)
    similarity, best = (near[:, first::2] @ near[:, 1 - first :: 2].mT).max(-1)
    order = similarity.argsort(-1, descending=True)
    led, stay = order[:, :merge], order[:, merge:]
    if prefix:  # as in the release; the order decides who meets whom in the next block
        stay = stay.sort(1).values
    weights = sizes[:, prefix:, None]
    summed = torch.cat([x[:, prefix:] * weights, weights], dim=-1)
    source, target = summed[:, first::2], summed[:, 1 - first :: 2]
    into = best.gather(1, led)[..., None].expand(-1, -1, summed.shape[-1])
    summed = torch.cat([take(source, stay), target.scatter_add(1, into, take(source, led))], dim=1)
    merged, weights = summed[..., :-1] / summed[..., -1:], summed[..., -1]
    return torch.cat([x[:, :prefix], merged], dim=1), torch.cat([sizes[:, :prefix], weights], dim=1)


def pool_merged(layers: list[tuple[Tokens, Tensor]], pool: str, class_token: bool) -> Tensor:
    """`pool_tokens` and `pool_layers` where a token counts as the patches that it holds.

    Args:
        layers: of the last blocks, the last at the end: tokens, and the sizes of the patch tokens (B, N).
    """
    even = [_evened(tokens, sizes, pool) for tokens, sizes in layers]
    return pool_layers(even, class_token) if pool == LAST4 else pool_tokens(even[-1], pool)


def _evened(tokens: Tokens, sizes: Tensor, pool: str) -> Tokens:
    """The same tokens with one patch token in place of all, their mean weighted by sizes: the mean of what is left.

    For "gem" it is the mean of their cubes, whose cube root its own mean is.
    """
    patches = tokens.patches.clamp(min=1e-6).pow(3) if pool == "gem" else tokens.patches
    mean = (patches * sizes[..., None]).sum(1, keepdim=True) / sizes.sum(1)[:, None, None]
    return Tokens(tokens.prefix, mean.pow(1 / 3) if pool == "gem" else mean)
