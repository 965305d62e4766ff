"""Scientific images as arrays, told by their first bytes: what Pillow cannot read, or reads with 8 bits only.

| what is stored                 | what comes out, (C, H, W) or, with D planes, (C, D, H, W); one plane is an image            |
|--------------------------------|---------------------------------------------------------------------------------------------|
| TIFF                           | axes as the file names them (OME, ImageJ, tifffile): C and samples are channels, Z and T    |
|                                | planes, any other is channels (planes if `volumes`, or beside named channels); MINISWHITE   |
|                                | inverted, alpha composed over white, orientation applied                                    |
| .npy                           | 2 axes: H W. 3: C H W, or H W C if the last is the smallest and at most 32; with `volumes`  |
|                                | D H W. 4: C D H W                                                                           |
| DICOM                          | frames are planes; rescaled where the file says so (then float32), MONOCHROME1 inverted,    |
|                                | YCbCr as RGB                                                                                |
| NIfTI (.nii, .nii.gz)          | closest canonical orientation; planes from foot to head, rows from back to front, columns   |
|                                | from left to right; scaled where the file says so (then float32); a fourth axis is channels |
| PNG of 16 bits                 | uint16; alpha composed over white                                                           |

A TIFF of at most 8 bits that is one page, or has colours, is left to Pillow. float16 and float64 become float32; other
types stay as they are. Sizes are known from the header before a pixel is decoded: at most `MAX_PIXELS` a plane, and
`MAX_BYTES` in all. Nothing is unpickled. TIFF, DICOM, NIfTI and 16-bit colour need the extra `science`; without it, runs of
8 bits leave grey TIFF and colour PNG of 16 bits to Pillow.
"""

import importlib
import logging
import struct
import warnings
from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from selfsight.data.decode import DTYPES, MAX_PIXELS, BadSample, Form, open_image
from selfsight.errors import DataError

MAX_BYTES = 2**30  # of one decoded sample: a CT of 512 x 512 x 2,000 voxels of 16 bits has as many
PART = 2**19  # values that are converted at a time: 4 MiB in float64
LUMA = np.array([[0.299, 0.587, 0.114]], np.float32)
MAX_LAST = 32  # channels that a last axis of a .npy can be
ORIENTATION = 0x0112  # EXIF's and TIFF's tag
_PNG_CHANNELS = {0: 1, 2: 3, 4: 2, 6: 4}  # by colour type

Array = NDArray[Any]
Reader = Callable[[bytes, bool], Array | None]


class MissingLibrary(DataError):
    """A file whose library is not installed: no fault of the sample, so that nothing takes its place."""


def read_array(body: bytes, volumes: bool = False, eight: bool = False) -> Array | None:
    """A scientific image in its own dtype, (C, H, W) or (C, D, H, W); None where the bytes are of another kind.

    Args:
        body: a whole file.
        volumes: whether an axis that the file does not name stands for planes rather than channels.
        eight: whether 8 bits will do: None, too, for 16 bits that Pillow reads, if their library is not installed.

    Raises:
        BadSample: damaged, too large, of a kind that the table does not have, or with NaN or infinity.
        MissingLibrary: the library that reads it is not installed.
    """
    kind, reader = _reader(body)
    if reader is None:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the libraries' opinions on headers, once for each of a million files
            array = reader(body, volumes)
    except BadSample:
        raise
    except MissingLibrary:
        if eight and _pillow_reads(kind, body):
            return None
        raise
    except Exception as error:  # noqa: BLE001 - hostile bytes make these libraries raise anything
        raise BadSample(f"damaged {kind} ({type(error).__name__}: {' '.join(str(error).split())[:200]})") from None
    return None if array is None else _checked(array)


def _reader(body: bytes) -> tuple[str, Reader | None]:
    from selfsight.data import medical, tiff

    if body[:4] in {b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"}:
        return "TIFF", tiff.read_tiff
    if body[:6] == b"\x93NUMPY":
        return ".npy", _read_npy
    if body[128:132] == b"DICM":
        return "DICOM", medical.read_dicom
    if body[:2] == b"\x1f\x8b" or body[344:348] == b"n+1\0" or body[4:8] == b"n+2\0":
        return "NIfTI", medical.read_nifti
    if body[:8] == b"\x89PNG\r\n\x1a\n" and body[24:25] == b"\x10":
        return "PNG", _read_png
    return "", None


def _pillow_reads(kind: str, body: bytes) -> bool:
    """Whether Pillow, too, reads a file of these kinds, with 8 bits."""
    from selfsight.data.tiff import is_grey

    return kind == "PNG" or (kind == "TIFF" and is_grey(body))


def suffix_of(body: bytes) -> str | None:
    """The suffix by which shards hold a scientific file; None where Pillow knows it."""
    kind, _ = _reader(body)
    if kind == "NIfTI":
        from selfsight.data.medical import is_nifti

        return ("nii.gz" if body[:2] == b"\x1f\x8b" else "nii") if is_nifti(body) else None
    return {"TIFF": "tif", ".npy": "npy", "DICOM": "dcm"}.get(kind)


def _checked(array: Array) -> Array:
    """One plane without its axis, floats of 32 bits, all of them finite."""
    if array.ndim == 4 and array.shape[1] == 1:
        array = array[:, 0]
    if array.dtype.kind == "f":
        with np.errstate(over="ignore"):
            array = array.astype(np.float32, copy=False)
        if not np.isfinite(array).all():
            raise BadSample("holds NaN or infinity; replace them by a number before packing")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def claim(shape: Sequence[int], dtype: np.dtype[Any], planes: int = 1) -> None:
    """Refuse what a header says of itself, before a pixel is decoded.

    Args:
        shape: of the whole array; its last two axes are rows and columns.
        dtype: of the stored values.
        planes: how many such arrays there are.

    Raises:
        BadSample: an empty axis, too many pixels or bytes, or values that are no numbers.
    """
    if dtype.kind not in "uif" or dtype.itemsize > 8:
        raise BadSample(f"holds values of dtype {dtype}; integers and floats are read")
    if len(shape) < 2 or planes < 1 or min(shape) < 1:
        raise BadSample(f"has the shape {tuple(shape)}: no image")
    size = planes * prod(map(int, shape)) * dtype.itemsize
    if int(shape[-1]) * int(shape[-2]) > MAX_PIXELS:
        raise BadSample(f"a plane of {shape[-1]} x {shape[-2]} pixels, more than the {MAX_PIXELS:,} that are decoded")
    if size > MAX_BYTES:
        raise BadSample(
            f"{size / 2**30:,.1f} GiB when decoded, more than the {MAX_BYTES / 2**30:g} GiB that are allowed"
        )


def extra(module: str, what: str) -> Any:
    """A library of the extra `science`.

    Raises:
        MissingLibrary: it is not installed.
    """
    try:
        found = importlib.import_module(module)
    except ImportError:
        raise MissingLibrary(f"{what}: needs {module}; pip install 'selfsight[science]'") from None
    for name in (module, "nibabel.global"):  # what they log of a damaged file is in the error, too
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return found


def fit(array: Array, form: Form) -> Array:
    """An array of a file's own dtype as the run takes it: its channels, its depth.

    One channel asked as three is repeated; unsigned colours asked as one become ITU-R 601-2's luma, as Pillow's do.

    Raises:
        BadSample: other numbers of channels, or values whose place in the run's depth is not known.
    """
    channels = len(array)
    if channels == 1 and form.channels == 3:
        array = np.broadcast_to(array, (3, *array.shape[1:]))
    elif channels == 3 and form.channels == 1 and array.dtype.kind == "u":
        array = np.rint(np.tensordot(LUMA, array, 1)).astype(array.dtype)
    elif channels != form.channels:
        raise BadSample(f"has {shape_text(array)}; the encoder takes {form.channels}")
    return to_depth(array, form.depth, form.range)


def to_depth(array: Array, depth: int, range: tuple[float, float] | None = None) -> Array:
    """An array of a file's own dtype as the run's: uint8, uint16 or float32 for a `depth` of 8, 16 or 32.

    | from, to       | 8                                  | 16                                           | 32         |
    |----------------|------------------------------------|----------------------------------------------|------------|
    | uint8          | itself                             | x 257                                        | same value |
    | uint16         | / 257, or `range` spread over 8    | itself                                       | same value |
    | others         | `range` spread over 8              | same value, rounded, if `range` lies within  | same value |

    What lies outside the range is clipped to it.

    Raises:
        BadSample: signed, wide or floating values without the range that would give them a place.
    """
    wanted = np.dtype(DTYPES[depth])
    if array.dtype == wanted:
        return array
    if depth == 32:
        return array.astype(np.float32)
    if array.dtype == np.uint8:
        return array.astype(np.uint16) * np.uint16(257)
    if (range is None and array.dtype != np.uint16) or (
        range and depth == 16 and not 0 <= range[0] < range[1] <= 65535
    ):
        raise BadSample(
            f"holds {array.dtype} values, and its range is unknown or not within {depth} bits; set data.depth 32 and "
            "data.range (selfsight shards check SPEC --stats shows the values)"
        )
    made = np.empty_like(array, wanted)
    for rows in row_slices(array):
        np.rint(_placed(array[..., rows, :], depth, range), out=made[..., rows, :], casting="unsafe")
    return made


def _placed(array: Array, depth: int, range: tuple[float, float] | None) -> Array:
    """Values on the scale of 8 or 16 bits, not yet rounded."""
    if range is None:
        return array.astype(np.float32) / 257
    values = np.clip(array, *range).astype(np.float32)
    return (values - range[0]) * (255 / (range[1] - range[0])) if depth == 8 else values


def row_slices(array: Array) -> Iterator[slice]:
    """The rows of (..., H, W) in parts of some MiB, so that of a volume of a gigabyte no copy in float64 is made."""
    height = array.shape[-2]
    step = max(1, PART // max(1, array.size // max(1, height)))
    return (slice(top, top + step) for top in range(0, height, step))


def shape_text(array: Array) -> str:
    """`13 channels of uint16`, with the planes if there are any: for messages and counts."""
    planes = f", {array.shape[1]} planes" if array.ndim == 4 else ""
    return f"{array.shape[0]} channel{'s' * (array.shape[0] != 1)} of {array.dtype}{planes}"


def over_white(array: Array) -> Array:
    """Unsigned channels, the last of which is alpha, composed over white: (C + 1, ...) to (C, ...)."""
    top = np.iinfo(array.dtype).max
    alpha = array[-1:].astype(np.float32) / top
    return np.rint(array[:-1] * alpha + top * (1 - alpha)).astype(array.dtype)


def upright(array: Array, orientation: int) -> Array:
    """(..., H, W) as EXIF's orientation 1 to 8 says that it is to be seen."""
    if orientation in (5, 6, 7, 8):
        array = array.swapaxes(-1, -2)
    if orientation in (3, 4, 7, 8):
        array = array[..., ::-1, :]
    return array[..., ::-1] if orientation in (2, 3, 6, 7) else array


def _read_npy(body: bytes, volumes: bool) -> Array:
    file = BytesIO(body)
    version = np.lib.format.read_magic(file)
    if version not in {(1, 0), (2, 0)}:
        raise BadSample(f".npy of version {version}; 1.0 and 2.0 are read")
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = header(file)
    if dtype.hasobject:
        raise BadSample("a .npy of Python objects, which are never unpickled")
    claim(shape[-2:], dtype)
    count = prod(shape)
    if len(body) - file.tell() != count * dtype.itemsize:
        raise BadSample(f"a .npy of {shape} {dtype} with {len(body) - file.tell()} bytes of values; truncated?")
    array = np.frombuffer(body, dtype, count, file.tell()).reshape(shape, order="F" if fortran else "C")
    array = _npy_axes(array, volumes)
    claim(array.shape, dtype)
    return array


def _npy_axes(array: Array, volumes: bool) -> Array:
    if array.ndim == 2:
        return array[None]
    if array.ndim == 3 and volumes:
        return array[None]
    if array.ndim == 3:
        last = array.shape[2] <= MAX_LAST and array.shape[2] < min(array.shape[:2])
        return np.moveaxis(array, 2, 0) if last else array
    if array.ndim == 4:
        return array
    raise BadSample(f"a .npy of {array.ndim} axes; 2 (H W), 3 (C H W) and 4 (C D H W) are read")


def _read_png(body: bytes, volumes: bool) -> Array:
    width, height, _, colour = struct.unpack(">IIBB", body[16:26])
    claim((_PNG_CHANNELS[colour], height, width), np.dtype(np.uint16))
    image = open_image(body)
    if colour == 0:
        image.load()
        pixels = np.asarray(image).astype(np.uint16)
        if "transparency" in image.info:  # one grey value that stands for no colour
            pixels[pixels == image.info["transparency"]] = 65535
        array = pixels[None]
    else:
        pixels = extra("imagecodecs", "a PNG of 16 bits in colour").png_decode(body)
        array = np.moveaxis(pixels, -1, 0)
        array = over_white(array) if len(array) in (2, 4) else array
    return upright(array, image.getexif().get(ORIENTATION, 1) if b"eXIf" in body else 1)
