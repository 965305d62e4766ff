"""JPEGs decoded where the model is (`data.decode: device`): by nvJPEG on a GPU, through torchcodec.

Loader workers read, check and draw, and send on the bytes with the boxes of their crops; `fill` decodes a batch at once, crops,
resizes and flips on the device. What it cannot take (other formats, rotated or CMYK, clips) goes the usual way, into the
same batch. On a CPU the decoder is libjpeg-turbo with Pillow's pixels; nvJPEG's differ by a few levels, and so does resizing
in floating point: views are the same, their last bits are not.
"""

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
    except (ImportError, OSError, RuntimeError) as error:  # the last two: its libraries do not fit this torch
        raise UsageError(
            f"data.decode: device needs torchcodec ({str(error).splitlines()[0]}): pip install 'selfsight[fast]'"
        ) from None
    if device is not None:
        small = BytesIO()
        Image.new("RGB", (16, 16)).save(small, "JPEG")
        try:
            decode_jpeg([small.getvalue()], mode="RGB", device=device)
        except (OSError, RuntimeError, ValueError) as error:
            told = [*str(error).splitlines(), type(error).__name__][0]
            raise UsageError(
                f"data.decode: device: torchcodec does not decode on {device} ({told}); leave data.decode at workers"
            ) from None
    return decode_jpeg


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
    decode_jpeg = require_decoder()
    for start in range(0, len(encoded), AT_ONCE):
        some = encoded[start : start + AT_ONCE]
        try:
            images = decode_jpeg([one.body for one in some], mode=MODES[channels], device=device)
        except RuntimeError:  # of one of them; Pillow may take it all the same
            images = [_alone(one, channels).to(device) for one in some]
        yield from zip(images, some, strict=True)


def _alone(one: Encoded, channels: int) -> Tensor:
    try:
        return torch.from_numpy(decode(one.body, Form(channels)).copy())
    except BadSample as error:
        raise DataError(
            f"{one.where}: {error}; a device has no substitutes: go on with --data.decode workers --allow-change data.decode"
        ) from None
