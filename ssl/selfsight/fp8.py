"""Linear layers that multiply in 8-bit floats while they train (Micikevicius et al. 2022, arXiv 2209.05433).

Factors of the forward pass are e4m3, gradients e5m2, each tensor scaled by its own largest value as it is at that moment.
Weights stay what they were: float32, under the same names; so do checkpoints and exports. Whatever is scored goes
through the plain layer.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from selfsight.blocks import LastBlock
from selfsight.precision import FP8_MULTIPLE

FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2
# Smaller layers are bound by reading and writing, of which finding the scales makes more. A guess: not measured on a GPU.
SMALLEST = 256


class Float8Linear(nn.Linear):
    """A linear layer (..., K) -> (..., N); in training its three products are of 8-bit floats."""

    def forward(self, input: Tensor) -> Tensor:
        """In evaluation, as for a teacher or for scores, the plain layer."""
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(input)
        device = input.device.type
        if torch.is_autocast_enabled(device):
            input = input.to(torch.get_autocast_dtype(device))
        made: Tensor = _Product.apply(input.flatten(0, -2), self.weight)
        made = made.unflatten(0, input.shape[:-1])
        return made if self.bias is None else made + self.bias.to(made.dtype)


class _Product(torch.autograd.Function):
    """x (M, K), weight (N, K) -> x weight' (M, N); what is kept for the backward pass has 8 bits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        (x8, x_scale), (w8, w_scale) = quantize(x, FORWARD), quantize(weight, FORWARD)
        ctx.save_for_backward(x8, x_scale, w8, w_scale)
        ctx.dtypes = x.dtype, weight.dtype
        return torch._scaled_mm(x8, w8.t(), x_scale, w_scale, out_dtype=x.dtype, use_fast_accum=True)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        x8, x_scale, w8, w_scale = ctx.saved_tensors
        g8, g_scale = quantize(gradients[0], BACKWARD)
        # Matrix units want the first factor by rows and the second by columns; sums of gradients accumulate in full.
        of_x = torch._scaled_mm(g8, _by_columns(w8), g_scale, w_scale, out_dtype=ctx.dtypes[0])
        of_weight = torch._scaled_mm(g8.t().contiguous(), _by_columns(x8), g_scale, x_scale, out_dtype=ctx.dtypes[1])
        return of_x, of_weight


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A contiguous 8-bit tensor and its scale (), whose product is x: the largest value becomes the largest of the type."""
    most = torch.finfo(dtype).max
    scale = (x.detach().abs().amax().float() / most).clamp(min=1e-12)
    return (x.float() / scale).clamp(-most, most).to(dtype).contiguous(), scale


def to_float8(blocks: Iterable[nn.Module]) -> int:
    """Replace the linear layers of blocks that are trained, large enough and of fitting sides; the answer is how many."""
    count = 0
    for block in blocks:
        apart = (
            block.attn.qkv if isinstance(block, LastBlock) else None
        )  # multiplies by parts of its weight, not through it
        for parent in list(block.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear and child is not apart and fits(child):
                    setattr(parent, name, _as_float8(child))
                    count += 1
    return count


def fits(layer: nn.Linear) -> bool:
    """Whether its sides are whole multiples of what matrix units multiply, and it is worth it."""
    sides = layer.in_features, layer.out_features
    return layer.weight.requires_grad and min(sides) >= SMALLEST and not any(side % FP8_MULTIPLE for side in sides)


def _as_float8(layer: nn.Linear) -> Float8Linear:
    made = Float8Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    made.weight, made.bias = layer.weight, layer.bias
    return made.train(layer.training)


def _by_columns(x: Tensor) -> Tensor:
    return x.t().contiguous().t()
