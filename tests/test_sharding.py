"""Two gloo ranks that share out the weights: what they learn is what DDP learns, and their files are the same."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import Job
from safetensors.torch import load_file

from selfsight.errors import UsageError
from selfsight.metrics import TIMING
from selfsight.recipe import load
from selfsight.run_folder import read_lines
from selfsight.sharding import LARGE, share_of, sharded_by

Start = Callable[..., Job]
Fields = dict[str, Any]

# Uneven shards and empty ones: 17 prototypes, and tokens whose first dimension is 1.
DINO: Fields = {
    "objective.outputs": 17, "objective.head_width": 8, "objective.bottleneck": 8, "encoder.heads": 2,
    "objective.koleo": 0.1, "objective.freeze_prototypes": 0.2,
}  # fmt: skip
OBJECTIVES: dict[str, Fields] = {
    "mae": {"objective.decoder_depth": 2, "train.ema": 0.9, "encoder.drop_path": 0.3},
    "dino": DINO | {"train.checkpoint_blocks": True, "encoder.drop_path": 0.3},
    "vicreg": {"objective.expander_width": 16, "train.ema": 0.9, "train.checkpoint_blocks": True},
    "joint": {},
}
COMMON: Fields = {
    "encoder.depth": 2, "train.accumulate": 2, "optim.clip": 0.05, "train.keep": 9,
    "eval.train": None, "train.timeout": 30,
}  # fmt: skip


def learned(folder: Path) -> list[dict[str, Any]]:
    """The metrics without the wall-clock fields."""
    return [{k: v for k, v in line.items() if k not in TIMING} for line in read_lines(folder / "metrics.jsonl")]


def tensors(folder: Path, step: int, name: str = "model") -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / f"step-{step:08d}" / f"{name}.safetensors")


def assert_same_lines(one: Path, other: Path, tolerance: float = 1e-5) -> None:
    first, second = learned(one), learned(other)
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key] == pytest.approx(b[key], abs=tolerance, rel=tolerance), (a["step"], key)


def assert_same_files(one: Path, other: Path, step: int, tolerance: float = 1e-4) -> None:
    """Names, types and shapes are equal, values but for rounding, which AdamW makes large for a gradient of 0 (keys' bias)."""
    names = sorted(path.name for path in (one / "checkpoints" / f"step-{step:08d}").iterdir())
    assert names == sorted(path.name for path in (other / "checkpoints" / f"step-{step:08d}").iterdir())
    for name in (name.removesuffix(".safetensors") for name in names if name.endswith(".safetensors")):
        a, b = tensors(one, step, name), tensors(other, step, name)
        assert a.keys() == b.keys()
        for key in a:
            assert a[key].shape == b[key].shape and a[key].dtype == b[key].dtype
            if "qkv.bias" not in key:
                assert torch.allclose(a[key], b[key], atol=tolerance), (name, key)


def run(start: Start, folder: Path, parallel: str, objective: str = "mae", world: int = 2, **more: Any) -> Job:
    own = OBJECTIVES[objective] if objective in OBJECTIVES else {}
    fields = COMMON | own | {"train.parallel": parallel, "run_dir": str(folder)} | more.pop("fields", {})
    return start(world, fields=fields, objective=objective, **more)


def ends(*jobs: Job) -> None:
    for job in jobs:
        assert set(job.wait(90)) == {0}, job.told()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_shards_learn_what_ddp_learns(objective: str, start: Start, tmp_path: Path) -> None:
    jobs = [run(start, tmp_path / parallel, parallel, objective) for parallel in ("ddp", "fsdp")]
    ends(*jobs)
    assert_same_lines(tmp_path / "ddp", tmp_path / "fsdp")
    for step in (1, 6):
        assert_same_files(tmp_path / "ddp", tmp_path / "fsdp", step)
    exported = [load_file(tmp_path / parallel / "encoder" / "model.safetensors") for parallel in ("ddp", "fsdp")]
    assert exported[0].keys() == exported[1].keys()
    assert all(
        torch.allclose(exported[0][key], exported[1][key], atol=1e-4) for key in exported[0] if "qkv.bias" not in key
    )


def test_auto_shards_large_encoders_on_several_gpus() -> None:
    assert sharded_by("auto", LARGE, 2, "cuda")
    assert not sharded_by("auto", LARGE - 1, 2, "cuda")
    assert not sharded_by("auto", LARGE, 1, "cuda")
    assert not sharded_by("auto", LARGE, 2, "cpu")
    assert not sharded_by("auto", LARGE, 2, "cuda", deterministic=True)
    assert sharded_by("fsdp", 1, 2, "cpu") and not sharded_by("fsdp", LARGE, 1, "cuda")
    assert not sharded_by("ddp", LARGE, 8, "cuda")
