"""DICOM and NIfTI as arrays."""

import gzip
import zlib
from io import BytesIO
from typing import Any

import numpy as np

from selfsight.data.decode import BadSample, open_image
from selfsight.data.formats import MAX_BYTES, Array, claim, extra

DEFLATED = b"1.2.840.10008.1.2.1.99"  # the transfer syntax whose headers, too, are compressed, without a bound
PLAIN = {"1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.5"}  # the last: RLE
JPEG, JPEG_2000 = "1.2.840.10008.1.2.4.50", {"1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91"}
COLOURS = {"MONOCHROME1", "MONOCHROME2", "RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT"}
GZIP = b"\x1f\x8b"
HEADER = 540  # bytes of a NIfTI-2 header; NIfTI-1's has 348


def read_dicom(body: bytes, volumes: bool) -> Array:
    """See `selfsight.data.formats`."""
    if DEFLATED in body:
        raise BadSample("a deflated DICOM, whose size is not known before it is unpacked; store it uncompressed")
    pydicom = extra("pydicom", "DICOM")
    data = pydicom.dcmread(BytesIO(body))
    syntax = str(data.file_meta.TransferSyntaxUID)
    if syntax not in {*PLAIN, JPEG, *JPEG_2000}:
        raise BadSample(
            f"a DICOM with the transfer syntax {syntax}; read are uncompressed, RLE, JPEG baseline and JPEG 2000"
        )
    if data.get("PhotometricInterpretation") not in COLOURS:
        raise BadSample(f"a DICOM of the kind {data.get('PhotometricInterpretation')}; grey and RGB are read")
    samples, frames = int(data.SamplesPerPixel), int(data.get("NumberOfFrames") or 1)
    claim((samples, frames, data.Rows, data.Columns), np.dtype(f"u{max(1, int(data.BitsAllocated) // 8)}"))
    if syntax not in PLAIN:
        _refuse_other_sizes(data, syntax, samples, frames)
    pixels = data.pixel_array.reshape(frames, data.Rows, data.Columns, samples)
    if data.PhotometricInterpretation == "MONOCHROME1":  # its lowest value is white
        top = (1 << int(data.BitsStored)) - 1
        pixels = ~pixels if data.PixelRepresentation else (top - pixels).astype(pixels.dtype)
    return np.moveaxis(_rescaled(pixels, data), -1, 0)


def _refuse_other_sizes(data: Any, syntax: str, samples: int, frames: int) -> None:
    """A JPEG or JPEG 2000 in a DICOM has a size of its own, which decoders believe."""
    encaps = extra("pydicom.encaps", "DICOM")
    for frame in encaps.generate_frames(data.PixelData, number_of_frames=frames):
        if syntax == JPEG:
            width, height = open_image(frame).size
            found = len(open_image(frame).getbands())
        else:
            width, height, found = _codestream(frame)
        if (found, height, width) != (samples, data.Rows, data.Columns):
            raise BadSample(
                f"a DICOM of {data.Columns} x {data.Rows} pixels with a picture of {width} x {height} in it"
            )


def _codestream(frame: bytes) -> tuple[int, int, int]:
    """Width, height and components that the SIZ marker of a JPEG 2000 codestream tells (ISO 15444-1, A.5.1)."""
    if frame[:4] != b"\xff\x4f\xff\x51":
        raise BadSample("a DICOM whose JPEG 2000 is no codestream")
    right, bottom, left, top = (int.from_bytes(frame[at : at + 4], "big") for at in (8, 12, 16, 20))
    return right - left, bottom - top, int.from_bytes(frame[40:42], "big")


def _rescaled(pixels: Array, data: Any) -> Array:
    """Stored values (D, H, W, S) in the units of the modality (PS3.3, C.11.1), where the file has a line for them."""
    if "ModalityLUTSequence" in data:
        raise BadSample("a DICOM with a modality table; a rescale slope and intercept are read")
    frames = data.get("PerFrameFunctionalGroupsSequence") or []
    shared = data.get("SharedFunctionalGroupsSequence") or [{}]
    lines = [_line(data) or _line(shared[0]) or _line(frame) for frame in frames or [{}]]
    if set(lines) <= {None, (1.0, 0.0)}:
        return pixels
    slopes, intercepts = np.array([line or (1.0, 0.0) for line in lines], np.float32).T.reshape(2, -1, 1, 1, 1)
    return pixels.astype(np.float32) * slopes + intercepts


def _line(part: Any) -> tuple[float, float] | None:
    """Slope and intercept that a data set, or a functional group of an enhanced one, has."""
    inner = part.get("PixelValueTransformationSequence")
    part = inner[0] if inner else part
    if part.get("RescaleSlope") is None:
        return None
    return float(part.get("RescaleSlope")), float(part.get("RescaleIntercept") or 0)


def is_nifti(body: bytes) -> bool:
    """Whether the bytes, or what is in their gzip, are a NIfTI of one file."""
    try:
        head = _head(body)
    except (OSError, EOFError, zlib.error):
        return False
    return head[344:348] == b"n+1\0" or head[4:8] == b"n+2\0"


def read_nifti(body: bytes, volumes: bool) -> Array | None:
    """See `selfsight.data.formats`; None for gzip of something else."""
    if not is_nifti(body):
        return None
    packed, head = body[:2] == GZIP, _head(body)
    nibabel = extra("nibabel", "NIfTI")
    kind = nibabel.Nifti1Image if head[344:348] == b"n+1\0" else nibabel.Nifti2Image
    header = kind.header_class.from_fileobj(BytesIO(head))
    shape, dtype = header.get_data_shape(), header.get_data_dtype()
    if not 2 <= len(shape) <= 4:
        raise BadSample(f"a NIfTI of {len(shape)} axes; 2 (x, y), 3 (x, y, z) and 4 (x, y, z, channel) are read")
    claim(tuple(reversed(shape[:2])), dtype)
    claim(tuple(reversed(shape)), dtype)
    needed = int(header.get_data_offset()) + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if needed > 2 * MAX_BYTES:
        raise BadSample(f"a NIfTI whose values begin at byte {header.get_data_offset()}")
    whole = _unpacked(body, needed + 1) if packed else body
    if len(whole) < needed:
        raise BadSample(f"a NIfTI of {needed} bytes with {len(whole)}; truncated")
    image = kind.from_bytes(whole)
    values, (slope, intercept) = image.dataobj.get_unscaled(), header.get_slope_inter()
    if (slope, intercept) not in {(None, None), (1.0, 0.0)}:
        values = values.astype(np.float32) * np.float32(slope) + np.float32(intercept)
    values = values.reshape(values.shape + (1,) * (4 - values.ndim))
    return nibabel.apply_orientation(values, nibabel.io_orientation(image.affine)).transpose(3, 2, 1, 0)


def _head(body: bytes) -> bytes:
    return _unpacked(body, HEADER) if body[:2] == GZIP else body[:HEADER]


def _unpacked(body: bytes, most: int) -> bytes:
    """The first bytes of what a gzip holds: a megabyte of it can hold a gigabyte."""
    with gzip.GzipFile(fileobj=BytesIO(body)) as file:
        return file.read(most)
