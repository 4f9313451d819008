"""What the allocator keeps of memory that was freed: less, where it is glibc's; any other is left as it is."""

import ctypes
from contextlib import suppress

M_ARENA_MAX = -8  # of <malloc.h>


def one_arena() -> None:
    """Let all threads allocate from one arena; call before there are any.

    By default each thread gets one of its own, and a version that is loaded in one thread and freed in another leaves
    holes in both, more with every reload (docs/reliability.md).
    """
    with suppress(AttributeError):
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)


def give_back() -> None:
    """Give freed memory to the system, which is kept where a later allocation lies behind it."""
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
