"""Hostile files under every name that a user could give us. A payload that ran would leave a file in `canary/`.

found = attack_all(folder)      # importable without pytest; benchmarks use it, too
"""

import contextlib
import io
import json
import os
import pickle
import signal
import struct
import tarfile
import time
import types
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file

from selfsight import checkpoint, cli, foreign
from selfsight.data.index import HEADER, MAGIC, RECORD, _header_crc, index_path
from selfsight.encoder import Encoder, build_encoder, preprocessing_of
from selfsight.errors import DataError, SelfsightError
from selfsight.exports.export import _write, seal
from selfsight.loading import load_encoder
from selfsight.objectives.configs import DistillConfig
from selfsight.objectives.teacher import StoredTeacher
from selfsight.recipe import DataConfig, EncoderConfig
from selfsight.weights import load_weights

SECONDS, MEGABYTES = 10.0, 400
MINIMAL = "run_dir: run\ndata: {train: digits:train}\nobjective: {name: mae}\ntrain: {steps: 1, batch_size: 8, workers: 0, device: cpu}\n"
NO_DATA = MINIMAL.replace("digits:train", "nowhere.tar")
TINY: dict[str, Any] = {"image_size": 8, "channels": 1, "patch": 4, "width": 16, "depth": 1, "heads": 2}


class Attack(NamedTuple):
    """A file or folder, and the public entry that a user would hand it to."""

    name: str
    entry: str
    target: str


class Result(NamedTuple):
    """What came of an attack."""

    name: str
    told: str
    """Our error, or "read" where nothing was wrong with reading it."""
    strange: str
    """An exception that is not one of ours, else empty."""
    executed: bool
    seconds: float
    megabytes: float


class Overdue(BaseException):
    """Raised by the clock, past every `except Exception`."""


class Corpus:
    """Writes attacks below a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.canary = folder, folder / "canary"
        self.canary.mkdir(parents=True)
        self.attacks: list[Attack] = []

    def touch(self, name: str) -> str:
        """The command that a payload would run."""
        return f"touch {self.canary / name}"

    def add(self, name: str, entry: str, write: Callable[[Path], Any], suffix: str = "") -> None:
        """An attack by a file of its own in a folder of its own, or by that folder if there is no suffix."""
        home = self.folder / name
        home.mkdir()
        path = home / f"x{suffix}" if suffix else home
        target = write(path)
        self.attacks.append(Attack(name, entry, target if isinstance(target, str) else str(path)))

    def text(self, name: str, body: str | bytes, entry: str = "pretrain", suffix: str = ".yaml") -> None:
        """A file with this content."""
        raw = body.encode() if isinstance(body, str) else body
        self.add(name, entry, lambda path: path.write_bytes(raw) and None, suffix)

    def field(self, name: str, section: str, value: Any, recipe: str = NO_DATA) -> None:
        """A good recipe with one hostile field (JSON is YAML)."""
        tree = _good_tree(recipe)
        *above, last = section.split(".")
        place = tree
        for key in above:
            place = place.setdefault(key, {})
        place[last] = value
        self.text(name, json.dumps(tree))


def attacks(folder: Path) -> list[Attack]:
    """Write every attack below an empty folder."""
    corpus = Corpus(folder)
    for write in (_tags, _bombs, _recipes, _bases, _specs, _tars, _indexes, _images, _pickles, _safetensors, _exports):
        write(corpus)
    for write in (_checkpoints, _stored, _packed):
        write(corpus)
    (folder / "canary_module.py").write_text(f"import os\nos.system({corpus.touch('import')!r})\nOBJECTIVES = {{}}\n")
    return corpus.attacks


def _good_tree(recipe: str) -> dict[str, Any]:
    source = "nowhere.tar" if recipe is NO_DATA else "digits:train"
    train = {"steps": 1, "batch_size": 8, "workers": 0, "device": "cpu"}
    encoder = TINY | {"image_size": 8}
    return {"run_dir": "run", "data": {"train": source}, "objective": {"name": "mae", "decoder_width": 16}, "train": train, "encoder": encoder}  # fmt: skip


# Recipes


def _tags(corpus: Corpus) -> None:
    touch = corpus.touch
    for name, text in {
        "apply": f"!!python/object/apply:os.system ['{touch('apply')}']",
        "new": f"!!python/object/new:os.system ['{touch('new')}']",
        "popen": f"!!python/object/apply:subprocess.Popen [[touch, {corpus.canary / 'popen'}]]",
        "eval": f'!!python/object/apply:builtins.eval [\'open("{corpus.canary / "eval"}", "w")\']',
        "exec": f'!!python/object/apply:builtins.exec [\'open("{corpus.canary / "exec"}", "w")\']',
        "type": f'!!python/object/new:type {{args: [z, !!python/tuple [], {{extend: !!python/name:exec }}], listitems: \'open("{corpus.canary / "type"}", "w")\'}}',
        "name": "!!python/name:os.system",
        "module": "!!python/module:canary_module",
        "object": "!!python/object:canary_module.Payload {}",
        "tuple": "!!python/tuple [1, 2]",
        "verbatim": f"!<tag:yaml.org,2002:python/object/apply:os.system> ['{touch('verbatim')}']",
        "ruby": "!ruby/object:Gem::Installer {i: x}",
        "java": "!!javax.script.ScriptEngineManager [x]",
        "binary": "!!binary gA==",
        "timestamp": "!!timestamp x",
        "bool": "!!bool maybe",
        "set": "!!set {a, b}",
        "merge": "{!!merge x: {run_dir: y}}",
    }.items():
        corpus.text(f"tag-{name}", f"{NO_DATA}seed: {text}\n")
    directive = (
        f"%TAG !p! tag:yaml.org,2002:python/object/apply:\n---\nrun_dir: !p!os.system ['{touch('directive')}']\n"
    )
    corpus.text("tag-directive", directive)


def _bombs(corpus: Corpus) -> None:
    layers = [f"{c}: &{c} [{','.join(['*' + chr(ord(c) - 1)] * 9)}]" for c in "bcdefghi"]
    corpus.text("bomb-aliases", "a: &a [x,x,x]\n" + "\n".join(layers) + "\n")
    merges = [f"{c}: &{c}\n  <<: [{','.join(['*' + chr(ord(c) - 1)] * 9)}]" for c in "bcdefghi"]
    corpus.text("bomb-merges", "a: &a {x: 1}\n" + "\n".join(merges) + "\n")
    corpus.text("bomb-self", "a: &a [*a]\n")
    corpus.text("bomb-flow", "[" * 199_000)
    corpus.text("bomb-million", "[" * 1_000_000)
    corpus.text("bomb-maps", "{a: " * 49_000)
    corpus.text("bomb-blocks", "- " * 99_000)
    corpus.text("bomb-keys", "? " * 99_000)
    corpus.text("bomb-list", "[" + "a," * 20_000 + "]")
    corpus.text("bomb-mapping", "\n".join(f"k{i}: 1" for i in range(4_000)))
    corpus.text("bomb-anchors", "&a " * 60_000)
    corpus.text("bomb-quotes", "'" * 199_999)
    corpus.add("bomb-100MB", "pretrain", lambda path: _sparse(path, b"a: ", 100 * 2**20), ".yaml")


def _sparse(path: Path, start: bytes, size: int) -> None:
    path.write_bytes(start)
    os.truncate(path, size)


def _recipes(corpus: Corpus) -> None:
    for name, value in {
        "dotted": "os.system",
        "colon": "canary_module:Payload",
        "module": "canary_module",
        "path": "../../canary_module",
        "call": f"__import__('os').system('{corpus.touch('call')}')",
        "template": "{{ ''.__class__.__mro__ }}",
        "dunder": "__class__",
        "list": ["mae"],
        "none": None,
    }.items():
        corpus.field(f"objective-{name}", "objective.name", value)
    corpus.field("objective-target", "objective._target_", "os.system")
    corpus.field("hydra-target", "_target_", "os.system")
    corpus.field("plugin", "plugin", "canary_module")
    corpus.field("tracker", "track", ["canary_module"])
    for name, value in {"hub": "hf-hub:evil/model", "local": "local-dir:/etc", "path": "../../etc/passwd", "code": "vit.__class__"}.items():  # fmt: skip
        corpus.field(f"encoder-{name}", "encoder.name", value, MINIMAL)
        corpus.field(f"weights-{name}", "encoder.weights", value, MINIMAL)
    corpus.field("weights-long", "encoder.weights", "x" * 5000, MINIMAL)
    corpus.field("weights-device", "encoder.weights", "/dev/zero", MINIMAL)
    for name, text in {
        "float": "1e999", "nan": ".nan", "digits": "9" * 5000, "negative": "-" + "9" * 400, "hex": "0x" + "f" * 4000,
    }.items():  # fmt: skip
        corpus.text(f"number-{name}", f"{NO_DATA}optim: {{lr: {text}}}\nseed: {text}\n")
    for name, body in {
        "duplicate": f"{NO_DATA}seed: 1\nseed: 2\n",
        "long-key": f"{NO_DATA}{'k' * 900}: 1\n? {'q' * 190_000}\n: 1\n",
        "list-key": f"{NO_DATA}? [a]\n: 1\n",
        "number-key": f"{NO_DATA}1: 2\nnull: 3\n",
        "dunder-key": f"{NO_DATA}__class__: {{__init__: x}}\nmodel_config: {{extra: allow}}\n",
        "merge-key": f"{NO_DATA}<<: {{seed: 1}}\n",
        "two-documents": f"{NO_DATA}---\n{NO_DATA}",
        "escaped-nul": NO_DATA.replace("run_dir: run", 'run_dir: "a\\0b"'),
        "surrogate": NO_DATA.replace("run_dir: run", 'run_dir: "a\\ud800"'),
        "long-run-dir": NO_DATA.replace("run_dir: run", f"run_dir: {'x' * 5000}"),
        "shell-run-dir": NO_DATA.replace("run_dir: run", f"run_dir: '$({corpus.touch('run-dir')})'"),
        "device-run-dir": NO_DATA.replace("run_dir: run", "run_dir: /dev/null/x"),
    }.items():
        corpus.text(f"recipe-{name}", body)
    for name, raw in {
        "nul": b"run_dir: a\0b\n",
        "utf16": NO_DATA.encode("utf-16"),
        "utf32": NO_DATA.encode("utf-32"),
        "latin1": b"run_dir: \xe9\xff\n",
        "bom": b"\xef\xbb\xbf" + NO_DATA.encode(),
        "pickle": pickle.dumps(_Payload(corpus.touch("yaml-pickle"))),
        "empty": b"\n",
    }.items():
        corpus.text(f"bytes-{name}", raw)
    corpus.text("json-nested", '{"a":' * 30_000 + "1" + "}" * 30_000, suffix=".json")


def _bases(corpus: Corpus) -> None:
    def chain(path: Path) -> None:
        for i in range(50):
            path.with_name(f"{i}.yaml").write_text(f"base: {i + 1}.yaml\n")
        path.write_text("base: 0.yaml\n")

    def loop(path: Path) -> None:
        path.write_text("base: y.yaml\n")
        path.with_name("y.yaml").write_text("base: x.yaml\n")

    def fifo(path: Path) -> None:
        os.mkfifo(path.with_name("pipe.yaml"))
        path.write_text("base: pipe.yaml\n")

    corpus.add("base-chain", "pretrain", chain, ".yaml")
    corpus.add("base-loop", "pretrain", loop, ".yaml")
    corpus.add("base-pipe", "pretrain", fifo, ".yaml")
    for name, value in {
        "self": "x.yaml", "absolute": "/etc/passwd", "above": "../" * 20 + "etc/passwd", "device": "/dev/zero",
        "list": "[a, b]", "long": "x" * 5000, "url": "https://u:p@host/x.yaml?sig=s", "folder": "..",
    }.items():  # fmt: skip
        corpus.text(f"base-{name}", f"base: {value}\n{NO_DATA}")


# Data


def _specs(corpus: Corpus) -> None:
    touch = corpus.touch
    for name, value in {
        "pipe": f"pipe:{touch('pipe')}",
        "bar": f"|{touch('bar')}",
        "dollar": f"$({touch('dollar')}).tar",
        "ticks": f"`{touch('ticks')}`.tar",
        "semicolon": f"x.tar; {touch('semicolon')}",
        "url": "https://user:pw@127.0.0.1/x.tar?sig=s",
        "file-url": "file:///etc/passwd",
        "gopher": "gopher://127.0.0.1:70/x",
        "passwd": "/etc/passwd",
        "device": "/dev/zero",
        "braces": "x-{000000000..999999999}.tar",
        "nested-braces": "{a,b}" * 40 + ".tar",
        "open-brace": "{" * 3000,
        "home": "~no-such-user-here/x.tar",
        "long": "x" * 5000,
        "empty": "",
        "nothing": [],
        "digits": "digits:../../etc/passwd",
        "nul": "a\0.tar",
    }.items():
        corpus.field(f"spec-{name}", "data.train", value)
    corpus.attacks.append(Attack("index-spec-pipe", "index", f"pipe:{touch('index-pipe')}"))
    corpus.attacks.append(Attack("index-spec-braces", "index", "x-{000000000..999999999}.tar"))
    corpus.attacks.append(Attack("index-spec-home", "index", "~no-such-user-here/x.tar"))


PNG = (
    b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00\x00\x01\x00\x00\x00\x01\x08\x00\x00\x00\x00:~\x9bU"
    b"\x00\x00\x00\nIDATx\x9cc`\x00\x00\x00\x02\x00\x01H\xaf\xa4q\x00\x00\x00\x00IEND\xaeB`\x82"
)


def _header(name: bytes, size: bytes = b"00000000105\0", kind: bytes = b"0", link: bytes = b"") -> bytes:
    """A ustar header with a right checksum, whatever its fields hold."""
    head = bytearray(512)
    head[: len(name[:100])], head[100:108], head[124:136], head[156:157] = name[:100], b"0000644\0", size, kind
    head[157 : 157 + len(link)], head[257:265], head[148:156] = link, b"ustar\x0000", b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head)


def _pad(body: bytes) -> bytes:
    return body + bytes(-len(body) % 512)


def _octal(size: int) -> bytes:
    return b"%011o\0" % size


def _member(name: bytes, body: bytes = PNG, kind: bytes = b"0", link: bytes = b"") -> bytes:
    return _header(name, _octal(len(body)), kind, link) + _pad(body)


END = bytes(1024)


def _tars(corpus: Corpus) -> None:
    touch = corpus.touch
    outside = corpus.canary / "extracted"
    pax = b"%d size=%d\n"
    for name, raw in {
        "traversal": _member(b"../" * 30 + str(outside).lstrip("/").encode() + b".png"),
        "absolute": _member(str(outside).encode() + b".png"),
        "shell": _member(f"$({touch('tar-shell')}).png".encode()) + _member(f"|{touch('tar-bar')};.png".encode()),
        "nul-name": _member(b"a\0../../x.png"),
        "newline": _member(b"a\n\x1b[2Jb.png"),
        "symlink": _member(b"a.png", b"", b"2", b"/etc/passwd"),
        "hardlink": _member(b"a.png", b"", b"1", b"../../x"),
        "char-device": _member(b"a.png", b"", b"3"),
        "block-device": _member(b"a.png", b"", b"4"),
        "fifo": _member(b"a.png", b"", b"6"),
        "sparse": _member(b"a.png", PNG, b"S"),
        "unknown": _member(b"a.png", PNG, b"Z"),
        "base256": _header(b"a.png", b"\x80" + b"\xff" * 11),
        "base256-negative": _header(b"a.png", b"\xff" * 12),
        "octal-huge": _header(b"a.png", b"777777777777"),
        "octal-sign": _header(b"a.png", b"-0000000001\0"),
        "size-text": _header(b"a.png", b"ten bytes..\0"),
        "pax-size": _member(b"p", pax % (25, 10**16), b"x") + _member(b"a.png"),
        "pax-negative": _member(b"p", b"12 size=-99\n", b"x") + _member(b"a.png"),
        "pax-loop": _member(b"p", b"0 path=x\n" * 50, b"x") + _member(b"a.png"),
        "pax-length": _member(b"p", b"99999999999999999999 path=x\n", b"x") + _member(b"a.png"),
        "pax-digits": _member(b"p", b"9" * 5000 + b" path=x\n", b"x") + _member(b"a.png"),
        "pax-size-digits": _member(b"p", b"5013 size=" + b"9" * 5002 + b"\n", b"x") + _member(b"a.png"),
        "pax-many": _member(b"p", b"10 path=x\n" * 20_000, b"x") * 2 + _member(b"a.png"),
        "pax-sparse": _member(b"p", b"22 GNU.sparse.major=1\n", b"x") + _member(b"a.png"),
        "long-name": _member(b"L", b"x" * 10**6 + b".png", b"L") + _member(b"a.png"),
        "directories": _header(b"d/", _octal(0), b"5") * 20_000 + _member(b"a.png"),
        "label-digits": _member(b"a.png") + _member(b"a.cls", b"9" * 5000),
        "label-huge": _member(b"a.png") + _member(b"a.cls", b"9" * 31),
        "label-unicode": _member(b"a.png") + _member(b"a.cls", "²".encode()),
        "twice": _member(b"a.png") * 2,
        "pickled-member": _member(b"a.png") + _member(b"a.pkl", pickle.dumps(_Payload(touch("member")))),
        "pyd-member": _member(b"a.png") + _member(b"a.pyd", pickle.dumps(_Payload(touch("member2")))),
        "is-pickle": pickle.dumps(_Payload(touch("tar-pickle"))),
        "is-zip": b"PK\x03\x04" + bytes(600),
        "empty": b"",
    }.items():
        body = raw if name.startswith("is-") or name == "empty" else raw + END
        corpus.text(f"tar-{name}", body, "index and check", ".tar")
    corpus.add("tar-pipe", "index", lambda path: os.mkfifo(path), ".tar")
    corpus.add("tar-folder", "index", lambda path: path.mkdir(), ".tar")
    corpus.add("tar-to-passwd", "index", lambda path: path.symlink_to("/etc/passwd"), ".tar")


def _indexes(corpus: Corpus) -> None:
    good = _member(b"a.png") + END
    for name, fields in {
        "count": {"count": 2**32 - 1}, "zero": {"count": 0}, "version": {"version": 99},
        "offset": {"offset": 2**63}, "size": {"size": 2**32 - 1}, "far": {"offset": 2**64 - 1, "size": 2**32 - 1},
        "label": {"label": 2**31 - 1},
    }.items():  # fmt: skip

        def forge(path: Path, fields: dict[str, int] = fields) -> None:
            path.write_bytes(good)
            head, records = np.zeros(1, HEADER), np.zeros(1, RECORD)
            records["offset"], records["size"], records["crc"] = 512, len(PNG), zlib.crc32(PNG)
            head["magic"], head["version"], head["count"], head["shard_size"] = MAGIC, 1, 1, len(good)
            for key, value in fields.items():
                (records if key in (RECORD.names or ()) else head)[key] = value
            head["records_crc"] = zlib.crc32(records.tobytes())
            head["header_crc"] = _header_crc(head)
            index_path(path).write_bytes(head.tobytes() + records.tobytes())

        corpus.add(f"index-{name}", "check", forge, ".tar")

    def beside(raw: bytes) -> Callable[[Path], None]:
        def write(path: Path) -> None:
            path.write_bytes(good)
            path.with_name(path.name + ".idx").write_bytes(raw)

        return write

    corpus.add("index-pickle", "check", beside(pickle.dumps(_Payload(corpus.touch("index-pickle")))), ".tar")
    corpus.add("index-short", "check", beside(b"SSINDEX\0"), ".tar")

    def pipe(path: Path) -> None:
        path.write_bytes(good)
        os.mkfifo(path.with_name(path.name + ".idx"))

    corpus.add("index-pipe", "check", pipe, ".tar")


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _png(width: int, height: int, *more: bytes) -> bytes:
    head = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + _chunk(b"IDAT", zlib.compress(bytes(2**16))) + _chunk(b"IEND", b"")  # fmt: skip


def _images(corpus: Corpus) -> None:
    touch = corpus.touch
    bomb = zlib.compress(bytes(80 * 2**20), 1)
    tiff = (
        b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", 1) + struct.pack("<HHII", 256, 4, 2**32 - 1, 0) + bytes(4)
    )
    for name, raw in {
        "bomb": _png(60_000, 60_000),
        "below-the-cap": _png(7_000, 7_000),
        "text-bomb": _png(1, 1, _chunk(b"zTXt", b"k\0\0" + bomb)),
        "icc-bomb": _png(1, 1, _chunk(b"iCCP", b"k\0\0" + bomb)),
        "zero": _png(0, 0),
        "postscript": f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%{touch('eps')}) (w) file\n".encode(),
        "pdf": b"%PDF-1.4\n1 0 obj<</OpenAction<</S/Launch>>>>endobj\n",
        "svg": b'<?xml version="1.0"?><!DOCTYPE s [<!ENTITY x SYSTEM "file:///etc/passwd">]><svg>&x;</svg>',
        "html": b"<!doctype html><h1>404 Not Found</h1>",
        "magick": f"push graphic-context\nfill 'url(https://h/x\"|{touch('magick')}\")'\n".encode(),
        "fits": b"SIMPLE  =                    T".ljust(80),
        "tiff": tiff,
        "gif": b"GIF89a" + struct.pack("<HH", 65535, 65535) + bytes(20),
        "ppm": b"P6 99999999999999999999 1 255\n",
        "webp": b"RIFF\xff\xff\xff\xffWEBPVP8L" + bytes(30),
        "pickle": pickle.dumps(_Payload(touch("image"))),
    }.items():
        corpus.text(f"image-{name}", _member(b"a.png", raw) + END, "index and check", ".tar")


# Pickles


class _Payload:
    """Runs a command where it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


class _Evaluates(_Payload):
    def __reduce__(self) -> tuple[Any, ...]:
        return eval, (f"__import__('os').system({self.command!r})",)


class _Spawns(_Payload):
    def __reduce__(self) -> tuple[Any, ...]:
        import subprocess

        return subprocess.Popen, (self.command.split(),)


class _Gets(_Payload):
    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (str, "format")


def _torch_zip(path: Path, body: bytes, compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("x/data.pkl", body)
        archive.writestr("x/version", "3\n")
        archive.writestr("x/byteorder", "little")
        archive.writestr("x/data/0", bytes(64))


def _tensor_pickle(sizes: tuple[int, ...], strides: tuple[int, ...], numel: int) -> bytes:
    """{"w": a float tensor of a storage "0"}, written by hand, since torch would not."""

    def integer(value: int) -> bytes:
        return b"J" + struct.pack("<i", value) if value < 2**31 else b"\x8a\x08" + struct.pack("<q", value)

    def numbers(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(map(integer, values)) + b"t"

    def word(text: str) -> bytes:
        return b"X" + struct.pack("<I", len(text)) + text.encode()

    storage = b"(" + word("storage") + b"ctorch\nFloatStorage\n" + word("0") + word("cpu") + integer(numel) + b"tQ"
    hooks = b"ccollections\nOrderedDict\n)R"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + integer(0) + numbers(sizes) + numbers(strides) + b"\x89" + hooks + b"tR"  # fmt: skip
    return b"\x80\x02}" + word("w") + tensor + b"s."


def _pickles(corpus: Corpus) -> None:
    touch = corpus.touch
    good = {"w": torch.zeros(2)}
    for kind, suffix in ((_Payload, ".pt"), (_Evaluates, ".pth"), (_Spawns, ".bin"), (_Gets, ".ckpt")):
        name = kind.__name__.strip("_").lower()
        for protocol in (0, 2, 4):
            raw = pickle.dumps({"model": kind(touch(name))}, protocol)
            corpus.text(f"pickle-{name}-{protocol}", raw, "import", suffix)
        body = pickle.dumps({"model": {"x": kind(touch(name))}}, 2)
        corpus.add(f"zip-{name}", "import", lambda path, body=body: _torch_zip(path, body), suffix)  # fmt: skip
    corpus.add("legacy", "import", lambda path: torch.save({"m": good, "x": _Payload(touch("legacy"))}, path, _use_new_zipfile_serialization=False), ".pth")  # fmt: skip
    corpus.add("saved", "import", lambda path: torch.save({"m": good, "x": _Payload(touch("saved"))}, path), ".pth")
    corpus.add("module", "import", lambda path: torch.save(torch.nn.Linear(2, 2), path), ".pth")
    space = types.SimpleNamespace(x=_Payload(touch("namespace")))
    corpus.add("namespace", "import", lambda path: torch.save({"m": good, "args": space}, path), ".pth")
    for name, body in {
        "huge-tensor": _tensor_pickle((2**40,), (1,), 16),
        "stretched-tensor": _tensor_pickle((2**31 - 1, 2**10), (0, 0), 16),
        "negative-tensor": _tensor_pickle((-5,), (1,), 16),
        "huge-storage": _tensor_pickle((4,), (1,), 2**45),
        "deep-pickle": b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b".",
        "dropped": b"\x80\x02cargparse\nNamespace\n)R}X\x01\x00\x00\x00xcposix\nsystem\nsb.",
        "numpy-scalar": b"\x80\x02cnumpy._core.multiarray\nscalar\n(cnumpy\ndtype\n(X\x02\x00\x00\x00O8K\x00K\x01tRU\x08AAAAAAAAtR.",
        "endless-memo": b"\x80\x02" + b"]r\xff\xff\xff\x7f0" * 100_000 + b"N.",
        "bytearray": b"\x80\x02cbuiltins\nbytearray\n\x8a\x08" + struct.pack("<q", 2**40) + b"\x85R.",
        "truncated": b"\x80\x02}X",
    }.items():
        corpus.add(f"torch-{name}", "import", lambda path, body=body: _torch_zip(path, body), ".pt")
    swollen = b"\x80\x02X" + struct.pack("<I", 200 * 2**20) + b"x" * (200 * 2**20) + b"."
    corpus.add("torch-deflated", "import", lambda path: _torch_zip(path, swollen, zipfile.ZIP_DEFLATED), ".pt")
    corpus.text("torch-html", b"<!doctype html>404", "import", ".pth")
    corpus.text("torch-empty", b"", "import", ".pth")
    corpus.add("torch-tar", "import", lambda path: _old_tar(path, touch("torch-tar")), ".pt")
    for suffix in (".pth", ".pt", ".bin", ".ckpt", ".pkl", ".npz"):
        corpus.text(f"weights-pickle{suffix}", pickle.dumps(_Payload(touch("weights"))), "weights", suffix)
        corpus.text(f"load-pickle{suffix}", pickle.dumps(_Payload(touch("load"))), "load", suffix)


def _old_tar(path: Path, command: str) -> None:
    """The oldest of torch's formats: a tar of pickles."""
    with tarfile.open(path, "w") as tar:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            raw = pickle.dumps(_Payload(command), 2)
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))


# Weights, exports, checkpoints


def _safetensors(corpus: Corpus) -> None:
    def build(header: bytes, body: bytes = bytes(64), length: int | None = None) -> bytes:
        return struct.pack("<Q", len(header) if length is None else length) + header + body

    def entry(dtype: str = "F32", shape: Any = (4,), offsets: Any = (0, 16)) -> bytes:
        return json.dumps({"w": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()

    both = {name: {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} for name in ("a", "b")}
    for name, raw in {
        "header-huge": build(b"{}", length=10**9),
        "header-max": build(b"{}", length=2**64 - 1),
        "overlap": build(json.dumps(both).encode()),
        "negative": build(entry(shape=(-4,))),
        "product": build(entry(shape=(2**62, 2**62))),
        "backwards": build(entry(offsets=(16, 0))),
        "beyond": build(entry(shape=(2**40,), offsets=(0, 2**42))),
        "dtype": build(entry("OBJECT")),
        "four-bits": build(entry("F4", (32,), (0, 16)), bytes(16)),
        "float-shape": build(entry(shape=(1.5,))),
        "nested": build(b'{"a":' * 30_000 + b"1" + b"}" * 30_000),
        "text": build(b"\xff" * 64),
        "metadata": build(b'{"__metadata__": {"x": [1]}}'),
        "pickle": pickle.dumps(_Payload(corpus.touch("safetensors"))),
        "empty": b"",
        "scalar": build(entry(shape=(), offsets=(0, 4)), bytes(4)),
    }.items():
        corpus.text(f"safetensors-{name}", raw, "weights", ".safetensors")
        corpus.add(f"export-model-{name}", "load", lambda path, raw=raw: _export(path, {"model.safetensors": raw}))
    good = tiny_encoder().backbone.state_dict()
    for name, key, tensor in (
        ("table-flat", "pos_embed", torch.zeros(16)),
        ("table-none", "pos_embed", torch.zeros(1, 0, 16)),
        ("table-short", "pos_embed", torch.zeros(1, 1, 16)),
        ("table-batch", "pos_embed", torch.zeros(2, 10, 16)),
        ("table-integer", "pos_embed", torch.zeros(1, 10, 16, dtype=torch.int64)),
        ("stem-none", "patch_embed.proj.weight", torch.zeros(16, 0, 4, 4)),
        ("stem-flat", "patch_embed.proj.weight", torch.zeros(16, 1, 0, 0)),
        ("stem-channels", "patch_embed.proj.weight", torch.zeros(16, 5, 4, 4)),
        ("stem-large", "patch_embed.proj.weight", torch.zeros(16, 1, 300, 300)),
        ("norm-complex", "norm.weight", torch.zeros(16, dtype=torch.complex64)),
    ):
        corpus.add(f"weights-{name}", "weights", lambda path, changed=good | {key: tensor}: save_file(changed, path), ".safetensors")  # fmt: skip
    corpus.add("safetensors-pipe", "weights", lambda path: os.mkfifo(path), ".safetensors")
    corpus.add("safetensors-device", "weights", lambda path: path.symlink_to("/dev/zero"), ".safetensors")


def tiny_encoder(seed: int = 0) -> Encoder:
    """An encoder of a few kilobytes."""
    config = EncoderConfig(**TINY)
    return build_encoder(config, preprocessing_of(DataConfig(train="x"), config), seed)


def _export(folder: Path, files: Mapping[str, bytes], manifest: bool = True) -> None:
    """An export with some files replaced, and a manifest that vouches for them."""
    _write(tiny_encoder(), folder, {})
    for name, raw in files.items():
        (folder / name).write_bytes(raw)
    if manifest:
        seal(folder)


def _edited(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    _export(folder, {}, manifest=False)
    tree = json.loads((folder / "config.json").read_text())
    edit(tree)
    (folder / "config.json").write_text(json.dumps(tree))


def _exports(corpus: Corpus) -> None:
    def of_encoder(**fields: Any) -> Callable[[dict[str, Any]], Any]:
        return lambda tree: tree["selfsight"]["encoder"].update(fields)

    def of_input(**fields: Any) -> Callable[[dict[str, Any]], Any]:
        return lambda tree: tree["selfsight"]["preprocessing"].update(fields)

    def as_timm(**fields: Any) -> Callable[[dict[str, Any]], Any]:
        def edit(tree: dict[str, Any]) -> None:
            del tree["selfsight"]
            tree.update({"model_args": {}, **fields})

        return edit

    for name, edit in {
        "image": of_encoder(image_size=4 * 10**8),
        "width": of_encoder(width=10**9),
        "depth": of_encoder(depth=10**9),
        "registers": of_encoder(registers=10**12),
        "grid": of_encoder(image_size=8192, patch=1),
        "giant": lambda tree: (of_encoder(name="vit_gigantic_patch14_clip_224", width=None, depth=None, heads=None, patch=None, image_size=28)(tree), of_input(image_size=28)(tree)),
        "hub": of_encoder(name="hf-hub:evil/model"),
        "weights": of_encoder(weights="/etc/passwd"),
        "unknown": of_encoder(_target_="os.system"),
        "statistics": of_input(mean=["x"], std=[None]),
        "resolution": of_input(image_size=10**9),
        "channels": of_input(channels=10**9),
        "path": of_input(interpolation="../../x"),
        "callable": of_input(__class__="os.system"),
        "timm-args": as_timm(model_args={"img_size": 10**9, "act_layer": "os.system", "pretrained_cfg_overlay": {"file": "/etc/passwd"}}),
        "timm-name": as_timm(architecture="hf-hub:evil/model"),
        "timm-giant": as_timm(architecture="vit_giant_patch14_dinov2", pretrained_cfg={"input_size": [3, 28, 28], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "crop_pct": 1}),
        "timm-cfg": as_timm(pretrained_cfg={"input_size": "x", "url": "http://127.0.0.1/x.pth", "custom_load": True}),
        "timm-size": as_timm(pretrained_cfg={"input_size": [10**9, 10**9, 10**9], "mean": [0], "std": [1], "interpolation": "x", "crop_pct": 1}),
        "timm-list": as_timm(architecture=["vit"]),
    }.items():  # fmt: skip
        corpus.add(f"config-{name}", "load", lambda path, edit=edit: _edited(path, edit))
    for name, raw in {
        "pickle": pickle.dumps(_Payload(corpus.touch("config"))), "nested": b"[" * 10**5, "list": b"[]", "utf16": "{}".encode("utf-16"),
        "digits": b'{"selfsight": ' + b"9" * 5000 + b"}",
    }.items():  # fmt: skip
        corpus.add(f"config-{name}", "load", lambda path, raw=raw: _export(path, {"config.json": raw}))
    corpus.add("config-100MB", "load", lambda path: (_export(path, {}, False), _sparse(path / "config.json", b" ", 10**8))[1])  # fmt: skip
    for name, manifest in {
        "above": {"../../../../../../../../etc/passwd": {"size": 1, "sha256": "x"}},
        "absolute": {"/etc/passwd": {"size": 1, "sha256": "x"}},
        "endless": {"/dev/zero": {"size": 0, "sha256": "x"}},
        "list": [1],
        "numbers": {"config.json": 5},
        "short": {},
    }.items():
        corpus.add(f"manifest-{name}", "load", lambda path, m=manifest: _export(path, {"manifest.json": json.dumps(m).encode()}, False))  # fmt: skip
    corpus.add("manifest-nested", "load", lambda path: _export(path, {"manifest.json": b"[" * 10**5}, False))
    corpus.add("manifest-pipe", "load", lambda path: (_export(path, {}, False), os.mkfifo(path / "manifest.json"))[1])

    def torch_only(path: Path) -> None:
        _export(path, {"pytorch_model.bin": pickle.dumps(_Payload(corpus.touch("bin")))}, False)
        (path / "model.safetensors").unlink()

    corpus.add("export-bin-only", "load", torch_only)
    corpus.add("export-bin-only-weights", "weights", torch_only)


def _checkpoints(corpus: Corpus) -> None:
    encoder = {f"encoder.{name}": value for name, value in tiny_encoder().state_dict().items()}
    recipe = _good_tree(MINIMAL)
    good: dict[str, Any] = {"recipe": recipe, "scored": "encoder", "fingerprint": {}}

    def saved(state: dict[str, Any], raw: Mapping[str, bytes] = {}) -> Callable[[Path], str]:
        def write(path: Path) -> str:
            made = checkpoint.save(path / "checkpoints", 1, state, {"model": encoder, "optim": {}}, keep=2)
            for name, body in raw.items():
                (made / name).write_bytes(body)
            if raw and checkpoint.MANIFEST not in raw:
                (made / checkpoint.MANIFEST).write_text(json.dumps(checkpoint.manifest_of(made)))
            return str(made)

        return write

    touch = corpus.touch
    for name, write in {
        "state-pickle": saved(good, {"state.json": pickle.dumps(_Payload(touch("state")))}),
        "state-nested": saved(good, {"state.json": b'{"a":' * 10**5}),
        "state-list": saved(good, {"state.json": b"[]"}),
        "state-format": saved(good, {"state.json": b'{"format": "x"}'}),
        "state-newer": saved(good, {"state.json": b'{"format": 99}'}),
        "state-empty": saved({}),
        "state-recipe": saved(good | {"recipe": 5}),
        "state-scored": saved(good | {"scored": ["x"]}),
        "state-elsewhere": saved(good | {"scored": "../.."}),
        "state-width": saved(good | {"recipe": recipe | {"encoder": TINY | {"width": 10**9}}}),
        "state-depth": saved(good | {"recipe": recipe | {"encoder": TINY | {"depth": 10**9}}}),
        "state-hub": saved(good | {"recipe": recipe | {"encoder": {"name": "hf-hub:evil/x"}}}),
        "model-pickle": saved(good, {"model.safetensors": pickle.dumps(_Payload(touch("model")))}),
        "extra-pickle": saved(good, {"evil.pt": pickle.dumps(_Payload(touch("extra")))}),
        "dcp-metadata": saved(good, {".metadata": pickle.dumps(_Payload(touch("dcp")))}),
        "custom-checkpoint": saved(good, {"custom_checkpoint_0.pkl": pickle.dumps(_Payload(touch("custom")))}),
        "manifest-above": saved(good, {"manifest.json": b'{"../../../../../../etc/passwd": {"size": 1, "sha256": "x"}}'}),
        "manifest-endless": saved(good, {"manifest.json": b'{"/dev/zero": {"size": 0, "sha256": "x"}}'}),
        "manifest-nested": saved(good, {"manifest.json": b"[" * 10**5}),
    }.items():  # fmt: skip
        corpus.add(f"checkpoint-{name}", "load", write)
        corpus.add(f"checkpoint-{name}-weights", "weights", write)


def _stored(corpus: Corpus) -> None:
    def npy(header: str, body: bytes = bytes(64)) -> bytes:
        raw = header.encode().ljust(118 - 10 - 1) + b"\n"
        return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(raw)) + raw + body

    objects = io.BytesIO()
    np.save(objects, np.array([_Payload(corpus.touch("npy"))], object), allow_pickle=True)
    archive = io.BytesIO()
    np.savez(archive, embedding=np.zeros(3))
    for name, raw in {
        "objects": objects.getvalue(),
        "pickle": pickle.dumps(_Payload(corpus.touch("npy-pickle"))),
        "call": npy(f"__import__('os').system({corpus.touch('npy-call')!r})"),
        "shape": npy("{'descr': '<f2', 'fortran_order': False, 'shape': (1000000000000, 16), }"),
        "negative": npy("{'descr': '<f2', 'fortran_order': False, 'shape': (-1, 16), }"),
        "descr": npy("{'descr': 'O', 'fortran_order': False, 'shape': (1,), }"),
        "nested": npy("(" * 90),
        "empty": b"",
    }.items():
        corpus.add(f"stored-{name}", "stored", lambda path, raw=raw: _teacher(path, raw))
    for name, manifest in {
        "above": b'{"of": {}, "weights": "x", "widths": {}, "outputs": ["../../../etc/passwd"]}',
        "number": b'{"of": {}, "weights": "x", "widths": {}, "outputs": [5]}',
        "list": b"[]",
        "pickle": pickle.dumps(_Payload(corpus.touch("teacher"))),
    }.items():
        corpus.add(f"stored-manifest-{name}", "stored", lambda path, m=manifest: _teacher(path, b"", m))


def _teacher(path: Path, raw: bytes, manifest: bytes = b"") -> None:
    wanted = {"of": {}, "weights": "x", "widths": {"embedding": 16}, "outputs": ["embedding"]}
    (path / "teacher.json").write_bytes(manifest or json.dumps(wanted).encode())
    (path / "embedding.npy").write_bytes(raw)


def _packed(corpus: Corpus) -> None:
    def write(raw: bytes, name: str) -> Callable[[Path], str]:
        def put(path: Path) -> str:
            (path / name).write_bytes(raw)
            return str(path / name)

        return put

    import gzip
    import lzma

    linked = _member(b"a.png", b"", b"2", b"/etc/passwd") + END
    corpus.add("build-links", "build", write(gzip.compress(linked), "x.tar.gz"))
    corpus.add("build-traversal", "build", write(gzip.compress(_member(b"../../x.png") + END), "x.tar.gz"))
    corpus.add("build-damaged-xz", "build", write(lzma.compress(linked)[:40], "x.tar.xz"))
    corpus.add("build-class", "build", lambda path: "os.system")
    corpus.add("build-base-class", "build", lambda path: "VisionDataset")


# Running them


def _run(attack: Attack, scratch: Path) -> str:
    """Hand it to the entry; the answer is what was said, "read" if nothing was refused."""
    target = attack.target
    if attack.entry == "load":
        load_encoder(target)
        return "read"
    if attack.entry == "weights":
        load_weights(tiny_encoder(), target, TINY.get("name", "vit_tiny_patch16_224"))
        return "read"
    if attack.entry == "stored":
        config = DistillConfig(teacher="x", stored=target, augmentations=1)
        StoredTeacher(Path(target), config)(torch.tensor([0]), torch.device("cpu"))
        return "read"
    if attack.entry == "import":  # what the command's own process does; here, so that the hook sees it
        try:
            return foreign.convert(Path(target), scratch / "out.safetensors", None, "")[0]
        except foreign.Refused as refusal:
            raise DataError(f"{target}: {refusal}") from None
    words = {
        "pretrain": [["pretrain", target]],
        "index": [["shards", "index", target]],
        "check": [["shards", "check", target]],
        "index and check": [["shards", "index", target], ["shards", "check", target]],
        "build": [["shards", "build", target, str(scratch / "built")]],
    }[attack.entry]
    told = io.StringIO()
    for command in words:
        with contextlib.redirect_stderr(told), contextlib.redirect_stdout(io.StringIO()):
            code = cli.main(command)
        if code not in {0, 2, 65, 70, 74, 75}:
            raise AssertionError(f"exit code {code}")
    return told.getvalue().strip() or "read"


def run_attack(attack: Attack, folder: Path) -> Result:
    """One attack, with its time, memory, and whether a payload ran. `folder` is the one that `attacks` wrote."""
    canary, scratch = folder / "canary", folder / "scratch"
    scratch.mkdir(exist_ok=True)
    before = os.getcwd()
    os.chdir(scratch)
    told = strange = ""
    base = _resident(reset=True)
    start = time.monotonic()
    try:
        with _clock(SECONDS):
            told = _run(attack, scratch)
    except SelfsightError as error:
        told = str(error)
    except Overdue:
        told = "not within the time"
    except BaseException as error:  # noqa: BLE001 - this is what is looked for; SystemExit and MemoryError, too
        strange = f"{attack.name}: {type(error).__name__}: {str(error)[:200]}"
    seconds, memory = time.monotonic() - start, _resident() - base
    os.chdir(before)
    executed = any(canary.iterdir())
    for file in canary.iterdir():
        file.unlink()
    return Result(attack.name, told, strange, executed, seconds, memory)


def attack_all(folder: Path, written: list[Attack] | None = None) -> dict[str, Any]:
    """Every attack in this process. `folder` must not exist yet, unless the attacks are already `written` there."""
    found = [run_attack(attack, folder) for attack in written or attacks(folder)]
    return {
        "attacks": len(found),
        "attacks_executed": sum(one.executed for one in found),
        "executed": [one.name for one in found if one.executed],
        "over_time": [f"{one.name}: {one.seconds:.1f} s" for one in found if one.seconds > SECONDS],
        "over_memory": [f"{one.name}: {one.megabytes:.0f} MB" for one in found if one.megabytes > MEGABYTES],
        "not_ours": [one.strange for one in found if one.strange],
        "slowest": sorted((round(one.seconds, 2), one.name) for one in found)[-10:],
        "told": {one.name: one.told for one in found},
    }


@contextlib.contextmanager
def _clock(seconds: float) -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise Overdue

    old = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def _resident(reset: bool = False) -> float:
    """Peak resident memory in MB; `reset` starts a new peak. 0 where there is no Linux to ask."""
    if not Path("/proc/self/clear_refs").exists():
        return 0.0
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024
