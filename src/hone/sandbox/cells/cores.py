"""Which of the machine's cores a cell gets: those that the fewest others have."""

import heapq
import math
import random
from collections.abc import Iterable


class Cores:
    """The machine's cores and how many cells each is given to. Where all are alike, chance decides once for all.

    With the same order everywhere, the cells of many small nodes on one machine would all be on its first core.
    """

    def __init__(self, cores: Iterable[int]) -> None:
        order = sorted(cores)
        random.shuffle(order)
        self._num_uses = dict.fromkeys(order, 0)

    def take(self, number: float) -> frozenset[int]:
        """So many, rounded up, or all there are."""
        taken = heapq.nsmallest(math.ceil(number), self._num_uses, key=self._num_uses.__getitem__)
        for core in taken:
            self._num_uses[core] += 1
        return frozenset(taken)

    def give_back(self, cores: Iterable[int]) -> None:
        """A cell is gone."""
        for core in cores:
            self._num_uses[core] -= 1
