"""Batches for training, made ahead by worker processes, whatever becomes of these.

A batch is a pure function of its number, so that lost workers cost time and nothing else: all are started again at the
batch that is due. When the same batch takes them down a second time, it is made sample by sample under watch, in a
process that may die, and the samples that crash or hang the decoder are replaced as any bad sample is.
"""

import multiprocessing.connection
import os
import shutil
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

from selfsight.console import say
from selfsight.data.loader import READING, end_with_parent, forkserver, loader
from selfsight.errors import DataError, DataGone, SelfsightError

TIMEOUT = 60.0  # seconds without a batch, under the two minutes after which other ranks give up
DEADLINE = 20.0  # seconds for one sample alone
START = 60.0  # seconds for a process to start, on a busy machine
AHEAD = 2  # batches that DataLoader lets each worker make ahead
ALL = object()  # no item is left


class Source(Protocol):
    """Items by number, each a pure function of its number, that can be made without some samples."""

    @property
    def item_bytes(self) -> int:
        """Shared memory that one item takes."""

    def __getitem__(self, number: int) -> Any: ...

    def without(self, condemned: Mapping[int, str]) -> "Source":
        """The same items, these samples replaced; each with its reason."""

    def watched(self, report: Callable[[int], None]) -> "Source":
        """The same items, each sample reported before it is decoded."""


class WorkersLost(Exception):
    """Worker processes that died, or gave nothing until they were killed."""


def feed(source: Source, numbers: range, workers: int, pin: bool, timeout: float = TIMEOUT) -> Iterator[Any]:
    """Items `numbers` of a source, in order and each once, made ahead by `workers` processes (0: by this one).

    Args:
        timeout: seconds without an item after which the workers are taken for dead.

    Raises:
        DataError: the workers were lost twice at the same item, and none of its samples is to blame.
        SelfsightError: what making an item raises.
    """
    workers = affordable_workers(source.item_bytes, workers)
    if not workers:
        yield from loader(source, numbers, 0, pin)
        return
    lost_at = None
    while numbers:
        items = _made_ahead(source, numbers, workers, pin, timeout)
        try:
            for item in items:
                yield item
                numbers = numbers[1:]
        except WorkersLost as lost:
            if lost_at != numbers[0]:
                say(f"batch {numbers[0]:,}: {lost}; starting them again")
                lost_at = numbers[0]
                continue
            say(f"batch {numbers[0]:,}: {lost} again; looking for the sample that does it")
            source, lost_at = _without_culprits(source, numbers[: AHEAD * workers], min(timeout, DEADLINE), lost), None
        finally:
            items.close()


def affordable_workers(item_bytes: int, workers: int, memory: Path = Path("/dev/shm")) -> int:
    """`workers`, or 0 if the shared memory is too small for the batches that they make ahead."""
    needed = item_bytes * (AHEAD * workers + 1) * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # ranks share it
    try:
        free = shutil.disk_usage(memory).free
    except OSError:  # a system that keeps shared memory elsewhere
        return workers
    if not workers or needed <= free:
        return workers
    say(
        f"{memory}: {free / 2**20:,.0f} MiB of shared memory are free, {workers} loader workers a rank need "
        f"{needed / 2**20:,.0f}; reading without workers (in a container, --shm-size gives it more)"
    )
    return 0


def _made_ahead(source: Source, numbers: range, workers: int, pin: bool, timeout: float) -> Generator[Any, None, None]:
    """Items by a DataLoader.

    Raises:
        WorkersLost: a process died, or none gave the item that is due for `timeout` seconds.
    """
    items: Any = iter(loader(source, numbers, workers, pin))
    try:
        while (item := _due(items, timeout)) is not ALL:
            yield item
    finally:
        # Nothing that they hold is missed; DataLoader would wait for them, and for stopped ones in vain.
        _end(items._workers)
        items._workers_done_event = threading.Event()  # a killed worker may hold the lock of the shared one for ever
        items._shutdown_workers()


def _due(items: Any, timeout: float) -> Any:
    """The next item. DataLoader's own timeout neither ends a stopped process nor a transfer that hangs."""
    stalled = threading.Event()
    watchdog = threading.Timer(timeout, _end, [items._workers, stalled])
    watchdog.daemon = True
    watchdog.start()
    try:
        return next(items, ALL)
    except (RuntimeError, OSError, EOFError) as error:  # DataLoader's, the socket's and the pipe's of a death
        if not (dead := _dead(items._workers)):
            raise
        what = f"gave nothing for {timeout:g} s" if stalled.is_set() else "died"
        raise WorkersLost(f"loader workers {what} ({dead})") from error
    finally:
        watchdog.cancel()


def _end(processes: list[Any], stalled: threading.Event | None = None) -> None:
    if stalled:
        stalled.set()
    for process in processes:
        if process.is_alive():
            process.kill()


def _dead(processes: list[Any]) -> str:
    """The processes that have ended, and how; a broken transfer may be seen before the end of its sender."""
    ended = multiprocessing.connection.wait([process.sentinel for process in processes], timeout=1)
    return ", ".join(f"pid {p.pid}: {p.exitcode}" for p in processes if p.sentinel in ended)


def _without_culprits(source: Source, suspects: range, deadline: float, lost: WorkersLost) -> Source:
    """The source without the samples that take down the one who decodes them.

    The batch that is due may be innocent: workers die of those ahead of it, too.

    Raises:
        DataError: there are none.
    """
    tried: list[int] = []
    for number in suspects:
        found = culprits(source, number, deadline, tried)
        if found:
            say(f"batch {number:,}: left out {', '.join(f'sample {sample} ({why})' for sample, why in found.items())}")
            return source.without(found)
    shown = ", ".join(map(str, tried[:16])) + (" ..." if len(tried) > 16 else "")
    raise DataError(
        f"batch {suspects[0]:,}: {lost} twice, yet every sample decodes alone (samples {shown}); "
        "look for a full memory or a slow disk, and try fewer train.workers"
    )


def culprits(source: Source, number: int, deadline: float, tried: list[int]) -> dict[int, str]:
    """Samples of one item that crash or hang the decoder, found in processes that may die of them.

    Args:
        deadline: seconds for each sample.
        tried: gets the samples that were decoded.
    """
    found: dict[int, str] = {}
    while blamed := _trial(source.without(found), number, deadline, tried):
        found |= blamed
    return found


def _trial(source: Source, number: int, deadline: float, tried: list[int]) -> dict[int, str]:
    """Make an item under watch: the sample that ended this, and how; empty when nothing did."""
    context = forkserver()
    hears, tells = context.Pipe(duplex=False)
    process = context.Process(target=_make_watched, args=(source, number, tells), daemon=True)
    process.start()
    tells.close()
    sample = None
    try:
        while hears.poll(START if sample is None else deadline):
            told = hears.recv()
            if told is None:
                return {}
            sample = None if told == READING else told
            if sample is not None:
                tried.append(sample)
        if sample is None:
            raise DataGone(f"batch {number:,}: its samples could not be read within {START:g} s; is the storage away?")
        return {sample: "hangs the decoder"}
    except EOFError:  # it died without a word
        return {} if sample is None else {sample: "crashes the decoder"}
    finally:
        process.kill()
        process.join()
        hears.close()


def _make_watched(source: Source, number: int, tells: Connection) -> None:
    end_with_parent()
    try:
        with suppress(SelfsightError):  # the next worker meets it, and says so
            source.watched(tells.send)[number]
    finally:
        tells.send(None)
