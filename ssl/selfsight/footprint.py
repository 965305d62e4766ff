"""How much memory there is, and how much was taken: the GPU's where work runs on one, else the process's and the machine's."""

import resource
import sys
from pathlib import Path

import torch

MACHINE, OWN = Path("/proc/meminfo"), Path("/proc/self")


def free_memory(device: torch.device) -> int:
    """Bytes of the device that this process may use, of a GPU what it uses already included; where nobody says, more than
    there can be."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return _kib(MACHINE, "MemAvailable", 2**53) * 1024


def total_memory(device: torch.device) -> int | None:
    """Bytes of the device; None where nobody says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return _kib(MACHINE, "MemTotal", 0) * 1024 or None


def forget_peak(device: torch.device) -> None:
    """Let `peak_memory` begin anew; of a CPU only Linux can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        (OWN / "clear_refs").write_text("5")
    except OSError:  # another system, or a kernel that does not let us: then the peak is since the start
        return


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors took of the GPU, or that were resident of this process, without its loader workers."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return _kib(OWN / "status", "VmHWM", peak // (1024 if sys.platform == "darwin" else 1)) * 1024  # bytes there


def _kib(file: Path, name: str, otherwise: int) -> int:
    """The number of a line such as `MemTotal: 123 kB`."""
    if not file.exists():
        return otherwise
    found = [int(line.split()[1]) for line in file.read_text().splitlines() if line.startswith(f"{name}:")]
    return found[0] if found else otherwise
