"""The process that forks ranks, once for all fault tests, and a run small enough to be killed many times."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

FAULTS = Path(__file__).resolve().parent
sys.path[:0] = [str(FAULTS), str(FAULTS.parents[1] / "benchmarks")]

from launch import Job, Launcher, words  # noqa: E402 - found by the line above


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
