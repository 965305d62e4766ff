"""Fixed sine-cosine position embeddings in two dimensions (Chen, Xie, He 2021, arXiv 2104.02057; MAE's order)."""

import torch
from torch import Tensor


def sincos(width: int, grid: tuple[int, int], prefix: int = 0) -> Tensor:
    """Embeddings of a grid's patches in row-major order, after `prefix` zero rows: (prefix + rows * columns, width).

    The first half of the width encodes the column, the second the row, each as sines then cosines at frequencies
    10000^(-i / (width / 4)).

    Raises:
        ValueError: a width that is not a multiple of 4.
    """
    if width % 4:
        raise ValueError(f"sine-cosine positions need a width that is a multiple of 4, not {width}")
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    frequency = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angles = [axis.flatten()[:, None] * frequency for axis in (columns, rows)]
    table = torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1)
    return torch.cat([torch.zeros(prefix, width), table.float()])
