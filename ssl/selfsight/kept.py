"""Linear layers that do not keep their input for the backward pass, but what it was made of, which is kept anyway.

A norm keeps its own input, and so does GELU; torch's linear layer after it keeps its result as well, in autocast's type, and
a rounded copy of the weights. Here both are made again in the backward pass, by the same operations from the same numbers
(Chen et al. 2016, arXiv 1604.06174, section 3, of the cheapest layers): outputs and gradients are the same bit by bit.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.layers.norm import LayerNorm
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

NORMS = nn.LayerNorm, LayerNorm  # that are `F.layer_norm` of their weight and bias
Make = Callable[..., Tensor]


def linear_of(made: Tensor, weight: Tensor, bias: Tensor | None, make: Make, *parts: Tensor | None) -> Tensor:
    """`F.linear(made, weight, bias)` that keeps `parts` and the weight for its backward pass, and not `made`.

    A weight that several calls share in one step has its gradients in autocast's type added up in its own.

    Args:
        made: (..., K), what `make(*parts)` gives, with its own way back to them.
        weight: (N, K).
        bias: (N,).
        make: a function of tensors alone; it is called again, under the autocast of now.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():  # inductor decides by itself what it keeps
        return F.linear(made, weight, bias)
    return _Linear.apply(made, weight, bias, make, *(part if part is None else part.detach() for part in parts))


def linear_of_norm(layer: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
    """`layer(norm(x))`, which keeps x alone where these are a plain linear layer and a layer norm."""
    made = norm(x)
    if type(layer) is not nn.Linear or not unwatched(layer):
        return layer(made)
    return product_of_norm(made, layer.weight, layer.bias, norm, x)


def product_of_norm(made: Tensor, weight: Tensor, bias: Tensor | None, norm: nn.Module, x: Tensor) -> Tensor:
    """`F.linear(made, weight, bias)` of `made`, which is `norm(x)`; keeps x alone where that is a layer norm."""
    fast = getattr(norm, "_fast_norm", False)  # timm's, which rounds first
    if not isinstance(norm, nn.LayerNorm) or type(norm) not in NORMS or fast or not unwatched(norm):
        return F.linear(made, weight, bias)
    shape, eps = norm.normalized_shape, norm.eps
    return linear_of(made, weight, bias, lambda x, w, b: F.layer_norm(x, shape, w, b, eps), x, norm.weight, norm.bias)


def linear_of_gelu(layer: nn.Module, act: nn.Module, x: Tensor) -> Tensor:
    """`layer(act(x))`, which keeps x alone where these are a plain linear layer and a GELU."""
    made = act(x)
    if type(layer) is not nn.Linear or type(act) is not nn.GELU or not (unwatched(act) and unwatched(layer)):
        return layer(made)
    return linear_of(made, layer.weight, layer.bias, act.forward, x)


def unwatched(module: nn.Module) -> bool:
    """Whether no hook looks at it or changes what goes in, as those of sharded norms do."""
    return not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def _autocast_type(x: Tensor) -> torch.dtype | None:
    """To which autocast casts where x lies; None where it is off, or where there is none."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def _again(make: Make, parts: Sequence[Tensor], dtype: torch.dtype | None) -> Tensor:
    """What `make` gave, under the same autocast."""
    device = parts[0].device.type
    if not torch.amp.is_autocast_available(device):
        return make(*parts)
    with torch.autocast(device, dtype, enabled=dtype is not None, cache_enabled=False):
        return make(*parts)


class _Linear(torch.autograd.Function):
    """x W' + b. The products of the backward pass are those of torch's own, in its order of strides."""

    @staticmethod
    def forward(
        ctx: Any, made: Tensor, weight: Tensor, bias: Tensor | None, make: Make, *parts: Tensor | None
    ) -> Tensor:
        ctx.make, ctx.made_type, ctx.bias_type = make, made.dtype, None if bias is None else bias.dtype
        ctx.autocast = _autocast_type(made)
        ctx.save_for_backward(weight, *parts)
        # Cast here, for autocast would remember the rounded weights until it ends, and without their gradient.
        dtype = ctx.autocast or weight.dtype
        return F.linear(made.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        weight, *parts = ctx.saved_tensors
        rows = gradient.flatten(0, -2)
        found: list[Tensor | None] = [None] * 3
        if ctx.needs_input_grad[1]:
            made = _again(ctx.make, parts, ctx.autocast)
            found[1] = rows.t().mm(made.to(rows.dtype).flatten(0, -2)).to(weight.dtype)
            del made
        if ctx.needs_input_grad[2]:
            found[2] = rows.sum(0).to(ctx.bias_type)
        if ctx.needs_input_grad[0]:
            found[0] = rows.mm(weight.to(rows.dtype)).view(*gradient.shape[:-1], -1).to(ctx.made_type)
        return *found, None, *(None for _ in parts)
