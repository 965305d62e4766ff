"""Memory of a CPU run: what a step frees stays with the process, for the next step."""

import ctypes
import platform

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # of mallopt(3)
_LARGEST, _LARGEST_BEFORE_2_35 = 1 << 30, 32 << 20


def keep_freed_memory() -> bool:
    """Have glibc keep large blocks that are freed; whether it does (elsewhere nothing is changed).

    By its own rules every tensor above 32 MiB is a mapping of its own, which the kernel fills with zeros, page by page,
    at every step.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    kept = mallopt(_MMAP_THRESHOLD, _LARGEST) or mallopt(_MMAP_THRESHOLD, _LARGEST_BEFORE_2_35)
    return bool(kept and mallopt(_TRIM_THRESHOLD, (1 << 31) - 1))
