"""Two gloo ranks that share out the weights: what they learn is what DDP learns, and their files are the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from launch import Job
from safetensors.torch import load_file
from sharded import both, go_on

from selfsight.assemble import assemble
from selfsight.errors import UsageError
from selfsight.metrics import TIMING
from selfsight.processes import join
from selfsight.recipe import load
from selfsight.run_folder import read_lines
from selfsight.sharding import LARGE, sharded_by
from selfsight.train import train

Fields = dict[str, Any]
COMMON: Fields = {
    "encoder.width": 16, "encoder.heads": 2, "encoder.depth": 2, "train.epochs": None, "train.steps": 6,
    "train.batch_size": 8, "train.log_every": 1, "train.save_every": 3, "train.keep": 9, "train.workers": 0,
    "train.accumulate": 2, "optim.clip": 0.05, "eval.train": None, "eval.test": None, "train.timeout": 60,
}  # fmt: skip
# Shards are uneven and empty, too: 17 prototypes, and tokens whose first dimension is 1.
RUNS: dict[str, Fields] = {
    "mae": {"objective.decoder_width": 16, "objective.decoder_depth": 2, "train.ema": 0.9, "encoder.drop_path": 0.3},
    "dino": {
        "objective.outputs": 17, "objective.head_width": 8, "objective.bottleneck": 8, "objective.koleo": 0.1,
        "objective.freeze_prototypes": 0.2, "train.checkpoint_blocks": True, "encoder.drop_path": 0.3,
    },
    "vicreg": {"objective.expander_width": 16, "train.checkpoint_blocks": True, "train.accumulate": 1, "optim.lr": 1e-4},
    "joint": {},
}  # fmt: skip
OTHERS: dict[str, tuple[str, Fields]] = {
    "bf16": ("mae", {"train.precision": "bf16", "train.steps": 4, "train.accumulate": 1}),
    "poisoned": (
        "dino",
        {"train.accumulate": 1, "train.steps": 14, "train.save_every": 20, "train.log_every": 20, "train.ema": 0.9},
    ),
}


class Found(NamedTuple):
    """What the runs left."""

    folder: Path
    noted: dict[str, list[dict[str, Any]]]
    """By run, what each rank noted."""
    fields: dict[str, Fields]


EXPENSIVE = ("vicreg", "joint")
NAMES = [pytest.param(name, marks=pytest.mark.slow) if name in EXPENSIVE else name for name in RUNS]


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest, small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """Every run under ddp and fsdp, and runs that change from one to the other after step 3.

    The expensive ones only where their tests are asked for.
    """
    folder = tmp_path_factory.mktemp("sharded")
    own = [item for item in request.session.items if item.path == request.path]
    asked = {item.callspec.params.get("name") for item in own if hasattr(item, "callspec")}
    jobs: dict[str, dict[str, Any]] = {}

    def job(name: str, recipe: str, parallel: str, fields: Fields, **more: Any) -> None:
        given = COMMON | {"data.train": str(small_shards)} | fields
        given |= {"run_dir": str(folder / name), "train.parallel": parallel}
        jobs[name] = {"recipe": f"digits/{recipe}", "fields": given, **more}

    for parallel in ("ddp", "fsdp"):
        for recipe, fields in RUNS.items():
            if recipe not in EXPENSIVE or recipe in asked:
                job(f"{recipe}, {parallel}", recipe, parallel, fields)
        for name, (recipe, fields) in OTHERS.items():
            more: dict[str, Any] = {"poison": 12} if name == "poisoned" else {}
            more |= {"late": True} if name == "poisoned" and parallel == "fsdp" else {}
            job(f"{name}, {parallel}", recipe, parallel, RUNS[recipe] | fields, **more)
    if any(item.originalname == "test_compiled_shards_learn_the_same" for item in own):
        job("compiled, fsdp", "mae", "fsdp", RUNS["mae"] | {"train.compile": True, "train.steps": 3})
    job("to fsdp", "mae", "fsdp", RUNS["mae"], copy=str(folder / "mae, ddp"))
    norms = {"encoder.name": "resnet10t", "encoder.pool": "mean", "encoder.patch": None, "encoder.width": None}
    norms |= {"encoder.depth": None, "encoder.heads": None, "encoder.positions": "learned", "encoder.image_size": 32}
    job("batch norms", "rotation", "fsdp", norms)
    ranks = both(list(jobs.values()), folder)
    noted = {name: [rank[number] for rank in ranks] for number, name in enumerate(jobs)}
    return Found(folder, noted, {name: made["fields"] for name, made in jobs.items()})


def learned(folder: Path) -> list[dict[str, Any]]:
    """The metrics without the wall-clock fields."""
    return [{k: v for k, v in line.items() if k not in TIMING} for line in read_lines(folder / "metrics.jsonl")]


def tensors(folder: Path, step: int, name: str = "model") -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / f"step-{step:08d}" / f"{name}.safetensors")


def assert_same_lines(one: Path, other: Path, tolerance: float = 1e-5, steps: int = 6) -> None:
    first, second = learned(one), learned(other)
    assert len(first) == len(second) == steps
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            least = tolerance if key != "alpha" else 2e-3  # which is written with three digits
            assert a[key] == pytest.approx(b[key], abs=least, rel=tolerance, nan_ok=True), (a["step"], key)


def assert_same_files(one: Path, other: Path, step: int, tolerance: float = 1e-4) -> None:
    """Names, types and shapes are equal, values but for rounding, which AdamW makes large for a gradient of 0 (keys' bias)."""
    names = sorted(path.name for path in (one / "checkpoints" / f"step-{step:08d}").iterdir())
    assert names == sorted(path.name for path in (other / "checkpoints" / f"step-{step:08d}").iterdir())
    for name in (name.removesuffix(".safetensors") for name in names if name.endswith(".safetensors")):
        a, b = tensors(one, step, name), tensors(other, step, name)
        assert a.keys() == b.keys()
        for key in a:
            assert a[key].shape == b[key].shape and a[key].dtype == b[key].dtype
            assert "qkv.bias" in key or torch.allclose(a[key], b[key], atol=tolerance), (name, key)


@pytest.mark.parametrize("name", NAMES)
def test_shards_learn_what_ddp_learns(name: str, found: Found) -> None:
    """Losses, terms and gradient norms to 1e-5; checkpoints tensor by tensor."""
    assert all(noted["sharded"] for noted in found.noted[f"{name}, fsdp"])
    assert not any(noted["sharded"] for noted in found.noted[f"{name}, ddp"])
    assert_same_lines(found.folder / f"{name}, ddp", found.folder / f"{name}, fsdp")
    for step in (1, 3, 6):
        assert_same_files(found.folder / f"{name}, ddp", found.folder / f"{name}, fsdp", step)


@pytest.mark.parametrize("name", NAMES)
def test_each_rank_keeps_half(name: str, found: Found) -> None:
    """Of weights and moments; that an average is sharded, too, its own file says."""
    for what in ("weights", "moments"):
        (all_of_it, again), shares = (
            [noted[what] for noted in found.noted[f"{name}, {parallel}"]] for parallel in ("ddp", "fsdp")
        )
        assert all_of_it == again == sum(shares) > 0
        assert max(shares) < 0.55 * all_of_it


def test_a_run_under_ddp_goes_on_in_shards(found: Found) -> None:
    assert_same_lines(found.folder / "mae, ddp", found.folder / "to fsdp")
    assert_same_files(found.folder / "mae, ddp", found.folder / "to fsdp", 6)


def test_a_sharded_run_goes_on_alone(found: Found, tmp_path: Path) -> None:
    """One process has nothing to share, and takes the same recipe."""
    go_on(tmp_path / "alone", found.folder / "mae, fsdp")
    recipe = load("digits/mae", found.fields["mae, fsdp"] | {"run_dir": str(tmp_path / "alone")})
    accelerator = join(recipe)
    parts = assemble(recipe, accelerator.device)
    assert recipe.train.parallel == "fsdp" and not parts.sharded
    train(parts, accelerator)
    assert_same_lines(found.folder / "mae, ddp", tmp_path / "alone")
    assert_same_files(found.folder / "mae, ddp", tmp_path / "alone", 6)


def test_what_is_scored_is_whole_on_the_first_rank(found: Found) -> None:
    for name in (name for name in RUNS if f"{name}, fsdp" in found.noted):
        first, second = found.noted[f"{name}, fsdp"]
        assert first["scored is exported"] and not second["scored"]


def test_a_step_that_is_not_finite_on_one_rank_touches_no_shard(found: Found) -> None:
    """Under fsdp it is the device's word that spares weights, moments, teacher and average; under ddp the host's."""
    for parallel in ("ddp", "fsdp"):
        assert [noted["left out"] for noted in found.noted[f"poisoned, {parallel}"]] == [[12], [12]]
    assert_same_files(found.folder / "poisoned, ddp", found.folder / "poisoned, fsdp", 14)


def test_blocks_compute_in_bfloat16_and_are_kept_in_float32(found: Found) -> None:
    """Losses differ from DDP's by what norms and layer scales lose in 8 bits of mantissa: below 1 % here."""
    for noted in found.noted["bf16, fsdp"]:
        assert (noted["computed in"], noted["kept in"]) == (["torch.bfloat16"], ["torch.float32"])
    assert found.noted["mae, fsdp"][0]["computed in"] == ["torch.float32"]
    assert_same_lines(found.folder / "bf16, ddp", found.folder / "bf16, fsdp", 1e-2, steps=4)
    assert {value.dtype for value in tensors(found.folder / "bf16, fsdp", 4).values()} == {torch.float32}


@pytest.mark.slow
def test_compiled_shards_learn_the_same(found: Found) -> None:
    """Dynamo's graphs of blocks that are gathered before they run, here without a compiler behind them."""
    assert all(noted["graphs"] >= 3 for noted in found.noted["compiled, fsdp"])
    assert not any(noted["graphs"] for noted in found.noted["mae, fsdp"])
    one, other = (learned(found.folder / name) for name in ("mae, fsdp", "compiled, fsdp"))
    assert other[0]["loss"] == one[0]["loss"] and len(other) == 3
    assert other[0]["grad_norm"] == pytest.approx(one[0]["grad_norm"], rel=1e-5)


def test_batch_norms_and_fixed_sums_are_refused(found: Found) -> None:
    assert "train.parallel: fsdp: this encoder has batch norms" in found.noted["batch norms"][0]["refused"]
    with pytest.raises(UsageError, match="deterministic and parallel fsdp"):
        load("digits/mae", {"train.parallel": "fsdp", "train.deterministic": 8})


@pytest.mark.slow
def test_a_sharded_run_is_watched_and_exported(start: Callable[..., Job], tmp_path: Path, small_shards: Path) -> None:
    """The whole command; that kNN is watched on the first rank while the second one helps."""
    fields = {"eval.train": str(small_shards), "eval.every": 4, "eval.k": "[5, 10]"}
    fields |= {"train.ema": "0.5", "train.steps": "10", "train.parallel": "fsdp"}
    job = start(2, fields=fields)
    assert job.wait(90) == [0, 0], job.told()
    folder = tmp_path / "run"
    assert [line["step"] for line in read_lines(folder / "metrics.jsonl") if "knn" in line] == [4, 8, 10]
    exported = load_file(folder / "encoder" / "model.safetensors")
    average = {name.removeprefix("backbone."): value for name, value in tensors(folder, 10, "ema").items()}
    assert exported.keys() == average.keys() and all(torch.equal(exported[key], average[key]) for key in average)
    assert (folder / "scores.json").exists()


def test_auto_shards_large_encoders_on_several_gpus() -> None:
    assert sharded_by("auto", LARGE, 2, "cuda")
    assert not sharded_by("auto", LARGE - 1, 2, "cuda")
    assert not sharded_by("auto", LARGE, 1, "cuda")
    assert not sharded_by("auto", LARGE, 2, "cpu")
    assert not sharded_by("auto", LARGE, 2, "cuda", deterministic=True)
    assert sharded_by("fsdp", 1, 2, "cpu") and not sharded_by("fsdp", LARGE, 1, "cuda")
    assert not sharded_by("ddp", LARGE, 8, "cuda")
