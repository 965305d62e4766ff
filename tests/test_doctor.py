"""What `selfsight doctor` must see: each defect is put into a small set or recipe, and the finding that names it is looked for."""

import json
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from selfsight import doctor as subject
from selfsight.assemble import assemble
from selfsight.cli import main
from selfsight.data import jpeg
from selfsight.data.build import write_shards
from selfsight.data.packing import Encoding, Sample
from selfsight.doctor import Finding, examine
from selfsight.memory import Kept
from selfsight.recipe import validate

Images = list[tuple[Image.Image, int]]


def noisy(count: int, seed: int = 0, size: int = 16) -> Images:
    made = np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), np.uint8)
    return [(Image.fromarray(pixels), i % 3) for i, pixels in enumerate(made)]


def recipe_tree(folder: Path, **sections: Any) -> dict[str, Any]:
    tree: dict[str, Any] = {
        "run_dir": str(folder.parent / "run"),
        "data": {"train": str(folder)},
        "encoder": {"image_size": 16, "patch": 8, "width": 16, "depth": 1, "heads": 2},
        "objective": {"name": "mae", "decoder_width": 8, "decoder_depth": 1, "decoder_heads": 2},
        "train": {"steps": 200, "batch_size": 8, "device": "cpu", "workers": 0},
    }
    for name, fields in sections.items():
        tree[name] = tree.get(name, {}) | fields
    return tree


@pytest.fixture
def found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Finding]]:
    monkeypatch.setattr(subject, "STEP_SECONDS", 0.2)

    def look(images: Images, **sections: Any) -> dict[str, Finding]:
        folder = tmp_path / "shards"
        folder.mkdir()
        write_shards(iter(images), folder, "s", per_shard=1000)
        return {finding.topic: finding for finding in examine(validate(recipe_tree(folder, **sections), "test"))}

    return look


def test_a_healthy_run_has_nothing_in_its_way(found: Callable[..., dict[str, Finding]]) -> None:
    seen = found(noisy(60))
    assert {finding.level for finding in seen.values()} == {"ok"}
    assert "60 samples in 1 shards" in seen["data"].told
    assert "7.5 steps an epoch" in seen["schedule"].told
    assert "images/s" in seen["rates"].told


def copies() -> Images:
    return [*noisy(40), *noisy(20)]


def one_colour() -> Images:
    return [*noisy(30), *((Image.new("RGB", (16, 16), (i, i, i)), 0) for i in range(30))]


def in_order() -> Images:
    return [(image, i // 20) for i, (image, _) in enumerate(noisy(60))]


def dark() -> Images:
    return [(image.point(lambda value: value // 64), label) for image, label in noisy(60)]


def large() -> Images:
    return noisy(40, size=80)


@pytest.mark.parametrize(
    ("images", "sections", "topic", "level", "told"),
    [
        (copies, {}, "duplicates", "warning", "20 of 60 samples are exact copies"),
        (one_colour, {}, "images", "warning", "30 of 60 images are one constant value"),
        (in_order, {}, "order", "ok", "3 runs of 3 labels"),
        (dark, {}, "statistics", "warning", "give data.mean and data.std"),
        (large, {}, "sizes", "note", "--short-side 16 would make decoding cheap"),
        (lambda: noisy(40, size=8), {}, "sizes", "note", "most images are enlarged"),
        (lambda: noisy(40), {"train": {"steps": 20}}, "schedule", "warning", "too few"),
        (
            lambda: noisy(40),
            {"encoder": {"channels": 5}, "data": {"mean": [0.5] * 5, "std": [0.5] * 5}},
            "images",
            "problem",
            "40 of 40 images cannot be used",
        ),
    ],
)
def test_each_defect_is_seen(
    found: Callable[..., dict[str, Finding]],
    images: Callable[[], Images],
    sections: dict[str, Any],
    topic: str,
    level: str,
    told: str,
) -> None:
    seen = found(images(), **sections)
    assert seen[topic].level == level, seen[topic]
    assert told in seen[topic].told


def test_test_images_among_the_others_are_seen(tmp_path: Path, found: Callable[..., dict[str, Finding]]) -> None:
    write_shards(iter([*noisy(10), *noisy(30, seed=5)]), tmp_path, "test", per_shard=1000)
    spec = str(tmp_path / "test-000000.tar")
    seen = found(noisy(40), eval={"train": str(tmp_path / "shards"), "test": spec, "k": [5]})
    assert seen["overlap"].level == "warning"
    assert seen["overlap"].told.startswith("10 of 40 images of eval.test are in eval.train")


def test_memory_and_disk_are_compared_with_what_is_there(
    found: Callable[..., dict[str, Finding]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subject, "free_memory", lambda device: 2**14)
    monkeypatch.setattr(subject, "disk_usage", lambda path: type("Usage", (), {"free": 2**16}))
    seen = found(noisy(40))
    assert seen["memory"].level == "warning"
    assert "raise train.accumulate" in seen["memory"].told
    assert seen["disk"].level == "problem"


def test_memory_is_what_a_run_reckons_with(
    found: Callable[..., dict[str, Finding]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The estimate of `selfsight.memory`, for the images of a micro-batch and the blocks that the recipe recomputes."""
    asked: list[Any] = []

    class Told(Kept):
        def needed(self, images: int, depth: int, recomputed: int) -> float:
            asked.append((images, depth, recomputed))
            return 3 * 2**30 if recomputed < depth else 2**30

    monkeypatch.setattr(subject, "measure", lambda *_: Told(1.0, 1.0, 1.0))
    monkeypatch.setattr(subject, "free_memory", lambda device: 2 * 2**30)
    seen = found(noisy(40), train={"accumulate": 2})
    assert asked[0] == (4, 1, 0)
    assert seen["memory"].level == "warning"
    assert "about 3.0 GiB a rank with 4 images at once, 2.0 GiB free" in seen["memory"].told
    assert seen["memory"].told.endswith("raise train.accumulate, or set train.checkpoint_blocks")


def test_the_command_prints_a_table_or_json_and_ends_with_the_runs_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subject, "STEP_SECONDS", 0.2)
    write_shards(iter(noisy(40)), tmp_path, "s", per_shard=1000)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(recipe_tree(tmp_path / "s-000000.tar")))
    assert main(["doctor", str(recipe)]) == 0
    assert "40 samples in 1 shards" in capsys.readouterr().out
    given = ["--data.mean", str([0.5] * 7), "--data.std", str([0.5] * 7)]
    assert main(["doctor", str(recipe), "--json", "--encoder.channels", "7", *given]) == 65
    kinds = {item["topic"]: item["level"] for item in json.loads(capsys.readouterr().out)}
    assert kinds["images"] == "problem"
    assert main(["doctor", str(recipe), "--train.batch_size", "64"]) == 2
    assert "has only 40" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("side", "form", "library", "told"),
    [
        (16, "png", True, "selfsight shards cache {spec} --channels 3 would"),
        (80, "jpeg", True, "more train.workers"),
        (80, "jpeg", False, "selfsight[fast]"),
        (80, "png", False, "more train.workers"),
    ],
)
def test_slow_data_get_advice_that_fits_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side: int, form: str, library: bool, told: str
) -> None:
    write_shards((Sample(*one) for one in noisy(10, size=side)), tmp_path, "s", Encoding(format=form))
    spec = str(tmp_path / "s-000000.tar")
    parts = assemble(validate(recipe_tree(Path(spec)), "test"), torch.device("cpu"))
    if not library:
        monkeypatch.setattr(jpeg, "library", lambda: None)
    assert told.format(spec=spec) in subject.faster_data(parts, parts.batches())


def test_small_images_that_are_decoded_already_need_no_smaller_shards(tmp_path: Path) -> None:
    write_shards((Sample(*one) for one in noisy(10, size=16)), tmp_path, "s", Encoding(format="png"))
    spec = str(tmp_path / "s-000000.tar")
    assert main(["shards", "cache", spec]) == 0
    parts = assemble(validate(recipe_tree(Path(spec)), "test"), torch.device("cpu"))
    batches = parts.batches()
    assert batches.cache
    assert subject.faster_data(parts, batches) == "more train.workers"
    assert subject.faster_data(parts, batches, more_workers=False).startswith("more cores")


def test_an_index_of_an_older_release_knows_no_duplicates(
    found: Callable[..., dict[str, Finding]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("selfsight.data.samples.fingerprint", lambda body: 0)
    seen = found(copies())
    assert seen["duplicates"].level == "note"
    assert "not known: an index is of an older release" in seen["duplicates"].told


def test_repeats_show_fewer_samples(found: Callable[..., dict[str, Finding]]) -> None:
    seen = found(noisy(800), data={"repeat": 8}, train={"batch_size": 8, "steps": 150})
    assert "each sample comes 0.2 times, 8 views at once" in seen["schedule"].told
    assert seen["schedule"].level == "note"


def test_each_set_of_a_mixture_is_normalised_by_its_own(tmp_path: Path) -> None:
    mix = []
    for name, shift in (("dark", 0), ("light", 150)):
        pixels = [(image.point(lambda value, add=shift: value // 4 + add), 0) for image, _ in noisy(30, seed=shift)]
        write_shards(iter(pixels), tmp_path, name, per_shard=100)
        mean = (31.5 + shift) / 255
        mix.append({"train": str(tmp_path / f"{name}-000000.tar"), "mean": [mean] * 3, "std": [18.5 / 255] * 3})
    tree = recipe_tree(tmp_path / "x.tar") | {"data": {"mix": mix}}
    parts = assemble(validate(tree, "test"), torch.device("cpu"))
    seen = {finding.topic: finding for finding in subject.of_images(parts)}
    assert seen["statistics"].level == "ok", seen


def jpeg_of(image: Image.Image) -> bytes:
    out = BytesIO()
    image.save(out, "JPEG")
    return out.getvalue()


def test_a_bad_first_sample_does_not_end_the_advice(tmp_path: Path) -> None:
    cut, *others = (jpeg_of(image) for image, _ in noisy(10, size=80))
    write_shards(((body, 0) for body in (cut[:900], *others)), tmp_path, "s")
    parts = assemble(validate(recipe_tree(tmp_path / "s-000000.tar"), "test"), torch.device("cpu"))
    assert subject.faster_data(parts, parts.batches()) == "more train.workers, or shards built with --short-side"


def test_images_of_few_levels_and_clips_are_told(tmp_path: Path, found: Callable[..., dict[str, Finding]]) -> None:
    deep = [
        (Image.fromarray((np.random.default_rng(i).random((16, 16)) * 4095).astype(np.uint16)), 0) for i in range(40)
    ]
    seen = found(deep, encoder={"channels": 1, "image_size": 16})  # type: ignore[arg-type]
    assert seen["values"].level == "warning"
    assert "brightest value of all is 16 of 255" in seen["values"].told


def test_a_view_of_clips_shows_one_frame(found: Callable[..., dict[str, Finding]]) -> None:
    frames = [[image for image, _ in noisy(5, seed=clip)] for clip in range(20)]
    seen = found([Sample(clip, None) for clip in frames])  # type: ignore[misc]
    assert seen["clips"] == Finding("note", "clips", "clips of up to 5 frames; a view shows 1 of them")
