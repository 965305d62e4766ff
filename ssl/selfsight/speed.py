"""How fast a machine multiplies, and how much multiplying a piece of work is: what a share of the peak (MFU) is made of."""

import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from torch.utils.flop_counter import FlopCounterMode

SIDE = {"cpu": 2048, "cuda": 8192}  # of the square matrices whose product is timed
LEAST_SIDE = 256  # below it a product is too short to tell a machine's peak


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


def matmul_peak(
    device: torch.device, dtype: torch.dtype, seconds: float = 1.0, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Floating-point operations per second of a large square product, measured: the median over so many seconds, 5 at least.

    The share of it that training reaches is its MFU (PaLM, Chowdhery et al. 2022, arXiv 2204.02311, appendix B), here by
    what this machine was seen to do and not by its maker's sheet. Where five such products take longer than that (bf16 on
    a CPU without instructions for it: minutes), smaller ones are timed.
    """
    side = SIDE[device.type]
    product = _product(device, dtype, side)
    while _took(product, device, clock) > seconds / 5 and side > LEAST_SIDE:
        side //= 2
        product = _product(device, dtype, side)
    for _ in range(2):  # the first one that was as fast as this may still have woken the machine up
        product()
    times: list[float] = []
    end = clock() + seconds
    while clock() < end or len(times) < 5:
        times.append(_took(product, device, clock))
    return 2 * side**3 / median(times)


def _product(device: torch.device, dtype: torch.dtype, side: int) -> Callable[[], object]:
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return partial(torch.mm, a, b, out=torch.empty_like(a))


def _took(work: Callable[[], object], device: torch.device, clock: Callable[[], float]) -> float:
    """Seconds of a call, on the device."""
    synchronize(device)
    begun = clock()
    work()
    synchronize(device)
    return clock() - begun
