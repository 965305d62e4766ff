"""How healthy features are, without labels."""

from math import nan

import torch
from torch import Tensor


def rankme(features: Tensor) -> float:
    """RankMe (Garrido et al. 2023, arXiv 2210.02885, equation 1): exp of the entropy of the normalised singular values.

    Between 1 (all features on one line: collapse) and the width D.

    Args:
        features: (N, D), not centred.

    Returns:
        NaN where they are not finite.
    """
    features = features.double()
    if not features.isfinite().all():
        return nan
    if features.shape[1] > 4 * len(features):  # the singular values are those of the smaller Gram matrix
        values = torch.linalg.eigvalsh(features @ features.T).clamp(min=0).sqrt()
    else:
        values = torch.linalg.svdvals(features)
    shares = values / values.sum().clamp(min=1e-300) + 1e-7
    return torch.exp(-(shares * shares.log()).sum()).item()
