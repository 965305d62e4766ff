"""The processes of a run: how they find each other, agree, and are asked to stop."""

import os
import signal
import time
from types import FrameType, TracebackType

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from selfsight.errors import Stopped, StorageError, UsageError
from selfsight.recipe import Recipe

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SAME_REQUEST = 5.0  # seconds; a cluster and torchrun both signal a rank, and mean the same request


def join(recipe: Recipe) -> Accelerator:
    """Accelerate for device, precision and ranks; torchrun's environment says how many there are.

    Raises:
        UsageError: a GPU that is not there, a batch that does not split, or another world than the launcher promised.
    """
    train, world = recipe.train, int(os.environ.get("WORLD_SIZE", "1"))
    if train.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("train.device: cuda, but torch sees no GPU; use auto or cpu")
    if train.batch_size % (world * train.accumulate):
        raise UsageError(
            f"train.batch_size: {train.batch_size} does not split over {world} ranks x {train.accumulate} micro-batches"
        )
    if train.threads:
        torch.set_num_threads(train.threads)
    if world == 1:  # a second run in one process, as in a notebook, may ask for another device or precision
        AcceleratorState._reset_state(reset_partial_state=True)
    cpu = train.device == "cpu" or not torch.cuda.is_available()
    precision = {"auto": "no" if cpu else "bf16", "fp32": "no", "bf16": "bf16"}[train.precision]
    accelerator = Accelerator(
        cpu=cpu, mixed_precision=precision, log_with=[*recipe.track] or None, project_dir=str(recipe.run_dir)
    )
    if accelerator.num_processes != world:
        raise UsageError(
            f"the launcher promised {world} processes, Accelerate found {accelerator.num_processes}; use launch.sh"
        )
    return accelerator


def any_rank(accelerator: Accelerator, flag: bool) -> bool:
    """Whether the flag is set on any rank; every rank gets the same answer."""
    if accelerator.num_processes == 1:
        return flag
    shared = torch.tensor(float(flag), device=accelerator.device)
    torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MAX)
    return bool(shared.item())


def same_on_every_rank(accelerator: Accelerator, value: int, what: str) -> None:
    """Raise StorageError unless every rank has this value."""
    if accelerator.num_processes == 1:
        return
    bounds = torch.tensor([value, -value], device=accelerator.device)
    torch.distributed.all_reduce(bounds, torch.distributed.ReduceOp.MAX)
    most, least = bounds[0].item(), -bounds[1].item()
    if most != least:
        raise StorageError(f"{what} is {least:,} on one rank and {most:,} on another")


def loader_workers(recipe: Recipe) -> int:
    """Loader processes for this rank: as asked, or this machine's cores shared among its ranks, at most 8."""
    if recipe.train.workers is not None:
        return recipe.train.workers
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(8, max(0, len(os.sched_getaffinity(0)) // ranks - 1)) if hasattr(os, "sched_getaffinity") else 2


class StopRequest:
    """While it is entered, a first SIGTERM, SIGINT or SIGUSR1 sets `asked`; one more than 5 s later ends the process."""

    def __init__(self) -> None:
        self.asked = False
        self.since = 0.0

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.asked:
            self.asked, self.since = True, time.monotonic()
        elif time.monotonic() - self.since > SAME_REQUEST:
            os._exit(Stopped.exit_code)
