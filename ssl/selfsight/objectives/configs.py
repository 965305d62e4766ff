"""The fields of every built-in objective. They stand apart from the objectives so that `--help` need not import torch."""

from typing import Literal

from pydantic import Field

from selfsight.data.views import View
from selfsight.section import Section


class ObjectiveConfig(Section):
    """What all objectives have: a name."""

    name: str
    """Which objective."""


class MAEConfig(ObjectiveConfig):
    """Masked autoencoder (He et al. 2022, arXiv 2111.06377): rebuild the pixels of hidden patches from the visible ones."""

    name: Literal["mae"] = "mae"
    """Which objective."""
    mask_ratio: float = Field(0.75, gt=0, lt=1)
    """Share of the patches that is hidden."""
    decoder_width: int = Field(512, ge=8)
    """Width of the decoder's tokens."""
    decoder_depth: int = Field(8, ge=1)
    """Transformer blocks in the decoder."""
    decoder_heads: int = Field(16, ge=1)
    """Attention heads in the decoder."""
    normalize_patches: bool = True
    """Each target patch has mean 0 and variance 1, which puts detail before brightness."""
    view: View = View()
    """The one view."""
