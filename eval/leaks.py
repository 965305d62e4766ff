"""Test images that were seen before: in train, nearly so in train, or in what the encoder was pretrained on."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from selfsight.data.shards import Shards
from selfsight.errors import SelfsightError
from selfsight.eval.phash import near
from selfsight.redact import HIDDEN, redact


def shared(first: np.ndarray | None, second: np.ndarray | None) -> np.ndarray | None:
    """Which of the second prints (M,) are among the first; None where contents are not known by prints."""
    return None if first is None or second is None else np.isin(second, first)


def prints_of(shards: Shards) -> np.ndarray | None:
    """Size and fingerprint of every image; None with an index of an older release."""
    return shards.prints if shards.fingerprinted else None


def same_in_train(train: np.ndarray | None, test: np.ndarray | None) -> Iterator[str]:
    """A warning about test images that are in train.

    Args:
        train, test: prints of both sets, (N,) and (M,).
    """
    same = shared(train, test)
    if same is not None and same.any():
        yield f"{int(same.sum()):,} of the {len(same):,} test images are in train, too; their score is worth little"


def alike_in_train(
    train: np.ndarray | None, test: np.ndarray | None, train_hashes: Tensor | None, test_hashes: Tensor | None
) -> Iterator[str]:
    """A warning about test images that are nearly the same as one of train, those left out that are the same.

    Args:
        train, test: prints of both sets, (N,) and (M,).
        train_hashes, test_hashes: (N, 72) and (M, 72) from `phash`.
    """
    if train_hashes is None or test_hashes is None:
        return
    alike, same = near(train_hashes, test_hashes), shared(train, test)
    alike = alike if same is None else alike & ~same
    if alike.any():
        yield (
            f"{int(alike.sum()):,} of the {len(alike):,} test images look nearly the same as one of train (perceptual hash); "
            "their score is worth little if they are the same scene"
        )


def pretraining_warnings(source: str | Path, tests: Sequence[Shards]) -> Iterator[str]:
    """Warnings about test images that the encoder has seen while it was pretrained, and whether that could be told.

    Args:
        source: whatever the encoder was loaded from. Only a run, an export and a checkpoint say what they were trained on.
    """
    spec = pretraining_of(Path(source))
    if spec is None:
        return
    where = redact(" + ".join(part if isinstance(part, str) else " ".join(part) for part in spec))
    try:
        if HIDDEN in where:
            raise SelfsightError("its address was stored without what opens it")
        seen = [prints_of(Shards(part)) for part in spec]
    except (SelfsightError, OSError) as error:
        told = str(error).splitlines()[0]
        yield f"whether test images were used for pretraining is not known: {where} cannot be read ({told})"
        return
    known = [prints for prints in seen if prints is not None]
    for test in tests:
        same = shared(np.concatenate(known), prints_of(test)) if len(known) == len(seen) else None
        if same is not None and same.any():
            yield (
                f"{int(same.sum()):,} of the {len(same):,} images of {redact(test.spec)} were used for pretraining "
                "(without labels); say so where you cite the score"
            )


def pretraining_of(source: Path) -> list[str | list[str]] | None:
    """The data SPECs of the run behind an encoder, as its export or checkpoint tells them; None where nothing does."""
    files = [source / "encoder" / "config.json", source / "config.json", source / "state.json"]
    if (source / "checkpoints").is_dir():
        files += sorted(source.glob("checkpoints/step-*/state.json"), reverse=True)[:1]
    for file in files:
        try:
            found: Any = json.loads(file.read_text())
            recipe = found["recipe"] if file.name == "state.json" else found["selfsight"]["recipe"]
            data = recipe["data"]
            spec = [data["train"]] if data.get("train") else [part["train"] for part in data["mix"]]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue  # an export by hand, or timm's; `load_encoder` has looked at the file already
        if all(isinstance(part, str) or (isinstance(part, list) and all(map(_is_text, part))) for part in spec):
            return spec
    return None


def _is_text(value: object) -> bool:
    return isinstance(value, str)
