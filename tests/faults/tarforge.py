"""Tars as nobody should write them, byte by byte: Python's tarfile would refuse to. Checksums are right unless said."""

import bz2
import gzip
import lzma
from collections.abc import Iterator

BLOCK = 512
END = bytes(2 * BLOCK)


def header(
    name: bytes, size: int | bytes, kind: bytes = b"0", magic: bytes = b"ustar\x0000", prefix: bytes = b""
) -> bytes:
    """One block. `size` as bytes is the field itself."""
    field = size if isinstance(size, bytes) else b"%011o\0" % size
    head = (
        name[:100].ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + field[:12].ljust(12, b"\0") + b"0" * 11 + b"\0"
    )
    tail = kind + bytes(100) + magic.ljust(8, b"\0") + bytes(80) + prefix
    block = (head + b" " * 8 + tail).ljust(BLOCK, b"\0")[:BLOCK]
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def member(name: bytes, body: bytes, kind: bytes = b"0", size: int | bytes | None = None, **fields: bytes) -> bytes:
    """A header and its padded contents; `size` other than theirs is a lie."""
    return header(name, len(body) if size is None else size, kind, **fields) + body + bytes(-len(body) % BLOCK)


def tar(*parts: bytes) -> bytes:
    return b"".join(parts) + END


def pax(key: bytes, value: bytes) -> bytes:
    """A pax header with one record, about the member that follows."""
    length = len(key) + len(value) + 3
    while length != len(b"%d %s=%s\n" % (length, key, value)):
        length += 1
    return member(b"pax", b"%d %s=%s\n" % (length, key, value), b"x")


def base_256(number: int) -> bytes:
    """GNU's size field for large numbers; negative ones, too."""
    return (number % 2**95 | 2**95).to_bytes(12, "big") if number >= 0 else (number % 2**96).to_bytes(12, "big")


def cuts(raw: bytes) -> Iterator[bytes]:
    """The file cut at every block before its end marker, and behind the marker's first block's first byte."""
    last = len(raw) - len(END)
    yield from (raw[:size] for size in [*range(0, last + 1, BLOCK), last + 1])


A, B = member(b"a.png", b"image A"), member(b"b.png", b"image B")
LABEL = member(b"a.cls", b"3")

REFUSED = {  # what a shard must not be, and a part of what is said of it
    "nothing": (b"", "cut off"),
    "a page": (b"<html><body>404 Not Found</body></html>" * 40, "damaged"),
    "a short page": (b"<html>404</html>", "cut off"),
    "a zip": (b"PK\x03\x04" + bytes(range(256)) * 8, "damaged"),
    "zeros, too few": (bytes(100), "cut off"),
    "gzip": (gzip.compress(tar(A)), "is compressed.*selfsight shards build"),
    "xz": (lzma.compress(tar(A)), "is compressed"),
    "bzip2": (bz2.compress(tar(A)), "is compressed"),
    "zstandard": (b"\x28\xb5\x2f\xfd" + bytes(BLOCK), "is compressed"),
    "no end marker": (A, "cut off"),
    "two tars joined": (tar(A) + tar(B), "data after its end marker"),
    "no member": (tar(), "holds no image"),
    "only a folder": (tar(header(b"train/", 0, b"5")), "holds no image"),
    "the same image twice": (tar(A, LABEL, A), "stands twice"),
    "A's label, B's image": (tar(A, LABEL, member(b"a.png", b"image B")), "stands twice"),
    "A's label, then B's": (tar(A, LABEL, member(b"a.cls", b"4")), "stands twice"),
    "twins but for case": (tar(A, member(b"a.PNG", b"image B")), "stands twice"),
    "two images of one key": (tar(A, member(b"a.jpg", b"image B")), "holds 2 images"),
    "one of them v1, one v2": (tar(member(b"a.v1.png", b"1"), member(b"a.v2.png", b"2")), "holds 2 images"),
    "a label of no image": (tar(A, member(b"b.cls", b"1")), "1 of 2 samples have no image, first 'b'"),
    "an empty image": (tar(A, member(b"b.png", b"")), "1 of 2 samples have an image of zero bytes, first 'b'"),
    "a negative label": (tar(A, member(b"a.cls", b"-1")), "not an integer of 0 or more"),
    "a word for a label": (tar(A, member(b"a.cls", b"cat")), "not an integer of 0 or more"),
    "a label too large": (tar(A, member(b"a.cls", b"99999999999")), "not an integer of 0 or more"),
    "a label in Arabic digits": (tar(A, member(b"a.cls", "٣".encode())), "not an integer of 0 or more"),
    "a hard link": (tar(A, header(b"b.png", 0, b"1")), "a hard link"),
    "a symbolic link": (tar(A, header(b"b.png", 0, b"2")), "a symbolic link"),
    "a character device": (tar(A, header(b"b.png", 0, b"3")), "a device"),
    "a block device": (tar(A, header(b"b.png", 0, b"4")), "a device"),
    "a pipe": (tar(A, header(b"b.png", 0, b"6")), "a pipe"),
    "GNU's sparse": (tar(A, header(b"b.png", 0, b"S")), "sparse"),
    "pax's sparse": (tar(pax(b"GNU.sparse.major", b"1"), B), "sparse"),
    "an unknown kind": (tar(A, header(b"b.png", 0, b"Z")), "unknown kind"),
    "a size past the end": (tar(member(b"a.png", b"image", size=5 * BLOCK)), "past the end"),
    "eight gigabytes": (tar(member(b"a.png", b"image", size=b"77777777777\0")), "past the end"),
    "base 256, past the end": (tar(member(b"a.png", b"image", size=base_256(2**80))), "past the end"),
    "base 256, negative": (tar(member(b"a.png", b"image", size=base_256(-BLOCK))), "damaged"),
    "octal, negative": (tar(member(b"a.png", b"image", size=b"-0000001000\0")), "damaged"),
    "not octal": (tar(member(b"a.png", b"image", size=b"00000000019\0")), "damaged"),
    "a pax size past the end": (tar(pax(b"size", b"99999"), A), "past the end"),
    "a negative pax size": (tar(pax(b"size", b"-512"), A), "gives the size"),
    "a pax size of many digits": (tar(pax(b"size", b"9" * 5000), A), "gives the size"),
    "a pax size that hides the body": (tar(pax(b"size", b"0"), A), "damaged"),
    "a pax record without length": (tar(member(b"pax", b"path=x\n", b"x"), A), "pax header .* is damaged"),
    "a pax record of length 0": (tar(member(b"pax", b"0 path=x\n", b"x"), A), "pax header .* is damaged"),
    "a pax record past its end": (tar(member(b"pax", b"99 path=x\n", b"x"), A), "pax header .* is damaged"),
    "a pax length of many digits": (tar(member(b"pax", b"9" * 5000 + b" a=b\n", b"x"), A), "pax header .* is damaged"),
    "a pax header of megabytes": (tar(member(b"pax", b"6 a=b\n" * 200_000, b"x"), A), "claims 1,200,000 bytes"),
    "a name of megabytes": (tar(member(b"long", b"n" * 2_000_000, b"L"), A), "claims 2,000,000 bytes"),
}  # fmt: skip

READ = {  # unusual, and meant: (image, label) of each sample
    "nothing unusual": (tar(A, LABEL, B), [(b"image A", 3), (b"image B", -1)]),
    "several dots": (tar(member(b"a.v1.png", b"image A"), LABEL), [(b"image A", 3)]),
    "dots in the folder": (tar(member(b"x.y/a.png", b"1"), member(b"x.y/a.cls", b"7"), A), [(b"1", 7), (b"image A", -1)]),
    "upper case": (tar(member(b"a.PNG", b"image A"), member(b"a.CLS", b"3")), [(b"image A", 3)]),
    "keys that differ by case": (tar(A, member(b"A.png", b"other")), [(b"image A", -1), (b"other", -1)]),
    "spaces": (tar(member(b"my cat .png", b"cat"), member(b"my cat .cls", b"1")), [(b"cat", 1)]),
    "not UTF-8": (tar(member(b"\xff\xfe.png", b"1"), member(b"\xff.png", b"2"), member(b"\xff.cls", b"5")),
                  [(b"1", -1), (b"2", 5)]),
    "no key": (tar(member(b".png", b"1"), member(b".cls", b"2")), [(b"1", 2)]),
    "interleaved": (tar(A, B, LABEL, member(b"b.cls", b"4")), [(b"image A", 3), (b"image B", 4)]),
    "labels first": (tar(LABEL, A), [(b"image A", 3)]),
    "further fields": (tar(A, member(b"a.json", b"{}"), member(b"a.txt", b"a cat"), LABEL), [(b"image A", 3)]),
    "a way out": (tar(member(b"../../x.png", b"1"), member(b"../../x.cls", b"2")), [(b"1", 2)]),
    "an absolute path": (tar(member(b"/etc/passwd.png", b"1")), [(b"1", -1)]),
    "before ustar": (tar(member(b"a.png", b"old", b"\0", magic=b"")), [(b"old", -1)]),
    "a contiguous file": (tar(member(b"a.png", b"image A", b"7")), [(b"image A", -1)]),
    "a ustar prefix": (tar(member(b"a.png", b"1", prefix=b"x"), member(b"x/a.cls", b"2")), [(b"1", 2)]),
    "base 256 where it need not be": (tar(member(b"a.png", b"image A", size=base_256(7))), [(b"image A", -1)]),
    "a pax size that is right": (tar(pax(b"size", b"7"), member(b"a.png", b"image A", size=0)), [(b"image A", -1)]),
    "a pax path": (tar(pax(b"path", b"b.png"), A, member(b"b.cls", b"9")), [(b"image A", 9)]),
    "a thousand pax headers": (tar(pax(b"path", b"b.png") * 1000, A), [(b"image A", -1)]),
    "a long name": (tar(member(b"long", b"n" * 300 + b".png\0", b"L"), A), [(b"image A", -1)]),
    "a long link": (tar(member(b"long", b"n" * 300 + b"\0", b"K"), A), [(b"image A", -1)]),
    "a global pax header": (tar(member(b"pax", b"16 comment=hello\n"[:16], b"g"), A), [(b"image A", -1)]),
    "folders": (tar(header(b"x/", 0, b"5"), member(b"x/a.png", b"1")), [(b"1", -1)]),
    "one block of end": (A + bytes(BLOCK), [(b"image A", -1)]),
    "padded to 10 KiB": (tar(A) + bytes(10_240), [(b"image A", -1)]),
}  # fmt: skip
