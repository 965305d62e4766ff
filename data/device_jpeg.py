"""JPEGs decoded where the model is (`data.decode: device`): by nvJPEG on a GPU, through torchcodec.

Loader workers read, check and draw, and send on the bytes with the boxes of their crops; `fill` decodes a batch at once, crops,
resizes and flips on the device. What it cannot take (other formats, rotated or CMYK, clips) goes the usual way, into the
same batch. On a CPU the decoder is libjpeg-turbo with Pillow's pixels; nvJPEG's differ by a few levels, and so does resizing
in floating point: views are the same, their last bits are not.
"""

import re
from collections.abc import Iterator, Sequence
from io import BytesIO
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from selfsight.data.decode import MAX_PIXELS, BadSample, Form, decode
from selfsight.data.jpeg import read_header
from selfsight.errors import DataError, UsageError

AT_ONCE = 32  # images whose full pixels lie on the device
MODES = {1: "GRAY", 3: "RGB"}
Box = tuple[int, int, int, int]  # left, top, right, bottom


class Encoded(NamedTuple):
    """An image of a batch that is not decoded yet."""

    slot: int
    """Its place in the batch."""
    body: bytes
    boxes: list[Box]
    """What each view shows of it."""
    flips: list[bool]
    where: str
    """Shard and offset, for messages."""


def size_of(body: bytes, form: Form) -> tuple[int, int] | None:
    """Width and height of what the device can decode; None: the usual way."""
    header = read_header(body)
    if header is None or form != Form(header.components) or not header.upright:
        return None
    return (header.width, header.height) if header.width * header.height <= MAX_PIXELS else None


def require_decoder(device: torch.device | None = None) -> Any:
    """torchcodec's function.

    Args:
        device: where it is tried on a small image; None: nowhere.

    Raises:
        UsageError: it is not installed, or cannot decode there: then every image would go the slow way of a damaged one.
    """
    try:
        from torchcodec.decoders import decode_jpeg
    except ModuleNotFoundError as error:
        raise UsageError(
            f"data.decode: device needs torchcodec ({_told(error)}): pip install 'selfsight[fast]'"
        ) from None
    except (ImportError, OSError, RuntimeError) as error:  # its libraries want another torch, or another CUDA
        beside = f"torch {torch.__version__} (CUDA {torch.version.cuda or 'none'})"
        raise UsageError(
            f"data.decode: device: torchcodec does not load beside {beside}: {_told(error)}; install the torchcodec that was "
            "built for these, or leave data.decode at workers"
        ) from None
    if device is not None:
        small = BytesIO()
        Image.new("RGB", (16, 16)).save(small, "JPEG")
        try:
            decode_jpeg([small.getvalue()], mode="RGB", device=device)
        except (OSError, RuntimeError, ValueError) as error:
            raise UsageError(
                f"data.decode: device: torchcodec does not decode on {device} ({_told(error)}); leave data.decode at workers"
            ) from None
    return decode_jpeg


def _told(error: Exception) -> str:
    """Its first line, without the place in the library's source that it may begin with."""
    first = next(iter(str(error).splitlines()), "") or type(error).__name__
    return re.sub(r"^.*\.(cpp|h|cu):\d+, ", "", first)


def fill(views: Sequence[Tensor], encoded: Sequence[Encoded], interpolation: str) -> None:
    """Decode images and write their views into `views`, V tensors (B, C, S, S) uint8, on the device of these.

    Raises:
        DataError: an image that is damaged. Its place cannot be taken by another here: it is found by `shards check`.
    """
    for image, one in _decoded(encoded, views[0].device, views[0].shape[1]):
        for view, (left, top, right, bottom), flip in zip(views, one.boxes, one.flips, strict=True):
            crop = image[None, :, top:bottom, left:right].float()
            made = F.interpolate(crop, view.shape[-2:], mode=interpolation, antialias=True)[0]
            made = made.round_().clamp_(0, 255)  # bicubic overshoots
            view[one.slot] = (made.flip(-1) if flip else made).to(view.dtype)


def _decoded(encoded: Sequence[Encoded], device: torch.device, channels: int) -> Iterator[tuple[Tensor, Encoded]]:
    for start in range(0, len(encoded), AT_ONCE):
        some = encoded[start : start + AT_ONCE]
        images = _by_device([one.body for one in some], device, channels)
        if images is None:  # for one of them: the pixels of the others must not depend on their neighbours
            alone = [_by_device([one.body], device, channels) for one in some]
            images = [
                found[0] if found else _by_pillow(one, device, channels) for found, one in zip(alone, some, strict=True)
            ]
        yield from zip(images, some, strict=True)


def _by_device(bodies: list[bytes], device: torch.device, channels: int) -> list[Tensor] | None:
    try:
        return [*require_decoder()(bodies, mode=MODES[channels], device=device)]
    except torch.OutOfMemoryError:  # no fault of an image's
        raise
    except RuntimeError:
        return None


def _by_pillow(one: Encoded, device: torch.device, channels: int) -> Tensor:
    try:
        return torch.from_numpy(decode(one.body, Form(channels)).copy()).to(device)
    except BadSample as error:
        raise DataError(
            f"{one.where}: {error}; a device has no substitutes: go on with --data.decode workers --allow-change data.decode"
        ) from None
