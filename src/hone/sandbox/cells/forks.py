"""Forks of this process that do not exec, such as workers of a data loader: they shall hold nothing of its cells."""

import contextlib
import os
import weakref
from typing import Protocol


class Holder(Protocol):
    """Whoever has descriptors by whose closing somebody notices an end."""

    def close_in_child(self) -> None:
        """In a forked child: close them, and nothing else: the loop and what waits in it are the parent's."""


_holders: "weakref.WeakSet[Holder]" = weakref.WeakSet()


def keep_from_forks(holder: Holder) -> None:
    """Have its descriptors closed in each child that is forked while it lives."""
    _holders.add(holder)


def _close_all() -> None:
    for holder in list(_holders):
        with contextlib.suppress(OSError):
            holder.close_in_child()


os.register_at_fork(after_in_child=_close_all)
