"""One competitor of step.py, alone in this process: builds its model, says what it is, then takes rounds of steps on request.

Requests come as lines on stdin ("round", "memory"), answers go as JSON lines to stdout; whatever libraries print goes to
stderr. It is started by step.py.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from works import Missing, Training, imported

from selfsight.footprint import forget_peak, peak_memory
from selfsight.speed import count_flops, synchronize

ROUND = 0.25  # seconds that a round lasts at least: a shorter step is taken several times


class Operations(TorchDispatchMode):
    """The names of all operations that are run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


def described(training: Training) -> dict[str, Any]:
    """Operations of a step, the attention it runs, and the number of trained parameters."""
    with Operations() as seen:
        flops = count_flops(training.step)
    fused = any("scaled_dot_product" in name for name in seen.names)
    explicit = any(name == "aten::_softmax" for name in seen.names)
    attention = " and ".join(word for word, used in (("fused", fused), ("explicit", explicit)) if used)
    return {"flops": flops, "attention": attention or None, "parameters": training.parameters, "note": training.note}


def peak_of(step: Callable[[], object], device: torch.device) -> int:
    """Bytes: the most that was taken while it ran, on a GPU of its allocator, on a CPU of what is resident."""
    synchronize(device)  # which also wakes the allocator, that has no peak to forget before
    forget_peak(device)
    step()
    synchronize(device)
    return peak_memory(device)


def seconds(step: Callable[[], object], device: torch.device, repeats: int) -> tuple[float, float]:
    """Wall and CPU seconds of a step, the mean of so many."""
    synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        step()
    synchronize(device)
    return (time.perf_counter() - wall) / repeats, (time.process_time() - cpu) / repeats


def serve(spec: dict[str, Any], out: TextIO) -> None:
    """Build, describe, then answer until stdin ends."""

    def tell(told: dict[str, Any]) -> None:
        print(json.dumps(told), file=out, flush=True)

    torch.set_num_threads(spec["threads"])
    device = torch.device(spec["device"])
    try:
        make = imported(spec)
        before = peak_of(lambda: None, device)  # what the imports take
        training = make()
    except Missing as missing:
        tell({"skipped": str(missing)})
        return
    facts = described(training)  # the first step
    if spec["compile"]:
        training.compile()
    for _ in range(3 if device.type == "cuda" else 1):
        training.step()
    repeats = max(1, round(ROUND / seconds(training.step, device, 1)[0]))
    tell(facts)
    for line in sys.stdin:
        if line.strip() == "memory":
            tell({"peak_memory": peak_of(training.step, device) - before})
        else:
            wall, cpu = seconds(training.step, device, repeats)
            tell({"wall": wall, "cpu": cpu})


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(json.loads(sys.argv[1]), answers)
