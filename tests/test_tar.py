"""The header walk against Python's tarfile, and every way in which a tar can be damaged."""

import io
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfsight.data.tar import BLOCK, members
from selfsight.errors import DataError

NAMES = st.text(st.characters(min_codepoint=33, max_codepoint=0x2FF), min_size=1, max_size=160).map(
    lambda s: s.strip("/.") or "x"
)
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def make_tar(files: list[tuple[str, bytes]], form: str = "pax", kind: bytes = tarfile.REGTYPE) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=FORMATS[form]) as tar:
        for name, body in files:
            info = tarfile.TarInfo(name)
            info.size, info.type = len(body), kind
            tar.addfile(info, io.BytesIO(body))
    return out.getvalue()


@settings(max_examples=60)
@given(st.lists(st.tuples(NAMES, st.binary(max_size=1500)), max_size=6), st.sampled_from(["gnu", "pax"]))
def test_names_and_contents_are_tarfiles(files: list[tuple[str, bytes]], form: str) -> None:
    raw = make_tar(files, form)
    with tarfile.open(fileobj=io.BytesIO(raw)) as tar:
        expected = [(info.name, info.offset_data, info.size) for info in tar.getmembers()]
    assert [tuple(member) for member in members(memoryview(raw), "t")] == expected
    assert [raw[m.offset : m.offset + m.size] for m in members(memoryview(raw), "t")] == [body for _, body in files]


def test_ustar_prefixes_are_joined() -> None:
    name = "/".join(["folder" * 4] * 5) + "/image.png"
    assert [m.name for m in members(memoryview(make_tar([(name, b"x")], "ustar")), "t")] == [name]


def test_every_cut_is_found() -> None:
    raw = make_tar([("a.png", b"x" * 700), ("a.cls", b"1")], "ustar")
    used = raw.rstrip(b"\0")
    for size in [*range(0, len(used), 61), *range(0, len(used) + BLOCK - 1, BLOCK)]:
        with pytest.raises(DataError, match=r"cut off|past the end"):
            list(members(memoryview(raw[:size]), "t.tar"))


def test_every_flipped_header_byte_is_found_or_harmless() -> None:
    raw = bytearray(make_tar([("a.png", b"image"), ("b.png", b"other")], "ustar"))
    expected = list(members(memoryview(bytes(raw)), "t"))
    found = 0
    for i in range(BLOCK):
        raw[i] ^= 0x15
        try:
            assert list(members(memoryview(bytes(raw)), "t")) == expected
        except DataError:
            found += 1
        raw[i] ^= 0x15
    assert found > 480  # padding behind the checksum's digits is the harmless rest


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(kind: bytes) -> None:
    with pytest.raises(DataError, match="only plain files"):
        list(members(memoryview(make_tar([("a.png", b"")], kind=kind)), "t"))


def test_sizes_beyond_the_file_are_refused() -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
        info = tarfile.TarInfo("a.png")
        info.size = 2**40  # written in base 256
        tar.addfile(info)
    with pytest.raises(DataError, match="past the end"):
        list(members(memoryview(out.getvalue()), "t"))


def test_a_pax_size_beyond_the_file_is_refused() -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("a.png")
        info.pax_headers = {"size": "99999999"}
        tar.addfile(info)
    with pytest.raises(DataError, match="past the end"):
        list(members(memoryview(out.getvalue()), "t"))


def test_joined_tars_and_other_files_are_refused(tmp_path: Path) -> None:
    raw = make_tar([("a.png", b"x")])
    with pytest.raises(DataError, match="joined"):
        list(members(memoryview(raw + raw), "t"))
    for body in (b"", b"<html>404</html>", b"PK\x03\x04" + bytes(600), bytes(100)):
        with pytest.raises(DataError):
            list(members(memoryview(body), "t"))


def test_folders_are_passed_over() -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        folder = tarfile.TarInfo("train")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        info = tarfile.TarInfo("train/a.png")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    assert [m.name for m in members(memoryview(out.getvalue()), "t")] == ["train/a.png"]
