"""How an answer is judged: 1 when it is exact, else a small credit that grows with the longest common subsequence."""

from hone.envs import Measure, metric, reward


@metric
def exact(answer: str, reference: str) -> bool:
    """Whether the answer, without white space around it, is the reversed text."""
    return answer.strip() == reference


def reversal(partial_credit: float) -> Measure:
    """The reward. Squaring the similarity keeps an almost right answer well below an exact one."""

    @reward(name="reversal")
    def judge(answer: str, reference: str) -> float:
        answer = answer.strip()
        return 1.0 if answer == reference else partial_credit * similarity(answer, reference) ** 2

    return judge


def similarity(answer: str, reference: str) -> float:
    """Twice the longest common subsequence over both lengths: 1 for equal texts, 0 without a common character.

    Both lengths count, so that rambling until the right letters have come by earns little.
    """
    total = len(answer) + len(reference)
    if not total:
        return 1.0
    longest_useful = 20 * len(reference)
    return 2 * longest_common_subsequence(answer[:longest_useful], reference) / total


def longest_common_subsequence(text: str, other: str) -> int:
    """Its length, in O(len(text)) operations on integers of len(other) bits.

    Bit i of `row` is 0 where the length grows at position i of `other`; one addition moves all positions on at once.
    """
    positions: dict[str, int] = {}
    for index, character in enumerate(other):
        positions[character] = positions.get(character, 0) | 1 << index
    full = (1 << len(other)) - 1
    row = full
    for character in text:
        matches = row & positions.get(character, 0)
        row = (row + matches | row - matches) & full
    return len(other) - row.bit_count()
