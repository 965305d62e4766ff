"""Scientific files that their own libraries wrote, against the arrays that were given to them; and hostile ones."""

import gzip
import os
import struct
import sys
import zlib
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import imagecodecs
import nibabel
import numpy as np
import pydicom
import pytest
import tifffile
from openjpeg import encode
from PIL import Image
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate

from selfsight.data import formats
from selfsight.data.check import own_pixels
from selfsight.data.crops import ViewMaker
from selfsight.data.decode import BadSample, Form, decode
from selfsight.data.formats import MissingLibrary, over_white, read_array, shape_text, to_depth, upright
from selfsight.data.packing import write_shards
from selfsight.data.picture import Picture
from selfsight.data.views import View
from selfsight.errors import DataError
from selfsight.train import pretrain

RNG = np.random.default_rng(5)
BANDS = RNG.integers(0, 65536, (13, 20, 24)).astype(np.uint16)
STACK = RNG.integers(0, 65536, (4, 20, 24)).astype(np.uint16)
WIDE = RNG.integers(0, 65536, (64, 80)).astype(np.uint16)
RLE, JPEG_2000, JPEG = "1.2.840.10008.1.2.5", "1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.50"
EXPLICIT = "1.2.840.10008.1.2.1"


def tiff(array: Any, **how: Any) -> bytes:
    out = BytesIO()
    if not {"photometric", "imagej"} & set(how):
        how["photometric"] = "rgb" if array.shape[-1] == 3 else "minisblack"
    tifffile.imwrite(out, array, **how)
    return out.getvalue()


def npy(array: Any, **how: Any) -> bytes:
    out = BytesIO()
    np.save(out, array, **how)
    return out.getvalue()


def png(image: Image.Image, **how: Any) -> bytes:
    out = BytesIO()
    image.save(out, "PNG", **how)
    return out.getvalue()


def dicom(pixels: Any, kind: str = "MONOCHROME2", syntax: str = EXPLICIT, frames: int = 1, **more: Any) -> bytes:
    """`pixels`: (frames,) rows, columns (, samples); or a list of encoded frames with Rows and Columns in `more`."""
    data = pydicom.Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = syntax
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = "1.2.3.4"
    if isinstance(pixels, list):
        data.PixelData, bits, signed, samples = encapsulate(pixels), 8, 0, 1
    else:
        shape = pixels.shape[1:] if frames > 1 else pixels.shape
        data.Rows, data.Columns = shape[:2]
        samples = shape[2] if len(shape) > 2 else 1
        bits, signed = 8 * pixels.dtype.itemsize, int(pixels.dtype.kind == "i")
        data.PixelData = pixels.tobytes()
    data.BitsAllocated = data.BitsStored = bits
    data.HighBit, data.PixelRepresentation, data.SamplesPerPixel = bits - 1, signed, samples
    data.PhotometricInterpretation, data.NumberOfFrames = kind, frames
    if samples > 1:
        data.PlanarConfiguration = 0
    for name, value in more.items():
        setattr(data, name, value)
    if syntax == RLE:
        data.file_meta.TransferSyntaxUID = EXPLICIT
        data.compress(RLE)
    out = BytesIO()
    data.save_as(out, enforce_file_format=True)
    return out.getvalue()


def nifti(values: Any, affine: Any = None, slope: tuple[float, float] | None = None, two: bool = False) -> bytes:
    image = (nibabel.Nifti2Image if two else nibabel.Nifti1Image)(values, np.eye(4) if affine is None else affine)
    if slope is None:
        return bytes(image.to_bytes())
    image.header.set_slope_inter(*slope)
    image.header.set_data_dtype(values.dtype)
    raw = bytearray(nibabel.Nifti1Image(values, np.eye(4)).to_bytes())
    raw[112:120] = struct.pack("<2f", *slope)  # the writer would choose its own
    return bytes(raw)


def axes(**how: Any) -> dict[str, Any]:
    return {"photometric": "minisblack", "metadata": {"axes": how.pop("axes")}, **how}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (tiff(BANDS), BANDS),
        (tiff(BANDS, metadata=None), BANDS),
        (tiff(BANDS, **axes(axes="CYX")), BANDS),
        (tiff(BANDS, ome=True, **axes(axes="CYX")), BANDS),
        (tiff(BANDS, photometric="minisblack", planarconfig="separate"), BANDS),
        (tiff(np.moveaxis(BANDS[None], 1, -1).copy(), photometric="rgb", planarconfig="contig"), BANDS),
        (tiff(BANDS, byteorder=">"), BANDS),
        (tiff(BANDS, bigtiff=True), BANDS),
        (tiff(BANDS, tile=(16, 16), compression="lzw"), BANDS),
        (tiff(BANDS, compression="zlib", predictor=True), BANDS),
        (tiff(BANDS, compression="zstd"), BANDS),
        (tiff(STACK, **axes(axes="ZYX")), STACK[None]),
        (tiff(STACK, imagej=True, metadata={"axes": "TYX"}), STACK[None]),
        (tiff(BANDS[:12].reshape(4, 3, 20, 24), imagej=True, metadata={"axes": "ZCYX"}), BANDS[:12].reshape(4, 3, 20, 24).swapaxes(0, 1)),
        (tiff(BANDS[0]), BANDS[:1]),
        (tiff(BANDS[0], photometric="miniswhite"), 65535 - BANDS[:1]),
        (tiff(np.moveaxis(BANDS[:3], 0, -1).copy()), BANDS[:3]),
        (tiff(np.moveaxis(BANDS[:4], 0, -1).copy(), photometric="rgb", extrasamples=["unspecified"]), BANDS[:4]),
        (tiff(np.moveaxis(BANDS[:4], 0, -1).astype(np.uint8), photometric="rgb", extrasamples=["unspecified"]), BANDS[:4].astype(np.uint8)),
        (tiff(BANDS.astype(np.uint8)), BANDS.astype(np.uint8)),
        (tiff(BANDS.astype(np.int16)), BANDS.astype(np.int16)),
        (tiff(BANDS / np.float32(7)), BANDS / np.float32(7)),
        (tiff(BANDS / 7.0), (BANDS / 7.0).astype(np.float32)),
        (tiff((BANDS / 7.0).astype(np.float16)), (BANDS / 7.0).astype(np.float16).astype(np.float32)),
        (tiff(BANDS[0], extratags=[(274, 3, 1, 6, True)]), np.rot90(BANDS[:1], -1, (1, 2))),
        (npy(BANDS), BANDS),
        (npy(BANDS.astype(">i4")), BANDS.astype(np.int32)),
        (npy(np.asfortranarray(BANDS)), BANDS),
        (npy(np.moveaxis(BANDS, 0, -1)), BANDS),
        (npy(BANDS[0]), BANDS[:1]),
        (npy(STACK[None]), STACK[None]),
        (npy(STACK[:, None]), STACK),
        (npy((BANDS / 7.0).astype(np.float16)), (BANDS / 7.0).astype(np.float16).astype(np.float32)),
        (dicom(BANDS[0]), BANDS[:1]),
        (dicom(BANDS[0].astype(np.int16)), BANDS[:1].astype(np.int16)),
        (dicom(STACK, frames=4), STACK[None]),
        (dicom(STACK, frames=4, syntax=RLE), STACK[None]),
        (dicom(BANDS[0], "MONOCHROME1"), 65535 - BANDS[:1]),
        (dicom(BANDS[0].astype(np.int16), "MONOCHROME1"), -1 - BANDS[:1].astype(np.int16)),
        (dicom(BANDS[0] % 4096, "MONOCHROME1", BitsStored=12, HighBit=11), 4095 - BANDS[:1] % 4096),
        (dicom(np.moveaxis(BANDS[:3] >> 8, 0, -1).astype(np.uint8), "RGB"), (BANDS[:3] >> 8).astype(np.uint8)),
        (dicom(BANDS[0], RescaleSlope="2", RescaleIntercept="-1024"), BANDS[:1] * np.float32(2) - 1024),
        (dicom(BANDS[0], RescaleSlope="1", RescaleIntercept="0"), BANDS[:1]),
        (dicom(BANDS[0], "MONOCHROME1", RescaleSlope="0.5", RescaleIntercept="3"), (65535 - BANDS[:1]) * np.float32(0.5) + 3),
        (dicom([bytes(encode(WIDE, photometric_interpretation=2))], syntax=JPEG_2000, Rows=64, Columns=80, BitsAllocated=16, BitsStored=16, HighBit=15), WIDE[None]),
        (nifti(STACK.astype(np.int16)), STACK.astype(np.int16).T[None]),
        (nifti(STACK.astype(np.int16), two=True), STACK.astype(np.int16).T[None]),
        (gzip.compress(nifti(STACK.astype(np.int16)), mtime=0), STACK.astype(np.int16).T[None]),
        (nifti(STACK.astype(np.int16), np.diag([-1, 2, -3, 1])), STACK.astype(np.int16)[::-1, :, ::-1].T[None]),
        (nifti(STACK.astype(np.int16), np.array([[0, 0, 2, 1], [0, 3, 0, 2], [1, 0, 0, 3], [0, 0, 0, 1]])), STACK.astype(np.int16)[None]),
        (nifti(STACK.astype(np.int16), slope=(0.5, -3)), STACK.astype(np.int16).T[None] * np.float32(0.5) - 3),
        (nifti(STACK[:, :, :, None].astype(np.float64)), STACK.T[None].astype(np.float32)),
        (nifti(BANDS[:12].reshape(2, 3, 2, 20 * 24).astype(np.uint8)), BANDS[:12].reshape(2, 3, 2, 20 * 24).astype(np.uint8).T),
        (nifti(STACK[0].astype(np.int16)), STACK[0].astype(np.int16).T[None]),
        (png(Image.fromarray(BANDS[0])), BANDS[:1]),
        (imagecodecs.png_encode(np.moveaxis(BANDS[:3], 0, -1).copy()), BANDS[:3]),
    ],
)  # fmt: skip
def test_files_hold_what_their_library_wrote(body: bytes, expected: Any) -> None:
    found = read_array(body)
    assert found is not None
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert found.dtype.isnative
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("body", [tiff(STACK), tiff(STACK, metadata=None), npy(STACK), tiff(STACK.astype(np.uint8))])
def test_an_axis_without_a_name_is_planes_of_a_volume(body: bytes) -> None:
    assert read_array(body).shape == (4, 20, 24)  # type: ignore[union-attr]
    assert read_array(body, volumes=True).shape == (1, 4, 20, 24)  # type: ignore[union-attr]


def test_pages_in_colour_are_planes() -> None:
    pages = BANDS[:12].reshape(4, 3, 20, 24)
    body = tiff(np.moveaxis(pages, 1, -1).copy(), photometric="rgb")
    assert np.array_equal(read_array(body), pages.swapaxes(0, 1))  # type: ignore[arg-type]
    body = tiff(np.moveaxis(pages.astype(np.uint8), 1, -1).copy(), photometric="rgb")
    assert read_array(body) is None  # as ever: Pillow's first frame
    assert np.array_equal(read_array(body, volumes=True), pages.astype(np.uint8).swapaxes(0, 1))  # type: ignore[arg-type]


def test_alpha_is_composed_over_white() -> None:
    pixels = np.moveaxis(BANDS[:4], 0, -1).copy()
    share = pixels[..., 3:] / 65535
    expected = np.moveaxis(pixels[..., :3] * share + 65535 * (1 - share), -1, 0)
    for body in (tiff(pixels, photometric="rgb", extrasamples=["unassalpha"]), imagecodecs.png_encode(pixels)):
        found = read_array(body)
        assert found is not None
        assert found.dtype == np.uint16
        assert np.abs(found - expected).max() <= 0.51
    assert np.array_equal(over_white(np.array([[[9]], [[0]]], np.uint8)), [[[255]]])


def test_the_transparent_grey_of_a_png_is_white() -> None:
    body = png(Image.fromarray(np.array([[7, 8]], np.uint16)), transparency=7)
    assert np.array_equal(read_array(body), [[[65535, 8]]])  # type: ignore[arg-type]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientations_are_pillows(orientation: int) -> None:
    from PIL import ImageOps

    pixels = np.arange(6, dtype=np.uint8).reshape(2, 3)
    image = Image.fromarray(pixels)
    image.getexif()[0x0112] = orientation
    assert np.array_equal(upright(pixels[None], orientation)[0], np.asarray(ImageOps.exif_transpose(image)))


def test_colour_dicoms_are_rgb() -> None:
    ramp = np.zeros((16, 16, 3), np.uint8)
    ramp[:8] = (200, 30, 40)
    ycc = np.asarray(Image.fromarray(ramp).convert("YCbCr"))
    found = read_array(dicom(ycc, "YBR_FULL"))
    assert np.abs(np.moveaxis(found, 0, -1).astype(int) - ramp).max() <= 2  # type: ignore[arg-type]
    out = BytesIO()
    Image.fromarray(ramp[..., 0]).save(out, "JPEG", quality=95)
    found = read_array(dicom([out.getvalue()], syntax=JPEG, Rows=16, Columns=16, HighBit=7))
    assert np.abs(found[0].astype(int) - ramp[..., 0]).max() <= 6  # type: ignore[index]


def test_enhanced_dicoms_are_rescaled_frame_by_frame() -> None:
    lines = []
    for slope in (1, 2, 3, 4):
        values, frame = pydicom.Dataset(), pydicom.Dataset()
        values.RescaleSlope, values.RescaleIntercept = slope, -slope
        frame.PixelValueTransformationSequence = [values]
        lines.append(frame)
    found = read_array(dicom(STACK, frames=4, PerFrameFunctionalGroupsSequence=lines))
    assert np.array_equal(found[0], [plane * np.float32(i + 1) - (i + 1) for i, plane in enumerate(STACK)])  # type: ignore[index]
    found = read_array(dicom(STACK, frames=4, SharedFunctionalGroupsSequence=lines[1:2]))
    assert np.array_equal(found[0], STACK * np.float32(2) - 2)  # type: ignore[index]


def plain_images() -> list[bytes]:
    grey = Image.fromarray(BANDS[0].astype(np.uint8))
    bodies = [
        png(grey),
        png(grey.convert("RGB")),
        b"no image",
        b"",
        gzip.compress(b"no NIfTI", mtime=0),
        gzip.compress(bytes(600), mtime=0),
    ]
    for mode in ("1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr"):
        out = BytesIO()
        grey.convert("RGB").convert(mode).save(out, "TIFF")
        bodies.append(out.getvalue())
    return bodies


@pytest.mark.parametrize("body", plain_images())
def test_other_kinds_are_left_to_pillow(body: bytes) -> None:
    assert read_array(body) is None


def swapped(body: bytes, old: bytes, new: bytes) -> bytes:
    assert body.count(old) == 1
    return body.replace(old, new)


def jpeg_2000(side: int) -> bytes:
    return bytes(encode(np.zeros((side, side), np.uint8), photometric_interpretation=2))


def circular(big: bool) -> bytes:
    """A TIFF whose last page leads to its first."""
    raw = bytearray(tiff(STACK, metadata=None, bigtiff=big))
    with tifffile.TiffFile(BytesIO(bytes(raw))) as file:
        offsets = [page.offset for page in file.pages]
    tags = struct.unpack_from("<Q" if big else "<H", raw, offsets[-1])[0]
    at = offsets[-1] + (8 + 20 * tags if big else 2 + 12 * tags)
    struct.pack_into("<Q" if big else "<I", raw, at, offsets[0])
    return bytes(raw)


BAD = [
    (circular(False), "pages run in a circle, after 4"),
    (circular(True), "pages run in a circle, after 4"),
    (npy(np.array([{}], object), allow_pickle=True), "never unpickled"),
    (npy(np.array(["a"])), "dtype <U1"),
    (npy(BANDS > 5), "dtype bool"),
    (npy(BANDS.astype(complex)), "dtype complex128"),
    (npy(BANDS[0, 0]), "no image"),
    (npy(np.float32(3)), "no image"),
    (npy(BANDS[None, None]), "5 axes"),
    (npy(BANDS[:, :0]), "no image"),
    (npy(BANDS)[:-1], "truncated"),
    (npy(BANDS) + b"0", "truncated"),
    (npy(np.array([[np.nan, 1]])), "NaN or infinity"),
    (npy(np.array([[1e300, 1]])), "NaN or infinity"),
    (swapped(npy(BANDS), b"(13, 20, 24)", b"(13, 99999, 99999)"[:12]), "damaged|truncated|header"),
    (b"\x93NUMPY\x07\x00rest", "version"),
    (b"\x93NUMPY\x01", "damaged .npy"),
    (tiff(np.zeros((8, 8), np.float32) + np.inf), "NaN or infinity"),
    (tiff(np.zeros((8, 8), np.complex64)), "dtype complex64"),
    (tiff(BANDS, compression="zlib")[:-50], "TIFF"),
    (tiff(BANDS[0])[:-1], "TIFF"),
    (tiff(BANDS, tile=(16, 16), compression="lzw")[:-1], "past its end"),
    (tiff(BANDS)[:40], "TIFF"),
    (b"II*\0" + bytes(60), "TIFF"),
    (tiff(BANDS[:, :16, :16].copy(), compression="jpeg2000"), "compression"),
    (tiff(BANDS[:12].reshape(2, 6, 20, 24), imagej=True, metadata={"axes": "TZYX"}), "one axis of planes"),
    (dicom(BANDS[0])[:-10], "damaged DICOM"),
    (dicom(BANDS[0])[:140], "damaged DICOM"),
    (dicom(BANDS[0], Rows=60000, Columns=60000), "60000 x 60000 pixels"),
    (dicom(BANDS[0], NumberOfFrames=2_000_000), "GiB"),
    (dicom(BANDS[0], "PALETTE COLOR"), "PALETTE COLOR"),
    (dicom([jpeg_2000(64)], syntax=JPEG_2000, Rows=20, Columns=24), "picture of 64 x 64"),
    (dicom([jpeg_2000(64)], syntax="1.2.840.10008.1.2.4.70", Rows=64, Columns=64), "transfer syntax 1.2.840.10008.1.2.4.70"),
    (dicom(BANDS[0]) + b"1.2.840.10008.1.2.1.99", "deflated"),
    (nifti(STACK.astype(np.int16))[:-10], "truncated"),
    (gzip.compress(nifti(STACK.astype(np.int16)), mtime=0)[:-12], "damaged NIfTI"),
    (gzip.compress(nifti(STACK.astype(np.int16)), mtime=0)[:-8] + bytes(8), "damaged NIfTI"),
    (nifti(np.zeros((2, 2, 2, 2, 2), np.int16)), "5 axes"),
    (nifti(np.full((4, 4, 4), np.nan, np.float32)), "NaN or infinity"),
    (nifti(np.zeros((4, 4, 4), np.complex64)), "dtype complex64"),
    (swapped(nifti(STACK.astype(np.int16)), struct.pack("<4h", 3, 4, 20, 24), struct.pack("<4h", 3, 32000, 32000, 9)), "32000 x 32000"),
    (imagecodecs.png_encode(np.moveaxis(BANDS[:3], 0, -1).copy())[:-40], "damaged PNG"),
    (swapped(png(Image.fromarray(BANDS[0])), struct.pack(">2I", 24, 20), struct.pack(">2I", 90000, 90000)), "90000 x 90000"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "reason"), BAD, ids=range(len(BAD)))
def test_bad_files_are_bad_samples(body: bytes, reason: str) -> None:
    with pytest.raises(BadSample, match=reason):
        read_array(body)


SEEDS = {
    "tiff": tiff(BANDS, tile=(16, 16), compression="zlib"),
    "npy": npy(BANDS[:2]),
    "dicom": dicom(STACK, frames=4),
    "nifti": nifti(STACK.astype(np.int16)),
    "gz": gzip.compress(nifti(STACK.astype(np.int16))),
    "png": imagecodecs.png_encode(np.moveaxis(BANDS[:3], 0, -1).copy()),
}


@pytest.mark.parametrize("kind", SEEDS)
def test_damaged_bytes_raise_nothing_else(kind: str) -> None:
    body, rng = SEEDS[kind], np.random.default_rng(1)
    for _ in range(150):
        raw = bytearray(body)
        head = rng.random() < 0.7
        for at in rng.integers(0, min(len(raw), 600) if head else len(raw), 3):
            raw[at] = rng.integers(256)
        try:
            found = read_array(bytes(raw[: rng.integers(1, len(raw))] if rng.random() < 0.2 else raw))
        except BadSample:
            continue
        assert found is None or found.ndim in (3, 4)


def bombs() -> list[bytes]:
    """Each of some 100 kB, and of 100 MB when unpacked without a bound."""
    zeros = bytes(100_000_000)
    body = tiff(np.zeros((100, 100), np.uint16), compression="zlib")
    with tifffile.TiffFile(BytesIO(body)) as file:
        tags = file.pages[0].tags
        places = [(tags[273], len(body)), (tags[279], len(zlib.compress(zeros)))]
    raw = bytearray(body)
    for tag, value in places:
        raw[tag.valueoffset : tag.valueoffset + 4] = struct.pack("<I" if tag.dtype == 4 else "<Hxx", value)
    small = nifti(np.zeros((4, 4, 4), np.int16))
    return [bytes(raw) + zlib.compress(zeros), gzip.compress(small[:352] + zeros), gzip.compress(zeros)]


def test_bombs_are_not_unpacked() -> None:
    bodies, before = bombs(), _peak()
    for body in bodies:
        assert len(body) < 200_000
        try:
            read_array(body)
        except BadSample as error:
            assert "damaged TIFF" in str(error)
    assert _peak() - before < 20_000_000


def _peak() -> int:
    """Highest memory of this process so far, in bytes, measured from here on."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


def test_a_tile_of_a_tiff_is_no_larger_than_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    body = tiff(np.zeros((20, 20), np.uint16), tile=(1024, 1024), compression="zlib")
    assert read_array(body) is not None
    monkeypatch.setattr(formats, "MAX_BYTES", 2**20)
    with pytest.raises(BadSample, match="GiB when decoded"):
        read_array(body)
    with pytest.raises(BadSample, match="GiB when decoded"):
        read_array(npy(np.zeros((9, 1, 256, 256), np.uint16)))


@pytest.mark.parametrize(
    ("module", "body"),
    [
        ("tifffile", tiff(BANDS)),
        ("pydicom", dicom(BANDS[0])),
        ("nibabel", nifti(STACK.astype(np.int16))),
        ("imagecodecs", SEEDS["png"]),
    ],
)
def test_what_is_missing_is_named(module: str, body: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingLibrary, match=rf"needs {module}; pip install 'selfsight\[science\]'"):
        read_array(body)


GREY_16 = [
    tiff(BANDS[0]),
    tiff(BANDS[0], byteorder=">", compression="zlib"),
    tiff(BANDS[0], extratags=[(0x0112, "H", 1, 6, True)]),
]


@pytest.mark.parametrize("body", [*GREY_16, SEEDS["png"]])
def test_without_the_library_pillow_reads_what_it_can_with_8_bits(body: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = decode(body, Form(3))
    for module in ("tifffile", "imagecodecs"):
        monkeypatch.setitem(sys.modules, module, None)
    found = decode(body, Form(3))
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).max() <= (body not in GREY_16)  # of colours, the upper 8 bits
    assert own_pixels(body, eight=True)[1].dtype == np.uint8
    for form in (Form(3, 16), Form(3, 32, (0, 1)), Form(3, 8, (0, 4095))):
        with pytest.raises(MissingLibrary):
            decode(body, form)


@pytest.mark.parametrize(
    "body",
    [tiff(BANDS[0], photometric="miniswhite"), tiff(BANDS[0].astype(np.int16)), tiff(STACK), tiff(BANDS), nifti(STACK)],
)
def test_what_pillow_reads_otherwise_is_not_left_to_it(body: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("tifffile", "nibabel"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingLibrary):
        decode(body, Form(1))


def test_a_library_that_one_file_lacks_ends_the_run_saved(
    tmp_path: Path, small_fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not as a bad sample, which another would replace, and not as a wrong command, which saves nothing."""
    monkeypatch.setitem(sys.modules, "tifffile", None)
    bodies = [npy(np.full((8, 8), i, np.uint8)) for i in range(31)] + [tiff(BANDS)]
    write_shards([(body, None) for body in bodies], tmp_path, "s")
    with pytest.raises(DataError, match="needs tifffile; pip install"):
        pretrain("digits/mae", small_fields | {"data.train": str(tmp_path)})
    run = Path(small_fields["run_dir"])
    steps = len([line for line in (run / "metrics.jsonl").read_text().splitlines() if '"loss"' in line])
    assert 0 < steps < 4
    assert [path.name for path in sorted((run / "checkpoints").iterdir())][-1].endswith(str(steps))
    assert not (run / "quarantine.jsonl").exists() or not (run / "quarantine.jsonl").read_text()


def test_depths() -> None:
    eight, sixteen = np.arange(256, dtype=np.uint8)[None], np.arange(65536).astype(np.uint16)[None]
    assert to_depth(eight, 8) is eight
    assert to_depth(sixteen, 16) is sixteen
    assert np.array_equal(to_depth(eight, 16), np.arange(256)[None] * 257)
    assert np.array_equal(to_depth(to_depth(eight, 16), 8), eight)
    assert np.array_equal(to_depth(sixteen, 8), np.rint(np.arange(65536)[None] / 257))
    for array in (eight, sixteen, np.array([[-5, 7]], np.int16), np.array([[-0.5, 7]], np.float32)):
        assert to_depth(array, 32).dtype == np.float32
        assert np.array_equal(to_depth(array, 32), array)
    for array in (np.array([[-5, 7]], np.int16), np.array([[0.5]], np.float32), np.array([[9]], np.int64)):
        for depth, bounds in ((8, None), (16, None), (16, (-1000.0, 1000.0)), (16, (0.0, 1e6))):
            with pytest.raises(
                BadSample, match=r"set data.depth 32 and data.range \(selfsight shards check SPEC --stats"
            ):
                to_depth(array, depth, bounds)
    found = to_depth(np.array([[-5, 7.6, 5000]], np.float32), 16, (0, 4095))
    assert (found.dtype, found.tolist()) == (np.uint16, [[0, 8, 4095]])
    for dtype in (np.int16, np.float32, np.int64):
        found = to_depth(np.array([[-2000, -1000, 0, 1000, 9000]], dtype), 8, (-1000, 1000))
        assert (found.dtype, found.tolist()) == (np.uint8, [[0, 0, 128, 255, 255]])
    assert to_depth(np.array([[0, 1000, 4095, 60000]], np.uint16), 8, (0, 4095)).tolist() == [[0, 62, 255, 255]]
    assert to_depth(np.array([[7, 200]], np.uint8), 8, (0, 4095)).tolist() == [[7, 200]]


def test_decoding_gives_what_the_encoder_takes() -> None:
    assert np.array_equal(decode(tiff(BANDS), Form(13, 16)), BANDS)
    assert np.array_equal(decode(tiff(BANDS), Form(13)), np.rint(BANDS / 257))
    assert np.array_equal(decode(tiff(BANDS), Form(13, 32, (0, 1e4))), BANDS.astype(np.float32))
    assert np.array_equal(decode(npy(BANDS[0]), Form(3, 16)), BANDS[[0, 0, 0]])
    assert np.array_equal(decode(tiff(STACK), Form(1, 16, frames=2)), STACK[None])
    assert np.array_equal(decode(nifti(STACK.astype(np.int16)), Form(1, 32, (0, 1))), STACK.astype(np.int16).T[None])
    colours = np.moveaxis(BANDS[:3] >> 8, 0, -1).astype(np.uint8)
    grey = np.asarray(Image.fromarray(colours).convert("L"))
    assert np.abs(decode(npy(colours), Form(1))[0].astype(int) - grey).max() <= 1
    assert decode(png(Image.fromarray(colours)), Form(3)).shape == (3, 20, 24)
    for body, form, reason in (
        (tiff(BANDS[:12]), Form(13, 16), "has 12 channels of uint16; the encoder takes 13"),
        (tiff(BANDS), Form(3), "has 13 channels of uint16; the encoder takes 3"),
        (npy(BANDS[None, :5]), Form(2, frames=5), "has 1 channel of uint16, 5 planes; the encoder takes 2"),
        (dicom(BANDS[0].astype(np.int16)), Form(1), "int16 values, and its range is unknown or not within 8 bits"),
        (png(Image.fromarray(colours)), Form(13), "at most 3 channels; the encoder takes 13"),
    ):
        with pytest.raises(BadSample, match=reason):
            decode(body, form)


@pytest.mark.parametrize(
    ("body", "form"),
    [
        (npy(BANDS), Form(13, 16)),
        (npy(BANDS.astype(">u2")), Form(13, 16)),
        (npy(np.asfortranarray(BANDS)), Form(13, 16)),
        (npy(BANDS[0]), Form(3, 16)),
        (npy(STACK[None].astype(np.uint8)), Form(1, frames=2)),
        (tiff(BANDS[0], extratags=[(274, 3, 1, 6, True)]), Form(1, 32, (0, 1e4))),
        (dicom(BANDS[0], "MONOCHROME1"), Form(1, 16)),
        (nifti(STACK.astype(np.int16)), Form(1, 32, (0, 1), frames=3)),
    ],
)
def test_views_are_made_of_whatever_strides_come(body: bytes, form: Form) -> None:
    """Arrays that cannot be written to, of other byte orders, reversed, repeated."""
    maker = ViewMaker(View(crop_scale=(0.3, 1.0)), 0, 16, "bicubic", 0)
    for row in maker.draws(np.arange(4)):
        view = maker(Picture([body], form).window(0.3), row)
        assert view.shape == ((form.channels, 16, 16) if form.frames == 1 else (form.channels, form.frames, 16, 16))
        assert view.dtype == {8: np.uint8, 16: np.uint16, 32: np.float32}[form.depth]


def test_arrays_in_words() -> None:
    assert shape_text(BANDS) == "13 channels of uint16"
    assert shape_text(STACK[None]) == "1 channel of uint16, 4 planes"


def test_libraries_say_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """Lines for each of a million files would hide what a run says."""
    odd = bytearray(nifti(STACK.astype(np.int16)))
    odd[254:256] = b"\x10\x10"  # sform_code
    assert read_array(bytes(odd)) is not None
    for body in [*SEEDS.values(), *(body for body, _ in BAD)]:
        with suppress(BadSample):
            read_array(body)
    assert caplog.records == []


def test_nothing_is_written_or_run(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for body in SEEDS.values():
        read_array(body)
    assert os.listdir(tmp_path) == []
