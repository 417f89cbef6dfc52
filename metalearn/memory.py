"""How a process deals with memory that it has freed."""

import ctypes

# Parameters of glibc's mallopt, and their largest values.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST, _LARGEST_MMAP = 2**30, 2**25


def keep_freed_memory() -> bool:
    """Have the C library keep what this process frees, up to 1 GiB, instead of handing it back to the system.

    Batched inner runs make and free the same tensors of a few megabytes at every step. What was handed back must be
    cleared by the system, page by page, before it can be used again: up to a quarter of the CPU time of such a step.

    Returns:
        Whether it does from now on; false where the C library is not glibc, and where nothing is changed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all([mallopt(_TRIM_THRESHOLD, _LARGEST), mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP)])
