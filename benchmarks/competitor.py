"""One competitor of step.py, alone in this process: builds its model, says what it is, then takes rounds of steps on request.

Requests come as lines on stdin ("round", "memory"), answers go as JSON lines to stdout; whatever libraries print goes to
stderr. It is started by step.py.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from works import Missing, Training, imported

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


def resident(field: str) -> int:
    """Bytes of this process's memory by /proc (VmRSS: now, VmHWM: the most since it was reset)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


class Memory:
    """The most memory that steps take: on a GPU of its allocator, on a CPU what is resident above the imports."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.base = resident("VmRSS:") if device.type == "cpu" and Path("/proc/self/clear_refs").exists() else None

    def of(self, step: Callable[[], object]) -> int | None:
        """Bytes, of a step that comes after others; None where there is no way to know."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            step()
            synchronize(self.device)
            return torch.cuda.max_memory_allocated(self.device)
        if self.base is None:
            return None
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins again
        step()
        return resident("VmHWM:") - self.base


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
        memory = Memory(device)
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
            tell({"peak_memory": memory.of(training.step)})
        else:
            wall, cpu = seconds(training.step, device, repeats)
            tell({"wall": wall, "cpu": cpu})


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(json.loads(sys.argv[1]), answers)
