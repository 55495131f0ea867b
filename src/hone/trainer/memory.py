"""The C library's allocator, set up for a process that allocates the same tensors step after step."""

import ctypes

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # glibc's malloc.h
_LARGEST_MMAP_THRESHOLD = 32 * 2**20  # what glibc accepts; larger tensors come from the system every time


def keep_freed_memory() -> None:
    """Keep freed memory for the next step instead of returning it to the system.

    Without this every step on a CPU faults its activations in again, page by page: a tenth of the time of a small
    model. Does nothing where the C library has no mallopt.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_TOP_PAD, 64 * 2**20)
