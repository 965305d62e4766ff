"""Competitors in processes of their own, in turn: what two of them took for the same work, as ratios."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
SILENCE = 300.0  # seconds without an answer after which a competitor is ended


class Round(NamedTuple):
    """What one step took, the mean over the steps of a round."""

    wall: float
    """Seconds."""
    cpu: float
    """Seconds of CPU time of the whole process, all threads."""


class Gone(NamedTuple):
    """A competitor of a pair that gave no round."""

    ours: bool
    """Whether it is ours."""
    why: str


class Competitor:
    """A process that trains as `competitor.py` is told to, one round at a time.

    It waits on its pipe while the others work, so a machine runs one competitor at a time, each with its own allocator,
    imports and peak of memory.
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        command = [sys.executable, "-W", "ignore", str(HERE / "competitor.py"), json.dumps(spec)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> "Competitor":
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe
            with suppress(BrokenPipeError):  # what was still to be sent to one that had ended
                pipe.close()

    def answer(self) -> dict[str, Any]:
        """Its next answer; {"skipped": why} if it ended without one."""
        assert self.process.stdout
        limit = threading.Timer(SILENCE, self.process.kill)
        limit.start()
        try:
            line = self.process.stdout.readline()
        finally:
            limit.cancel()
        if line:
            return json.loads(line)
        return {"skipped": f"failed with exit code {self.process.wait()}; its own words are on stderr"}

    def ask(self, what: str) -> dict[str, Any]:
        """Have it do `what` ("round" or "memory"), and wait for the answer."""
        assert self.process.stdin
        try:
            self.process.stdin.write(what + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended; `answer` says how
        return self.answer()


def in_turn(
    ours: Competitor, theirs: Competitor, rounds: int, seconds: float
) -> tuple[list[Round], list[Round], Gone | None]:
    """Pairs of rounds, ours and theirs, who is first changing from pair to pair; at least 3 unless fewer are asked for.

    Returns:
        Our rounds, theirs, and who gave none and why, or None.
    """
    found: dict[bool, list[Round]] = {True: [], False: []}
    begun = time.perf_counter()
    for number in range(rounds):
        if number >= 3 and time.perf_counter() - begun > seconds:
            break
        for us in (True, False) if number % 2 == 0 else (False, True):
            told = (ours if us else theirs).ask("round")
            if "skipped" in told:
                return [], [], Gone(us, told["skipped"])
            found[us].append(Round(told["wall"], told["cpu"]))
    return found[True], found[False], None


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float | None]:
    """Of paired times: the median of theirs / ours (above 1: ours is faster), and the largest ratio minus the smallest, which
    one pair does not have."""
    found = [b / a for a, b in zip(ours, theirs, strict=True)]
    return median(found), max(found) - min(found) if len(found) > 1 else None
