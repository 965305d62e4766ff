"""What the patches of an image hold: attention of the last block over the image, and patch tokens as colours."""

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from selfsight.attention import attention_maps
from selfsight.encoder import Encoder, evaluating
from selfsight.pictures import EXACT, SHOWN, Pixels, Strip, array, picture

HEADS = 6  # of the last block that get a row of their own
MOST_BYTES = 2**30  # of one image's attention, in all blocks
_DIM = 0.45  # how much of the image is left under a map
# Dark to bright as evenly as the eye takes it: five stops of matplotlib's inferno.
_INFERNO = np.array([(0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)], np.float64)


def attention_strips(encoder: Encoder, images: Tensor) -> list[Strip]:
    """Attention over normalised images (B, ...), mean over heads and head by head; none where there is none to be had."""
    if not encoder.plain or attention_bytes(encoder) > MOST_BYTES:
        return []
    maps = torch.cat([last_attention(encoder, image[None]) for image in images])
    query = "the class token" if pools_class_token(encoder) else "all patches on average"
    shown = [(f"attention of {query} in the last block, mean over {maps.shape[1]} heads", maps.mean(1), False)]
    for head in range(min(HEADS, maps.shape[1]) if maps.shape[1] > 1 else 0):
        shown.append((f"attention of head {head + 1}", maps[:, head], True))
    made = encoder.preprocessing
    strips = []
    for caption, values, detail in shown:
        pictures = []
        for number, (image, value) in enumerate(zip(images, values, strict=True), 1):
            heat = grid_of(encoder, value[:, None])[..., 0]
            pictures.append(picture(overlay(array(image, made), heat), f"{caption}, image {number}"))
        strips.append(Strip(caption, pictures, detail))
    return strips


def attention_bytes(encoder: Encoder) -> int:
    """What one image's attention takes, all blocks and heads."""
    heads: int = encoder.config.heads or max(1, encoder.width // 64)
    return 4 * len(encoder.blocks) * heads * (encoder.patches + encoder.prefix_tokens) ** 2


def last_attention(encoder: Encoder, images: Tensor) -> Tensor:
    """What each patch gets of the last block's attention, from the class token or from all patches on average.

    From what the encoder's feature is made of: a class token that nobody reads has learned to look at nothing.

    Returns:
        (B, heads, N).
    """
    last, prefix = attention_maps(encoder, images)[-1].float(), encoder.prefix_tokens
    taken = last[:, :, 0] if pools_class_token(encoder) else last[:, :, prefix:].mean(2)
    return taken[..., prefix:]


def pools_class_token(encoder: Encoder) -> bool:
    """Whether the class token is part of the encoder's feature."""
    return encoder.has_class_token and encoder.pool != "mean"


@torch.no_grad()
def token_strips(encoder: Encoder, images: Tensor) -> list[Strip]:
    """The first three principal components of all shown images' patch tokens as red, green and blue (DINOv2, figure 1)."""
    with evaluating(encoder):
        patches = encoder(images).patches.float()
    if not patches.isfinite().all() or _grid(encoder, patches.shape[1]) is None:
        return []
    colours = principal_colours(patches)
    caption = "patch tokens: three principal components as colours"
    pictures = [
        picture(enlarged((255 * grid_of(encoder, one)).round().astype(np.uint8)), f"{caption}, image {number}")
        for number, one in enumerate(colours, 1)
    ]
    return [Strip(caption, pictures)]


def principal_colours(patches: Tensor) -> Tensor:
    """Tokens (B, N, D) on their three principal axes, over all images: (B, N, 3) in 0..1.

    0 and 1 are the 2nd and 98th percentile; an axis points where its largest loading is positive, so that colours are a
    function of the tokens alone.
    """
    flat = patches.flatten(0, 1).double().cpu()
    flat = flat - flat.mean(0)
    _, axes = torch.linalg.eigh(flat.T @ flat)
    axes = axes.flip(1)[:, :3]
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    places = flat @ axes
    low, high = places.quantile(0.02, dim=0), places.quantile(0.98, dim=0)
    scaled = ((places - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    scaled = torch.nn.functional.pad(scaled, (0, 3 - scaled.shape[1]), value=0.5)
    return scaled.view(*patches.shape[:2], 3)


def grid_of(encoder: Encoder, values: Tensor) -> NDArray[np.float64]:
    """Values of an image's patches (N, C) where they lie: (H, W, C); a volume's middle plane, the mean of channel tokens."""
    grid = _grid(encoder, len(values))
    assert grid is not None
    planes = values.double().cpu().view(*grid, -1).numpy()
    return planes.mean(0) if encoder.config.channel_tokens else planes[len(planes) // 2]


def _grid(encoder: Encoder, count: int) -> tuple[int, int, int] | None:
    """Planes, rows, columns of so many tokens; None if they are no grid."""
    side = encoder.preprocessing.image_size // encoder.stride
    planes = encoder.planes if encoder.volumetric else 1
    return (planes, side, side) if planes * side * side == count else None


def overlay(image: Pixels, heat: NDArray[np.float64]) -> Pixels:
    """A map (h, w) in the colours of heat over an image, which stays visible in grey; the map's own range is shown."""
    low, high = heat.min(), heat.max()
    level = (heat - low) / (high - low) if high > low else np.zeros_like(heat)
    stops = np.linspace(0, 1, len(_INFERNO))
    colours = np.stack([np.interp(level, stops, channel) for channel in _INFERNO.T], -1)
    side = (image.shape[1], image.shape[0])
    colours = np.asarray(Image.fromarray(colours.round().astype(np.uint8)).resize(side, Image.Resampling.NEAREST))
    grey = image.mean(-1) if image.ndim == 3 else image
    return (_DIM * grey[..., None] + (1 - _DIM) * colours).round().clip(0, 255).astype(np.uint8)


def enlarged(pixels: Pixels) -> Pixels:
    """Small grids as they are, the browser enlarges them; large ones to what the page shows."""
    if max(pixels.shape[:2]) <= EXACT:
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((SHOWN, SHOWN), Image.Resampling.NEAREST))
