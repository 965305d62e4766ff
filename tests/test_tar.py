"""The header walk against Python's tarfile; damaged tars are in faults/test_shards_faults.py."""

import io
import tarfile

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
    assert [member[:3] for member in members(memoryview(raw), "t")] == expected
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
