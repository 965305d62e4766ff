"""The processes of a run: how they find each other, agree, and are asked to stop."""

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from hashlib import sha256
from pathlib import Path
from types import FrameType, TracebackType

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs

import selfsight
from selfsight import __version__
from selfsight.allocator import keep_freed_memory
from selfsight.errors import PeerLost, Stopped, StorageError, UsageError
from selfsight.precision import ARITHMETIC, resolve, set_products
from selfsight.recipe import Recipe
from selfsight.run_folder import differences

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SAME_REQUEST = (
    5.0  # seconds; under torchrun a cluster and torchrun itself both signal a rank, and mean the same request
)
# Of a collective. Who is silent is found by `peers` long before; scoring on one rank may make the others wait.
COLLECTIVE_LIMIT = timedelta(hours=2)


def join(recipe: Recipe) -> Accelerator:
    """Accelerate for device, precision and ranks; torchrun's environment says how many there are.

    Raises:
        UsageError: a GPU that is not there, a batch that does not split, or another world than the launcher promised.
    """
    train, world = recipe.train, world_size()
    if train.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("train.device: cuda, but torch sees no GPU; use auto or cpu")
    if train.batch_size % (world * train.accumulate):
        raise UsageError(
            f"train.batch_size: {train.batch_size} does not split over {world} ranks x {train.accumulate} micro-batches"
        )
    if train.deterministic and train.deterministic % world:
        raise UsageError(f"train.deterministic: {train.deterministic} parts do not split over {world} ranks")
    if train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before the first product on a GPU
    if threads := train.threads or (1 if train.deterministic else None):  # sums depend on the number of threads
        torch.set_num_threads(threads)
    if world == 1:  # a second run in one process, as in a notebook, may ask for another device or precision
        AcceleratorState._reset_state(reset_partial_state=True)
    cpu = train.device == "cpu" or not torch.cuda.is_available()
    precision = resolve(train.precision, torch.device("cpu" if cpu else "cuda"))
    if cpu:
        keep_freed_memory()
    else:
        set_products(precision)
    with found_each_other(5 * train.timeout if world > 1 else None):
        accelerator = Accelerator(
            cpu=cpu,
            mixed_precision=ARITHMETIC[precision][0],
            log_with=[*recipe.track] or None,
            project_dir=str(recipe.run_dir),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=COLLECTIVE_LIMIT)],
        )
    if accelerator.num_processes != world:
        raise UsageError(
            f"the launcher promised {world} processes, Accelerate found {accelerator.num_processes}; use launch.sh"
        )
    try:
        same_program(accelerator, recipe)
    except RuntimeError as error:  # the first collective, before `peers` could say which rank
        raise PeerLost("another rank was lost while the run started") from error
    return accelerator


def world_size() -> int:
    """How many processes the launcher says there are."""
    told = os.environ.get("WORLD_SIZE", "1")
    if not told.isdigit() or int(told) < 1:
        raise UsageError(f"WORLD_SIZE is {told!r}, which is no number of processes; use launch.sh or torchrun")
    return int(told)


@contextmanager
def found_each_other(limit: float | None) -> Iterator[None]:
    """End this process if the ranks have not found each other after so many seconds; torch would wait for hours."""
    rank, world, where = (os.environ.get(name, "?") for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"))

    def give_up() -> None:
        told = f"rank {rank} of {world}: the others did not come to {where}:{os.environ.get('MASTER_PORT', '?')}"
        print(f"selfsight: {told} within {limit:g} s; do all have the same WORLD_SIZE and address?", file=sys.stderr)
        os._exit(PeerLost.exit_code)

    timer = threading.Timer(limit or 0, give_up)
    timer.daemon = True
    if limit:
        timer.start()
    try:
        yield
    except RuntimeError as error:
        if not limit:
            raise
        raise PeerLost(
            f"rank {rank} of {world}: the ranks did not find each other ({str(error).splitlines()[0]})"
        ) from None
    except ValueError as error:  # torch's, of an environment that a launcher sets
        raise UsageError(
            f"WORLD_SIZE is {world}, but {str(error).splitlines()[0]}; use launch.sh or torchrun"
        ) from None
    finally:
        timer.cancel()


def agree(accelerator: Accelerator, flags: Sequence[bool]) -> list[bool]:
    """For each flag, whether it is set on any rank; every rank gets the same answer."""
    if accelerator.num_processes == 1:
        return list(flags)
    shared = torch.tensor(flags, dtype=torch.float32, device=accelerator.device)
    torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MAX)
    return [value > 0 for value in shared.tolist()]


def same_program(accelerator: Accelerator, recipe: Recipe) -> None:
    """Raise UsageError, naming the ranks and the fields, unless all have this recipe and this program."""
    programs = {"torch": torch.__version__, "selfsight": f"{__version__} {sources()}"}
    mine = {"recipe": recipe.model_dump(mode="json"), "program": programs}
    text = json.dumps(mine).encode()
    found = of_all_ranks(accelerator, int.from_bytes(sha256(text).digest()[:7], "big"))
    if other := [str(rank) for rank, value in enumerate(found) if value != found[0]]:
        told = differences(json.loads(text_of_main(accelerator, text)), mine).values()
        detail = f": {'; '.join(told)}" if told else ""  # nothing on the ranks that are as rank 0 is
        raise UsageError(f"rank {', '.join(other)} was started in another way than rank 0{detail}; start all alike")


def sources() -> str:
    """A short hash of the package's own files."""
    digest = sha256()
    for top in selfsight.__path__:
        for folder, below, files in os.walk(top, followlinks=True):  # data and eval are links in a checkout
            below.sort()
            for name in sorted(files):
                if name.endswith(".py"):
                    digest.update(Path(folder, name).read_bytes())
    return digest.hexdigest()[:12]


def text_of_main(accelerator: Accelerator, text: bytes) -> bytes:
    """The text of rank 0."""
    if accelerator.num_processes == 1:
        return text
    size = of_all_ranks(accelerator, len(text))[0]
    buffer = torch.zeros(size, dtype=torch.uint8, device=accelerator.device)
    if accelerator.is_main_process:
        buffer.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
    torch.distributed.broadcast(buffer, 0)
    return bytes(buffer.cpu().numpy())


def of_all_ranks(accelerator: Accelerator, value: int) -> list[int]:
    """This whole number (below 2^63) of every rank."""
    if accelerator.num_processes == 1:
        return [value]
    mine = torch.tensor([value], device=accelerator.device)
    parts = [torch.empty_like(mine) for _ in range(accelerator.num_processes)]
    torch.distributed.all_gather(parts, mine)
    return [int(part.item()) for part in parts]


def same_on_every_rank(accelerator: Accelerator, value: int, what: str) -> None:
    """Raise StorageError unless every rank has this value."""
    found = of_all_ranks(accelerator, value)
    if len(set(found)) > 1:
        told = ", ".join(f"{value:,} on rank {rank}" for rank, value in enumerate(found))
        raise StorageError(f"{what} is not the same everywhere: {told}")


def loader_workers(recipe: Recipe) -> int:
    """Loader processes for this rank: as asked, or this machine's cores shared among its ranks, at most 8."""
    if recipe.train.workers is not None:
        return recipe.train.workers
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(8, max(0, len(os.sched_getaffinity(0)) // ranks - 1)) if hasattr(os, "sched_getaffinity") else 2


class StopRequest:
    """While it is entered, a first SIGTERM, SIGINT or SIGUSR1 sets `asked`, and a second one ends the process at once.

    Under torchrun, which passes on a signal that the whole group already has, repeats within 5 s are the same request.
    A thread listens, since Python's own handlers wait for the main thread, which may be inside a collective.
    """

    def __init__(self) -> None:
        self.asked = False
        self.since = 0.0
        self.now = False
        self.patience = SAME_REQUEST if "TORCHELASTIC_RUN_ID" in os.environ else 0.0

    def __enter__(self) -> "StopRequest":
        self.heard, self.ear = socket.socketpair()
        self.ear.setblocking(False)
        self._before = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}
        self._ear_before = signal.set_wakeup_fd(self.ear.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(self._ear_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self.ear.close()  # ends the thread

    def at_once(self) -> None:
        """From now on there is nothing to save: a request, also one that came before, raises Stopped where it arrives."""
        self.now = True
        if self.asked:
            self._stop()

    def hear(self) -> None:
        """One of the signals has come."""
        if not self.asked:
            self.asked, self.since = True, time.monotonic()
        elif time.monotonic() - self.since >= self.patience:
            os._exit(Stopped.exit_code)

    def _listen(self) -> None:
        with self.heard:
            while numbers := self.heard.recv(1):
                if numbers[0] in STOP_SIGNALS:
                    self.hear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.now:
            self._stop()

    def _stop(self) -> None:
        raise Stopped("stopped on request; training is done and saved, run the same command for what is left")
