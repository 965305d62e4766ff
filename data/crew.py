"""Daemon threads that do what they are given: an executor's threads would keep a process from ending while a server stalls."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")


class Crew:
    """At most `size` threads, started as they are needed; jobs are begun in the order in which they come."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._jobs: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def submit(self, job: Callable[[], T]) -> "Future[T]":
        """Begin a job when a thread is free."""
        future: Future[T] = Future()
        self._jobs.put((future, job))
        if len(self._threads) < self.size:
            self._threads.append(threading.Thread(target=_work, args=(self._jobs,), daemon=True))
            self._threads[-1].start()
        return future

    def close(self) -> None:
        """Drop what is not begun, and let the threads end after what they have."""
        while not self._jobs.empty():
            with suppress(queue.Empty):  # a thread was quicker
                if given := self._jobs.get_nowait():
                    given[0].cancel()
        for _ in self._threads:
            self._jobs.put(None)


def _work(jobs: "queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]") -> None:
    while (given := jobs.get()) is not None:
        future, job = given
        if not future.set_running_or_notify_cancel():
            continue
        try:
            future.set_result(job())
        except Exception as error:  # noqa: BLE001 - whatever it is, it belongs to the one who waits for the result
            future.set_exception(error)
        del future, given, job  # nothing is held while there is nothing to do
