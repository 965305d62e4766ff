"""Saving beside the training."""

import threading
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from selfsight import checkpoint, console
from selfsight.checkpoint import Tensors
from selfsight.errors import NumericError, SelfsightError, StorageError
from selfsight.faults import faultpoint
from selfsight.peers import SAVER
from selfsight.run_folder import sync

FAILURES = 3  # saves in a row that fail before the run ends


class Saver:
    """Writes checkpoints beside the training, which waits for the copy of the tensors only.

    A save that comes while another is being written is left out, unless it must be there. A save that fails is said
    and older checkpoints stay; after three in a row `failed` says why, and the run is to end.

    Args:
        folder: of the checkpoints.
        keep: the newest so many are kept.
        keep_every: and those at multiples of so many steps.
        log: a file whose lines must be on the disk before a checkpoint is.
    """

    def __init__(self, folder: Path, keep: int, keep_every: int | None, log: Path) -> None:
        self.folder, self.keep, self.keep_every, self.log = folder, keep, keep_every, log
        self.thread: threading.Thread | None = None
        self.failures = 0
        self.newest: int | None = None
        """The step of the last checkpoint that was written."""
        self.error: SelfsightError | None = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finish()  # whatever happened: the run folder is not left before

    @property
    def failed(self) -> SelfsightError | None:
        """Why the run should end, if it should."""
        fatal = self.failures >= FAILURES or isinstance(self.error, NumericError)
        return self.error if fatal else None

    def leaves_out(self, step: int, wait: bool) -> bool:
        """Whether a save of this step now would be left out, which is said. Once it would not, it will not be."""
        must = wait or bool(self.keep_every and step % self.keep_every == 0)
        busy = self.thread is not None and self.thread.is_alive() and not must
        if busy:
            console.say(f"the checkpoint of step {step:,} is left out: the one before is still being written")
        return busy

    def save(
        self, step: int, state: dict[str, Any], tensors: dict[str, Tensors], wait: bool, owned: bool = False
    ) -> None:
        """Save the state after `step` steps.

        Args:
            wait: until it is on the disk.
            owned: the tensors are copies on the CPU already.

        Raises:
            StorageError, NumericError: it could not be written, if `wait`.
        """
        if self.leaves_out(step, wait):
            return
        self.finish()
        if step == self.newest:
            return
        faultpoint("save.copy", step)
        copied = tensors if owned else {group: on_the_cpu(members) for group, members in tensors.items()}
        self.thread = threading.Thread(target=self._write, args=(step, state, copied, wait), name=SAVER)
        self.thread.start()
        if wait:
            self.finish()
            if self.error:
                raise self.error

    def finish(self) -> None:
        """Wait for the one that is being written."""
        if self.thread:
            self.thread.join()
            self.thread = None

    def _write(self, step: int, state: dict[str, Any], tensors: dict[str, Tensors], awaited: bool) -> None:
        try:
            sync(self.log)  # the checkpoint must not outlive the lines before it
            checkpoint.save(self.folder, step, state, tensors, self.keep, self.keep_every)
            self.failures, self.error = 0, None
            self.newest = step
        except SelfsightError as error:
            self._failed(error, awaited)
        except Exception as error:  # noqa: BLE001 - whatever a thread raises is lost, and a save that failed must not be
            self._failed(StorageError(f"{self.folder}: step {step}: {type(error).__name__}: {error}"), awaited)

    def _failed(self, error: SelfsightError, awaited: bool) -> None:
        self.failures, self.error = self.failures + 1, error
        if not awaited:
            console.say(f"warning: {error}; training goes on ({self.failures} of {FAILURES} failures in a row)")


def on_the_cpu(tensors: Tensors) -> Tensors:
    """Copies that nothing changes any more.

    Their memory is pageable: pinned memory would be kept by torch's cache for the rest of the run, rounded up to powers of
    two, and its allocation may fail. The driver stages such copies itself.
    """
    copied = {name: _copy(tensor.detach()) for name, tensor in tensors.items()}
    for device in {tensor.device for tensor in tensors.values() if tensor.is_cuda}:
        torch.cuda.current_stream(device).synchronize()
    return copied


def _copy(tensor: Tensor) -> Tensor:
    # Not `tensor.to("cpu", non_blocking=True)`, whose target would be pinned.
    return torch.empty_like(tensor, device="cpu").copy_(tensor, non_blocking=tensor.is_cuda)
