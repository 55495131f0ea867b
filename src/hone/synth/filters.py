"""Which conversations become training data: one filter after the other, each counted and with examples."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from hone.config.synthesis import KeepSection
from hone.synth.contamination import EvaluationTexts
from hone.synth.conversations import Conversation
from hone.synth.duplicates import near_duplicates

MAX_EXAMPLES = 3
MIN_LETTERS = 20
"""In a shorter text the language cannot be told; it is kept."""


class Dropped(NamedTuple):
    """A conversation that a filter dropped, and why."""

    conversation: Conversation
    reason: str


@dataclass(slots=True)
class Stage:
    """What one filter did."""

    name: str
    num_in: int
    num_out: int
    examples: list[Dropped] = field(default_factory=list)

    @property
    def num_dropped(self) -> int:
        return self.num_in - self.num_out


Reason = Callable[[Conversation], str | None]
"""Why a conversation, seen alone, is dropped; None keeps it."""


def select(
    conversations: Iterable[Conversation], keep: KeepSection, evaluation_texts: EvaluationTexts
) -> tuple[list[Conversation], list[Stage]]:
    """The conversations that are kept, best first within each task, and what each filter did, in order.

    What looks at one conversation comes first; duplicates are sought among the rest, and the best of each task are
    chosen last, so that a duplicate takes no place of a task.
    """
    kept = list(conversations)
    stages: list[Stage] = []

    def run(name: str, dropped: Mapping[int, str]) -> None:
        nonlocal kept
        examples = [Dropped(kept[index], reason) for index, reason in list(dropped.items())[:MAX_EXAMPLES]]
        left = [one for index, one in enumerate(kept) if index not in dropped]
        stages.append(Stage(name, len(kept), len(left), examples))
        kept = left

    for name, reason in _reasons(keep, evaluation_texts):
        run(name, {index: why for index, one in enumerate(kept) if (why := reason(one)) is not None})
    kept = best_first(kept)
    run("equal to another", _equal(kept))
    if keep.near_duplicates is not None:
        repeats = near_duplicates([one.text for one in kept], keep.near_duplicates)
        run("nearly equal to another", {index: _like(kept[other]) for index, other in repeats.items()})
    if keep.max_per_task is not None:
        run("not among the best of its task", _beyond(kept, keep.max_per_task))
    return kept, stages


def best_first(conversations: Sequence[Conversation]) -> list[Conversation]:
    """Tasks in their order, of each the highest reward first, then the shortest, then the earliest attempt."""
    order: dict[tuple[str, str], int] = {}
    for one in conversations:
        order.setdefault((one.environment, one.task), len(order))
    return sorted(
        conversations,
        key=lambda one: (order[one.environment, one.task], -one.reward, len(one.written), one.attempt),
    )


def language_of(text: str) -> str | None:
    """The language of a text as an ISO 639-1 code; None where it is too short to tell."""
    import py3langid  # of an extra, and slow to load: only where languages are asked for

    if sum(character.isalpha() for character in text) < MIN_LETTERS:
        return None
    return str(py3langid.classify(text)[0])


def _reasons(keep: KeepSection, evaluation_texts: EvaluationTexts) -> list[tuple[str, Reason]]:
    """The filters that look at one conversation, those without effect left out."""
    reasons: list[tuple[str, Reason]] = []
    if not keep.truncated:
        reasons.append(("truncated", lambda one: "ended by a budget" if one.is_truncated else None))
    least = keep.min_reward
    if least is not None:
        reasons.append(("reward", lambda one: f"reward {one.reward:g}" if one.reward < least - 1e-9 else None))
    reasons.append(("length", lambda one: _length(one, keep)))
    if keep.languages:
        reasons.append(("language", lambda one: _language(one, keep.languages)))
    reasons.append(("contaminated", lambda one: evaluation_texts.found_in(_trained_texts(one), one.prompts)))
    return reasons


def _length(one: Conversation, keep: KeepSection) -> str | None:
    size = len(one.written)
    if not one.written.strip():
        return "nothing is said"
    if size < keep.min_characters or (keep.max_characters is not None and size > keep.max_characters):
        return f"{size:,} characters"
    if keep.max_tokens is not None and one.num_tokens > keep.max_tokens:
        return f"{one.num_tokens:,} tokens"
    return None


def _language(one: Conversation, wanted: Sequence[str]) -> str | None:
    found = language_of(one.prose)
    return None if found is None or found in wanted else f"language {found}"


def _trained_texts(one: Conversation) -> list[str]:
    return [*(message.content for message in one.messages if message.role != "assistant"), one.written]


def _equal(conversations: Sequence[Conversation]) -> dict[int, str]:
    first: dict[str, Conversation] = {}
    dropped = {}
    for index, one in enumerate(conversations):
        twin = first.setdefault(one.identity, one)
        if twin is not one:
            dropped[index] = _like(twin)
    return dropped


def _like(twin: Conversation) -> str:
    return f"like task {twin.task}, attempt {twin.attempt}"


def _beyond(conversations: Sequence[Conversation], most: int) -> dict[int, str]:
    """Of several agents, each has places of its own: what they earn is not compared."""
    counts: dict[tuple[str, str, str], int] = {}
    dropped = {}
    for index, one in enumerate(conversations):
        task = (one.environment, one.task, one.agent)
        counts[task] = counts.get(task, 0) + 1
        if counts[task] > most:
            dropped[index] = f"number {counts[task]} of its task, reward {one.reward:g}"
    return dropped
