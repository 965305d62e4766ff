"""Ways to make an image worse, on plain tensors: each a pure function of the images and of draws that are given.

Images are (B, C, H, W), or (B, C, D, H, W) with planes, which are all changed alike.
"""

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

# Hendrycks and Dietterich 2019, arXiv 1903.12261, the five severities of ImageNet-C (make_imagenet_c.py)
NOISE = (0.08, 0.12, 0.18, 0.26, 0.38)
"""Standard deviations of Gaussian noise, of pixels 0..1."""
BLUR = (1.0, 2.0, 3.0, 4.0, 6.0)
"""Standard deviations of a Gaussian, pixels of an image of 224; of other sizes in proportion."""
CONTRAST = (0.4, 0.3, 0.2, 0.1, 0.05)
"""What is left of each pixel's distance from its channel's mean."""
STRENGTHS = {"noise": NOISE, "blur": BLUR, "contrast": CONTRAST}
BLUR_SIDE = 224
BLUR_LEAST = 0.25  # pixels: a neighbour then has exp(-8) of the weight, less than a level of 8 bits
TRUNCATE = 4.0  # deviations at which the Gaussian ends, as in scipy and scikit-image


def corrupt(images: Tensor, kind: str, strength: float, draws: Tensor | None = None) -> Tensor:
    """A corruption of pixels 0..1; what comes out is 0..1, too.

    Args:
        kind: "noise", "blur" or "contrast".
        strength: of `STRENGTHS`, or another.
        draws: for noise, standard normal ones of the images' shape.

    Raises:
        KeyError: another kind.
    """
    made = {
        "noise": lambda: images if draws is None else images + strength * draws,
        "blur": lambda: blurred(images, blur_pixels(strength, images.shape[-1])),
        "contrast": lambda: faded(images, strength),
    }
    return made[kind]().clamp(0, 1)


def blur_pixels(strength: float, size: int) -> float:
    """The deviation in pixels of an image of this size."""
    return strength * size / BLUR_SIDE


def severities(kind: str, size: int) -> list[float]:
    """The strengths that change an image of this size: a small one is not blurred by all of them."""
    return [one for one in STRENGTHS[kind] if kind != "blur" or blur_pixels(one, size) >= BLUR_LEAST]


def blurred(images: Tensor, sigma: float) -> Tensor:
    """Convolved with a Gaussian of `sigma` pixels that ends at 4 sigma; borders are repeated."""
    radius = int(TRUNCATE * sigma + 0.5)
    if radius == 0:
        return images
    places = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    kernel = (-0.5 * (places / sigma) ** 2).exp()
    kernel = kernel / kernel.sum()
    planes = images.flatten(0, -3)[:, None]
    planes = F.conv2d(F.pad(planes, (radius, radius, 0, 0), "replicate"), kernel.view(1, 1, 1, -1))
    planes = F.conv2d(F.pad(planes, (0, 0, radius, radius), "replicate"), kernel.view(1, 1, -1, 1))
    return planes[:, 0].view_as(images)


def faded(images: Tensor, share: float) -> Tensor:
    """Each pixel brought to this share of its distance from the mean of its channel in its image."""
    mean = images.mean(tuple(range(2, images.ndim)), keepdim=True)
    return mean + share * (images - mean)


def occlude(images: Tensor, share: float, patch: int, draws: Tensor, value: float = 0.0) -> Tensor:
    """So large a share of the patches set to a value (of normalised images 0: the mean colour), those with the least draws.

    Random PatchDrop of Naseer et al. 2021, arXiv 2105.10497, section 3.1.

    Args:
        draws: (B, h w) of the patches of a plane in row-major order.
    """
    rows = images.shape[-2] // patch
    gone = dropped(draws, share).view(len(images), rows, -1)
    gone = gone.repeat_interleave(patch, 1).repeat_interleave(patch, 2)
    return images.masked_fill(gone.view(len(images), *[1] * (images.ndim - 3), *gone.shape[1:]), value)


def dropped(draws: Tensor, share: float) -> Tensor:
    """Which of N patches go, (B, N) bool: round(share N) of them, but never all."""
    ranks = draws.argsort(1).argsort(1)
    return ranks < min(round(share * draws.shape[1]), draws.shape[1] - 1)


def kept(draws: Tensor, share: float) -> Tensor:
    """The patches that `dropped` leaves, (B, K) in order."""
    stay = ~dropped(draws, share)
    return stay.nonzero()[:, 1].view(len(draws), -1)


def permute_patches(images: Tensor, grid: int, order: Tensor) -> Tensor:
    """The image cut into grid x grid equal tiles, which are put in another order (Naseer et al. 2021, section 3.3).

    Args:
        order: (B, grid * grid): which tile comes to each place.

    Raises:
        ValueError: sides that the grid does not divide.
    """
    if images.shape[-1] % grid or images.shape[-2] % grid:
        raise ValueError(f"{images.shape[-2]} x {images.shape[-1]} pixels do not divide into {grid} x {grid} tiles")
    tiles = rearrange(images, "b ... (g h) (k w) -> b (g k) ... h w", g=grid, k=grid)
    tiles = tiles[torch.arange(len(images), device=images.device)[:, None], order]
    return rearrange(tiles, "b (g k) ... h w -> b ... (g h) (k w)", g=grid, k=grid)


def shift(images: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Each image moved by so many pixels, (B,) integers of either sign; what comes in is mirrored at the border.

    Raises:
        ValueError: a shift of as many pixels as the image has.
    """
    made = images
    for axis, by in ((-2, down), (-1, right)):
        size = images.shape[axis]
        if int(by.abs().max()) >= size:
            raise ValueError(f"shifts of up to {int(by.abs().max())} pixels, of images of {size}")
        places = (torch.arange(size, device=images.device) - by[:, None].to(images.device)).abs()
        places = torch.where(places >= size, 2 * (size - 1) - places, places)
        shape = [len(images), *[1] * (images.ndim - 1)]
        shape[axis] = size
        made = made.gather(made.ndim + axis, places.view(shape).expand_as(made))
    return made
