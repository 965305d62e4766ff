"""What several tests share: small shards, small recipes, and no network."""

import os

os.environ["OMP_WAIT_POLICY"] = "passive"  # before torch: spinning threads starve a machine of two cores
os.environ["HF_HUB_OFFLINE"] = "1"

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from selfsight.data.build import write_shards

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / "faults"), str(ROOT / "benchmarks")]

from launch import Job, Launcher, words  # noqa: E402 - found by the line above


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["SELFSIGHT_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    torch.set_num_threads(1)


# Files that take longest, begun first: a file is one process's work, so that what its tests share is made once.
LONGEST = (
    "test_export",
    "test_resume",
    "test_security",
    "test_train",
    "test_eval",
    "test_across",
    "test_cli",
    "test_peers",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


def pictures(count: int, size: tuple[int, int] = (8, 8), classes: int = 2, seed: int = 0, mode: str = "L") -> list[Any]:
    """Noise whose brightness tells the class."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], 3)
        pixels = rng.integers(0, 120, shape) + 100 * (i % classes) // max(1, classes - 1)
        made.append((Image.fromarray(pixels.astype(np.uint8)), i % classes))
    return made


def blobs(
    count: int, classes: int = 4, width: int = 12, seed: int = 0, noise: float = 1.5
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features about a centre for each class, and labels."""
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    made = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=made)
    return centres[labels] + noise * torch.randn(count, width, generator=made), labels


@pytest.fixture(scope="session")
def small_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 grey 8 x 8 images of two classes in three shards."""
    folder = tmp_path_factory.mktemp("small")
    write_shards(iter(pictures(120)), folder, "small", per_shard=50)
    return folder


@pytest.fixture
def small_fields(small_shards: Path, tmp_path: Path) -> dict[str, Any]:
    """Overrides that make any digits recipe a run of a second."""
    return {
        "run_dir": str(tmp_path / "run"),
        "data.train": str(small_shards),
        "encoder.width": 16,
        "encoder.depth": 1,
        "objective.decoder_width": 16,
        "train.epochs": None,
        "train.steps": 6,
        "train.batch_size": 8,
        "train.log_every": 1,
        "train.save_every": 3,
        "train.workers": 0,
        "eval.train": None,
        "eval.test": None,
    }


def contend(folder: Path, count: int, before: str = "") -> list[str]:
    """What so many processes at once are told that want the lock of a run folder: "in" or "out". `before` runs in each."""
    code = (
        f"import sys; from pathlib import Path; from selfsight.run_folder import RunLock; from selfsight.errors import UsageError\n{before}\n"
        f"try:\n with RunLock(Path({str(folder)!r})): print('in', flush=True); sys.stdin.read()\nexcept UsageError: print('out')"
    )
    many = [
        subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(count)
    ]
    told = [process.stdout.readline().strip() for process in many if process.stdout]
    for process in many:
        process.communicate(timeout=20)
    return sorted(told)


@pytest.fixture
def unchecked_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare each run the process that looks at its export; test_export and the command's own tests have it."""
    monkeypatch.setattr("selfsight.exports.export.verify_export", lambda encoder, folder: 0.0)


def look_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What checks an export runs here, and not in a process of its own, which takes seconds to start."""

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        code, *arguments = command[-3:]
        code = code.replace('assert "selfsight" not in sys.modules', "")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["", *arguments])
            exec(code, {})
        return subprocess.CompletedProcess(command, 0)

    stand_in = SimpleNamespace(run=run, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr("selfsight.exports.clean.subprocess", stand_in)


@pytest.fixture
def selfsight() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command as a user does, in a process of its own."""

    def run(*arguments: Any, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "selfsight", *map(str, arguments)],
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            capture_output=True,
            text=True,
            timeout=240,
        )

    return run


@pytest.fixture(scope="session")
def launcher(tmp_path_factory: pytest.TempPathFactory, _own_cache: None) -> Iterator[Launcher]:
    """Forks ranks; `launcher.start(...)` gives the Job."""
    with Launcher(tmp_path_factory.mktemp("jobs")) as started:
        yield started


@pytest.fixture
def start(launcher: Launcher, small_fields: dict[str, Any]) -> Callable[..., Job]:
    """Start a small run of an objective on so many ranks, with faults; other keywords as for `Launcher.start`."""

    def started(
        world: int = 1, faults: str = "", fields: dict[str, Any] | None = None, objective: str = "mae", **more: Any
    ) -> Job:
        own = {key: value for key, value in small_fields.items() if objective == "mae" or "decoder" not in key}
        changed = own | {"train.timeout": 20} | (fields or {})
        return launcher.start(["pretrain", f"digits/{objective}", *words(changed)], world, faults, **more)

    return started
