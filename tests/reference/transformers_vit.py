"""What transformers' ViT blocks are called here."""

import torch
from torch import Tensor


def block_as_ours(theirs: dict[str, Tensor], other: str, mine: str, part: str) -> dict[str, Tensor]:
    """Weights or biases (`part`) of transformers' block `other` under the names of our block `mine`; q, k and v joined."""
    qkv = [theirs[f"{other}.attention.{name}_proj.{part}"] for name in "qkv"]
    ours = {
        f"{mine}.attn.qkv.{part}": torch.cat(qkv),
        f"{mine}.attn.proj.{part}": theirs[f"{other}.attention.o_proj.{part}"],
        f"{mine}.norm1.{part}": theirs[f"{other}.layernorm_before.{part}"],
        f"{mine}.norm2.{part}": theirs[f"{other}.layernorm_after.{part}"],
    }
    return ours | {f"{mine}.mlp.{layer}.{part}": theirs[f"{other}.mlp.{layer}.{part}"] for layer in ("fc1", "fc2")}
