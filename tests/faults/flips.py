"""Single flipped bits and cuts in every kind of file that we write: each must be seen, or change nothing that is read.

found = flip_all(folder, 10_000, seed=0)      # importable without pytest; benchmarks use it, too
"""

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from selfsight import checkpoint
from selfsight.data.build import write_shards
from selfsight.data.shards import Shards
from selfsight.encoder import Encoder, build_encoder, preprocessing_of
from selfsight.errors import SelfsightError
from selfsight.exports.export import _write, seal
from selfsight.loading import load_encoder
from selfsight.recipe import DataConfig, EncoderConfig

SAMPLES = 4


class Kind(NamedTuple):
    """Files that are damaged, and a reading of them that can be compared."""

    files: list[Path]
    read: Callable[[], Any]


def kinds(folder: Path) -> dict[str, Kind]:
    """A small shard with its index, a checkpoint, an export: written below an empty folder, best one in memory."""
    for name in ("shards", "checkpoints", "export"):
        (folder / name).mkdir(parents=True)
    rng = np.random.default_rng(0)
    images = [(Image.fromarray(rng.integers(0, 256, (6, 6), np.uint8)), i % 2) for i in range(SAMPLES)]
    write_shards(iter(images), folder / "shards", "s")
    (shard,) = (folder / "shards").glob("*.tar")
    tensors = {name: {"a.weight": torch.randn(3, 4), "a.bias": torch.randn(4)} for name in ("model", "optim", "ema")}
    saved = checkpoint.save(folder / "checkpoints", 7, {"recipe": {"seed": 1}, "fingerprint": {}}, tensors, keep=2)
    config = EncoderConfig(image_size=8, channels=1, patch=4, width=8, depth=1, heads=2)
    _write(build_encoder(config, preprocessing_of(DataConfig(train="x"), config), 0), folder / "export", {"note": "x"})
    seal(folder / "export")
    return {
        "shard": Kind([shard], lambda: _samples(shard)),
        "index": Kind([shard.with_name(shard.name + ".idx")], lambda: _samples(shard)),
        "checkpoint": Kind(sorted(saved.iterdir()), lambda: _flat_checkpoint(saved)),
        "export": Kind(sorted((folder / "export").iterdir()), lambda: _flat_encoder(load_encoder(folder / "export"))),
    }


def flip_all(folder: Path, tries: int, seed: int = 0) -> dict[str, Any]:
    """Damage one file `tries` times, the kinds in turn, and read what it belongs to.

    Returns:
        `flips` made, `flips_silent` (something else than the original was read without an error), and both, with those that
        were seen, `by_kind`.
    """
    made = kinds(folder)
    originals = {name: kind.read() for name, kind in made.items()}
    rng = random.Random(seed)
    counts: Counter[tuple[str, str]] = Counter()
    silent: list[str] = []
    for i in range(tries):
        name = [*made][i % len(made)]
        file = rng.choice(made[name].files)
        whole = file.read_bytes()
        file.write_bytes(damaged := damage(whole, rng))
        outcome = judge(made[name], originals[name])
        file.write_bytes(whole)
        counts[name, outcome] += 1
        if outcome == "silent":
            silent.append(f"{name}: {file.name}, {_difference(whole, damaged)}")
    return {
        "flips": tries,
        "flips_silent": len(silent),
        "silent": silent[:20],
        "by_kind": {n: {what: counts[n, what] for what in ("seen", "harmless", "silent")} for n in made},
    }


def damage(whole: bytes, rng: random.Random) -> bytes:
    """One bit the other way, or, one time in eight, the end cut off."""
    if rng.random() < 1 / 8:
        return whole[: rng.randrange(len(whole))]
    place = rng.randrange(len(whole))
    return whole[:place] + bytes([whole[place] ^ 1 << rng.randrange(8)]) + whole[place + 1 :]


def judge(kind: Kind, original: Any) -> str:
    """Whether damage was seen (an error of ours), is harmless (the same was read), or passed in silence."""
    try:
        return "harmless" if kind.read() == original else "silent"
    except SelfsightError:
        return "seen"


def _samples(shard: Path) -> list[Any]:
    """Labels and every sample's bytes. A sample that fails its CRC raises, as it does in training, where it is replaced."""
    shards = Shards(str(shard))
    found = [(int(label), shards.read(i)) for i, label in enumerate(shards.labels)]
    shards.close()
    return found


def _flat_checkpoint(folder: Path) -> tuple[Any, ...]:
    saved = checkpoint.load(folder)
    return saved.state, {
        f"{f}/{n}": t.numpy().tobytes() for f, group in saved.tensors.items() for n, t in group.items()
    }


def _flat_encoder(encoder: Encoder) -> tuple[Any, ...]:
    weights = {name: tensor.numpy().tobytes() for name, tensor in encoder.state_dict().items()}
    return encoder.config, encoder.preprocessing, weights


def _difference(whole: bytes, damaged: bytes) -> str:
    if len(whole) != len(damaged):
        return f"cut at {len(damaged)} of {len(whole)}"
    place = next(i for i, (a, b) in enumerate(zip(whole, damaged, strict=True)) if a != b)
    return f"byte {place}: {whole[place]:#04x} became {damaged[place]:#04x}"
