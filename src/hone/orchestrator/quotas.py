"""Turns shared out by weight: after any number of them nobody is a whole turn away from the exact share."""

import math
from collections.abc import Mapping
from fractions import Fraction


class Quotas:
    """Who is next, so that after n turns each name was taken floor(q) or ceil(q) times, where q = n * weight / total.

    So a count never differs from its share by 1 or more, and is exact whenever the share is a whole number. This is the
    quota method of Balinski and Young (1975), in whole numbers: a weight counts as the decimal number that it is
    written as. The next turn depends on the counts so far and on nothing else.
    """

    def __init__(self, weights: Mapping[str, float | Fraction]) -> None:
        exact = {name: Fraction(str(weight)) for name, weight in weights.items()}
        scale = math.lcm(*(weight.denominator for weight in exact.values()))
        self._weights = {name: int(weight * scale) for name, weight in exact.items()}
        self._total = sum(self._weights.values())
        self._num_turns = 0
        self.counts = dict.fromkeys(weights, 0)

    def restore(self, counts: Mapping[str, int]) -> None:
        """Go on after each name was taken so often."""
        self.counts |= counts
        self._num_turns = sum(self.counts.values())

    def take(self) -> str:
        """The next one: among those that have not yet their share rounded up, who needs the turn most."""
        self._num_turns += 1
        chosen, chosen_weight, chosen_count = "", 0, 1
        for name, weight in self._weights.items():
            count = self.counts[name]
            is_eligible = count * self._total < weight * self._num_turns
            if is_eligible and weight * chosen_count > chosen_weight * (count + 1):
                chosen, chosen_weight, chosen_count = name, weight, count + 1
        self.counts[chosen] += 1
        return chosen

    def error(self, name: str) -> Fraction:
        """How far the count of `name` is from its exact share of the turns so far."""
        return abs(self.counts[name] - Fraction(self._weights[name] * self._num_turns, self._total))
