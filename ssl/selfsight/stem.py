"""From pixels to patches and back, in planes and in volumes, and stems for other inputs than they were trained on.

A volume (B, C, D, H, W) is cut into tubes of `tube` planes. The stem of a volume is a timm stem whose input channels are
the channels times the planes of a tube: the same product as a 3D convolution that steps by its own size.
"""

import torch
from einops import rearrange
from timm.models import adapt_input_conv
from torch import Tensor
from torch.nn import functional as F


def patchify(images: Tensor, patch: int, tube: int = 1) -> Tensor:
    """Patches in row-major order, plane after plane.

    (B, C, H, W) -> (B, H' W', C * patch * patch); (B, C, D, H, W) -> (B, T H' W', C * tube * patch * patch).
    """
    if images.ndim == 4:
        return rearrange(images, "b c (h p) (w q) -> b (h w) (c p q)", p=patch, q=patch)
    return rearrange(images, "b c (d t) (h p) (w q) -> b (d h w) (c t p q)", t=tube, p=patch, q=patch)


def unpatchify(patches: Tensor, patch: int, grid: tuple[int, ...], tube: int = 1) -> Tensor:
    """The inverse of `patchify`, for a grid of rows and columns, or of planes, rows and columns."""
    h, w = grid[-2:]
    if len(grid) == 2:
        return rearrange(patches, "b (h w) (c p q) -> b c (h p) (w q)", p=patch, q=patch, h=h, w=w)
    return rearrange(
        patches, "b (d h w) (c t p q) -> b c (d t) (h p) (w q)", t=tube, p=patch, q=patch, d=grid[0], h=h, w=w
    )


def adapt_channels(weight: Tensor, channels: int, tube: int, old_tube: int = 1) -> Tensor:
    """A stem (D, C' * old_tube, p, p) for other channels and tubes: (D, channels * tube, p, p).

    Channels are repeated and rescaled, or summed to one, as timm does it: a grey image looks as it did in RGB. Planes are
    summed, then repeated and divided by their number (Carreira and Zisserman 2017, arXiv 1705.07750, section 3.4): a
    tube of equal planes looks as its plane did.

    Raises:
        NotImplementedError: a stem that timm cannot adapt.
    """
    plane = weight.unflatten(1, (-1, old_tube)).sum(2) if old_tube > 1 else weight
    plane = adapt_input_conv(channels, plane, plane.shape[1])
    return (plane / tube).repeat_interleave(tube, dim=1) if tube > 1 else plane


def resample_depth(table: Tensor, steps: int) -> Tensor:
    """A depth table (1, T, D) at another number of steps over the same length, linearly: (1, steps, D)."""
    return F.interpolate(table.float().transpose(1, 2), steps, mode="linear").transpose(1, 2).to(table.dtype)


def sample_channels(draws: Tensor) -> tuple[int, ...]:
    """Which of C channels are shown, in order, from 1 + C uniform numbers: first how many, each number of them equally
    likely, then which (hierarchical channel sampling, ChannelViT, arXiv 2309.16108, section 3.2)."""
    count = 1 + int(draws[0] * (len(draws) - 1))
    return tuple(sorted(torch.argsort(draws[1:])[:count].tolist()))
