"""Fixed sine-cosine position embeddings (Vaswani et al. 2017; in two dimensions Chen, Xie, He 2021, arXiv 2104.02057, in MAE's order)."""

import torch
from torch import Tensor


def sincos(width: int, grid: tuple[int, ...], prefix: int = 0) -> Tensor:
    """Embeddings of a grid's patches in row-major order, after `prefix` zero rows: (prefix + N, width).

    Of (rows, columns), the first half of the width encodes the column, the second the row, each as sines then cosines at
    frequencies 10000^(-i / (width / 4)). Of (planes, rows, columns), the sum of the patch's embedding in its plane and
    the plane's own, `sincos_line` (separable, as in Feichtenhofer et al. 2022, arXiv 2205.09113, section 3.1); a single
    plane has none.

    Raises:
        ValueError: a width that is not a multiple of 4.
    """
    if width % 4:
        raise ValueError(f"sine-cosine positions need a width that is a multiple of 4, not {width}")
    rows, columns = torch.meshgrid(torch.arange(grid[-2]), torch.arange(grid[-1]), indexing="ij")
    frequency = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angles = [axis.flatten()[:, None] * frequency for axis in (columns, rows)]
    table = torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1)
    table = table.float()
    if len(grid) == 3 and grid[0] > 1:
        table = (sincos_line(width, grid[0])[:, None] + table).flatten(0, 1)
    return torch.cat([torch.zeros(prefix, width), table])


def sincos_line(width: int, steps: int) -> Tensor:
    """Embeddings of places along a line: sines, then cosines, at frequencies 10000^(-i / (width / 2)): (steps, width)."""
    frequency = 10000.0 ** -(torch.arange(width // 2, dtype=torch.float64) / (width / 2))
    angles = torch.arange(steps)[:, None] * frequency
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()
