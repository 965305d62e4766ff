"""Points at which a test lets a run fail as a machine would. Nothing happens unless SELFSIGHT_FAULTS is set.

SELFSIGHT_FAULTS="save.rename kill step=6; learn sleep=0.3 rank=1" names points (wildcards too), what happens there, and
on which rank, at which step, at which hit.
"""

import errno
import os
import signal
import time
from collections import Counter
from fnmatch import fnmatch
from typing import NamedTuple

VARIABLE = "SELFSIGHT_FAULTS"


class Fault(NamedTuple):
    """One injected failure."""

    point: str
    action: str
    argument: str
    where: dict[str, str]
    """Of rank, step and hit, those that were given."""


def parse_faults(text: str) -> tuple[Fault, ...]:
    """The faults of `text`; see the head of this file."""
    faults = []
    for part in filter(None, map(str.strip, text.split(";"))):
        point, action, *where = part.split()
        name, _, argument = action.partition("=")
        faults.append(Fault(point, name, argument, dict(word.split("=") for word in where)))
    return tuple(faults)


_faults = parse_faults(os.environ.get(VARIABLE, ""))
_hits: Counter[int] = Counter()


def load_faults() -> None:
    """Read the variable again, as a process must that was forked after the import."""
    global _faults
    _faults = parse_faults(os.environ.get(VARIABLE, ""))
    _hits.clear()


def faultpoint(point: str, step: int | None = None) -> None:
    """A point that a fault may name, at this step of the run where there is one."""
    for number, fault in enumerate(_faults):
        here = {"rank": os.environ.get("RANK", "0"), "step": str(step)}
        if not fnmatch(point, fault.point) or any(here[k] != v for k, v in fault.where.items() if k != "hit"):
            continue
        _hits[number] += 1
        if fault.where.get("hit", str(_hits[number])) == str(_hits[number]):
            _happen(point, fault)


def _happen(point: str, fault: Fault) -> None:
    if fault.action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault.action == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault.action == "signal":
        os.kill(os.getpid(), getattr(signal, fault.argument))
    elif fault.action == "sleep":
        time.sleep(float(fault.argument))
    elif fault.action == "error":
        raise RuntimeError(f"injected at {point}")
    elif fault.action == "errno":
        number = getattr(errno, fault.argument)
        raise OSError(number, os.strerror(number))
    else:
        raise ValueError(f"{VARIABLE}: no such action: {fault.action}")
