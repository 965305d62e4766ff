"""Flipped bits and cut files are seen; and the looking itself can fail."""

import random
from pathlib import Path

import flips
import pytest

from selfsight import checkpoint
from selfsight.errors import StorageError


def test_no_damage_passes_in_silence(tmp_path: Path) -> None:
    found = flips.flip_all(tmp_path / "x", 400, seed=0)
    assert found["silent"] == []
    assert found["flips"] == sum(sum(kind.values()) for kind in found["by_kind"].values()) == 400
    for name in ("index", "checkpoint", "export"):
        assert found["by_kind"][name] == {"seen": 100, "harmless": 0, "silent": 0}
    # A tar has headers and padding that no sample's bytes depend on.
    assert found["by_kind"]["shard"]["seen"] > 5


def test_every_byte_of_a_sample_and_every_cut_of_a_shard(tmp_path: Path) -> None:
    kind = flips.kinds(tmp_path / "x")["shard"]
    original, (shard,) = kind.read(), kind.files
    whole = shard.read_bytes()
    body = original[1][1]
    start = whole.index(body)
    for place in range(start, start + len(body)):
        shard.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        assert flips.judge(kind, original) == "seen"
    for size in range(0, len(whole), 257):
        shard.write_bytes(whole[:size])
        assert flips.judge(kind, original) == "seen"


@pytest.mark.parametrize(
    ("what", "kind"), [("selfsight.checkpoint.manifest_problem", "checkpoint"), ("selfsight.loading.require_whole", "export")]
)  # fmt: skip
def test_without_the_digest_damage_would_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, kind: str
) -> None:
    monkeypatch.setattr(what, lambda *_: None)
    made = flips.kinds(tmp_path / "x")[kind]
    original = made.read()
    (model,) = (file for file in made.files if file.name == "model.safetensors")
    whole = model.read_bytes()
    model.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert flips.judge(made, original) == "silent"


def test_damage_is_one_bit_or_a_cut() -> None:
    rng, whole = random.Random(0), bytes(range(200))
    for _ in range(300):
        made = flips.damage(whole, rng)
        if len(made) < len(whole):
            assert whole.startswith(made)
        else:
            assert sum((a ^ b).bit_count() for a, b in zip(made, whole, strict=True)) == 1


def test_a_damaged_export_is_named(tmp_path: Path) -> None:
    flips.kinds(tmp_path / "x")
    folder = tmp_path / "x" / "export"
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"note": "x"', '"note": "y"'))
    with pytest.raises(StorageError, match=r"export: config.json is damaged; copy or export it again"):
        flips.load_encoder(folder)
    config.unlink()
    assert "config.json" in (checkpoint.manifest_problem(folder, set()) or "")
    (folder / checkpoint.MANIFEST).write_text("{}")
    assert checkpoint.manifest_problem(folder, {"b", "a"}) == "lacks a, b"
