"""How fast a machine multiplies, and how much multiplying a piece of work is: what a share of the peak (MFU) is made of."""

import time
from collections.abc import Callable
from statistics import median

import torch
from torch.utils.flop_counter import FlopCounterMode

SIDE = {"cpu": 2048, "cuda": 8192}  # of the square matrices whose product is timed


def count_flops(work: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products, convolutions and attentions that `work()` runs, two for each
    multiplication with its addition; those of a backward pass inside it too. What is recomputed is counted again."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matmul_peak(device: torch.device, dtype: torch.dtype, seconds: float = 1.0) -> float:
    """Floating-point operations per second of a large square product, measured: the median over so many seconds, 5 at least.

    The share of it that training reaches is its MFU (PaLM, Chowdhery et al. 2022, arXiv 2204.02311, appendix B), here by
    what this machine was seen to do and not by its maker's sheet.
    """
    side = SIDE[device.type]
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    times: list[float] = []
    for _ in range(3):
        torch.mm(a, b, out=out)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 5:
        synchronize(device)
        begun = time.perf_counter()
        torch.mm(a, b, out=out)
        synchronize(device)
        times.append(time.perf_counter() - begun)
    return 2 * side**3 / median(times)
