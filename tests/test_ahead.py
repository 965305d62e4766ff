"""Items made ahead by a thread: the same ones, errors where they belong, and no thread left."""

import threading
from collections.abc import Iterator

import pytest

from selfsight.eval.ahead import ahead


def running() -> int:
    return sum(thread.name == "ahead" for thread in threading.enumerate())


def test_items_come_in_order_and_ahead() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for n in range(50):
            made.append(n)
            yield n

    seen = []
    for n in ahead(items(), 2):
        seen.append(n)
        assert len(made) <= n + 1 + 2 + 1  # in use, in the queue, in the maker's hands
    assert seen == list(range(50))
    assert running() == 0
    assert list(ahead([])) == []


def test_an_error_comes_where_its_item_would() -> None:
    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise ValueError("three")

    seen = []
    with pytest.raises(ValueError, match="three"):
        for n in ahead(items()):
            seen.append(n)
    assert seen == [1, 2]
    assert running() == 0


def test_nobody_waits_for_an_item_that_does_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("selfsight.eval.ahead.PATIENCE", 0.01)
    stuck = threading.Event()

    def items() -> Iterator[int]:
        yield 1
        stuck.wait(60)
        yield 2

    made = ahead(items())
    next(made)
    made.close()  # would wait for a minute
    assert not stuck.is_set() and running() == 1
    stuck.set()
    for thread in threading.enumerate():
        if thread.name == "ahead":
            thread.join(10)
    assert running() == 0


def test_who_leaves_early_leaves_no_thread() -> None:
    made = ahead(iter(int, 1))  # for ever
    next(made)
    assert running() == 1
    made.close()
    assert running() == 0
