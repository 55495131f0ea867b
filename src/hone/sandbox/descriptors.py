"""Room for the descriptors of many cells: a process may have more files open than it is told to at first."""

import resource

PER_CELL = 8
"""What a living cell holds in the node, with a program or a session of Python in it."""
OTHERS = 256
"""What a process holds besides."""


def provide(number: int) -> int:
    """Raise this process's own limit on open files to a number, or as far as it may; what the limit is then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= number:
        return number if soft == resource.RLIM_INFINITY else soft
    wanted = number if hard == resource.RLIM_INFINITY else min(number, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted


def provide_for_cells(number: int) -> int:
    """Make room for so many cells; for how many there is."""
    return min(number, max(1, (provide(number * PER_CELL + OTHERS) - OTHERS) // PER_CELL))
