"""What images are compared by, beyond differences of pixels."""

import torch
from torch import Tensor
from torch.nn import functional as F

from selfsight.objectives.base import exact
from selfsight.preprocessing import Preprocessing

WINDOW, SIGMA = 11, 1.5  # of SSIM's Gaussian window
SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # exponents of MS-SSIM, from fine to coarse
_C1, _C2 = 0.01**2, 0.03**2  # for pixels in 0..1


def gradient_magnitude(images: Tensor) -> Tensor:
    """Length of the Sobel gradient of every channel: (B, C, H, W), borders repeated; of volumes (B, C, D, H, W) in each plane."""
    steps = torch.arange(
        -1.0, 2.0, dtype=images.dtype, device=images.device
    )  # made there: a copy might wait for the device
    smooth, slope = (2 - steps.abs()) / 4, steps / 2
    planes = images.flatten(1, -3)
    padded = F.pad(planes, (1, 1, 1, 1), mode="replicate").flatten(0, 1)[:, None]
    kernels = torch.stack([smooth[:, None] * slope, slope[:, None] * smooth])[:, None]
    with exact(padded):
        across, down = F.conv2d(padded, kernels).unbind(1)
    return (across.square() + down.square() + 1e-12).sqrt().view_as(images)


def ms_ssim(a: Tensor, b: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Mean multi-scale structural similarity (Wang et al. 2003) of normalised images (B, C, H, W), compared in 0..1.

    Images too small for five scales of an 11-pixel window are compared at as many as fit, their exponents scaled to the
    same sum of 1; an image smaller than the window with a window of its size. Of volumes (B, C, D, H, W), the mean over
    planes.
    """
    a, b = (preprocessing.pixels(x).flatten(1, -3) for x in (a, b))
    window = min(WINDOW, min(a.shape[-2:]))
    scales = 1
    while scales < len(SCALES) and min(a.shape[-2:]) // 2**scales >= window:
        scales += 1
    similarity = torch.ones(a.shape[:2], device=a.device)
    for scale in range(scales):
        with exact(a):
            luminance, structure = _ssim(a, b, window)
        last = scale == scales - 1
        # Below 0 there is no root, and at 0 no finite gradient of one.
        value = (luminance * structure if last else structure).mean((2, 3)).clamp(min=1e-6)
        similarity = similarity * value ** (SCALES[scale] / sum(SCALES[:scales]))
        if not last:
            a, b = (F.avg_pool2d(x, 2) for x in (a, b))
    return similarity.mean()


def _ssim(a: Tensor, b: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The maps of luminance and of contrast x structure, over windows that lie inside the image."""
    places = torch.arange(size, device=a.device, dtype=a.dtype) - (size - 1) / 2
    window = (-0.5 * (places / SIGMA).square()).exp()
    window = window / window.sum()

    def blur(x: Tensor) -> Tensor:
        channels = x.shape[1]
        x = F.conv2d(x, window.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)
        return F.conv2d(x, window.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)

    mean_a, mean_b = blur(a), blur(b)
    variances = blur(a * a) - mean_a**2 + blur(b * b) - mean_b**2
    luminance = (2 * mean_a * mean_b + _C1) / (mean_a**2 + mean_b**2 + _C1)
    return luminance, (2 * (blur(a * b) - mean_a * mean_b) + _C2) / (variances + _C2)
