"""One step ahead: a thread makes the next items while the caller uses this one."""

import queue
import threading
from collections.abc import Generator, Iterable
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")
_END = object()
PATIENCE = 1.0  # seconds that a thread has to end; one that still waits for a disk or a worker ends when that comes


def ahead(items: Iterable[T], count: int = 2) -> Generator[T, None, None]:
    """The same items, up to `count` of them made before they are asked for.

    An error comes where the item would have. A generator that is closed early leaves no thread behind but one
    that is in the middle of an item, which it throws away.
    """
    made: queue.Queue[object] = queue.Queue(count)
    over = threading.Event()
    failed: list[BaseException] = []

    def put(item: object) -> None:
        while not over.is_set():
            with suppress(queue.Full):
                made.put(item, timeout=0.1)
                return

    def make() -> None:
        try:
            for item in items:
                put(item)
                if over.is_set():
                    return
        except BaseException as error:  # noqa: BLE001 - whatever it is, it belongs to the one who waits for the item
            failed.append(error)
        put(_END)

    thread = threading.Thread(target=make, name="ahead", daemon=True)
    thread.start()
    try:
        while (item := made.get()) is not _END:
            yield item  # type: ignore[misc]
        if failed:
            raise failed[0]
    finally:
        over.set()
        thread.join(PATIENCE)
