"""Keeps the memory that one training step frees for the next one."""

import ctypes


# Of malloc.h. The second is the largest that glibc takes.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES, _LARGEST_KEPT = 2**30, 2**25


def keep_freed_memory() -> None:
    """
    Makes the allocator of glibc keep up to 1 GiB of freed memory, in pieces of up to 32 MiB.

    By default it returns gradients and activations to the system after each step. The next step then waits while the
    system clears the pages again. This changes nothing but time; it does nothing with another C library.

    Example:

    ```python
    >>> keep_freed_memory()  # once, before training on the CPU
    ```
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # musl, macOS, Windows
        return
    mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT)
    mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
