"""The texts: words of a list, sentences of a grammar, strings of letters; each text on one side of the split."""

import random
from collections.abc import Callable
from functools import partial
from importlib.resources import files
from typing import Literal, get_args

from hone.envs import Task, Tasks, is_held_out, user
from hone.schema.seeds import derive_seed
from hone_reverse_text.grammar import sentence

Mode = Literal["words", "sentences", "letters"]

LENGTHS: dict[str, tuple[int, int]] = {"words": (3, 8), "sentences": (10, 60), "letters": (4, 6)}
ALPHABET = "abcdefghijkl"
MAX_DRAWS = 2000


def tasks_of(
    mode: Mode,
    *,
    lengths: tuple[int | None, int | None],
    alphabet: str | None,
    num_train_tasks: int | None,
    held_out_share: float,
    shuffled_share: float,
    prompt: str,
    seed: int,
) -> tuple[Tasks, Tasks]:
    """Train and held-out tasks. Texts that read the same backwards are left out: copying would solve them."""
    low, high = _lengths(mode, *lengths)
    if "{text}" not in prompt:
        raise ValueError(f"prompt {prompt!r} does not contain {{text}}")
    if not 0 < held_out_share < 1:
        raise ValueError(f"held_out_share {held_out_share} is not between 0 and 1")
    if alphabet is not None and mode != "letters":
        raise ValueError(f"alphabet has no effect with mode {mode!r}; remove it or use mode 'letters'")
    if not 0 <= shuffled_share <= 1 or (shuffled_share and mode != "words"):
        raise ValueError(f"shuffled_share {shuffled_share} is for mode 'words' and lies in [0, 1]")
    make = partial(_task, prompt)
    if mode == "words":
        train, held_out = _words(low, high, held_out_share, make)
        if shuffled_share:
            train = _shuffled(train, shuffled_share, held_out_share, seed, make)
    elif mode == "sentences":
        train, held_out = _drawn(sentence, low, high, held_out_share, seed, make)
    else:
        letters = _letters(alphabet if alphabet is not None else ALPHABET)
        write = partial(_string, letters, low, high)
        train, held_out = _drawn(write, low, high, held_out_share, seed, make)
    return _first(train, num_train_tasks), held_out


def words() -> list[str]:
    """The word list, in alphabetical order."""
    return sorted(files("hone_reverse_text").joinpath("words.txt").read_text().split())


def _lengths(mode: str, low: int | None, high: int | None) -> tuple[int, int]:
    if mode not in LENGTHS:
        raise ValueError(f"mode {mode!r} is unknown; there are {', '.join(get_args(Mode))}")
    low = LENGTHS[mode][0] if low is None else low
    high = LENGTHS[mode][1] if high is None else high
    if not 2 <= low <= high:
        raise ValueError(f"texts of {low} to {high} characters: min_length must be 2 or more and at most max_length")
    return low, high


def _letters(alphabet: str) -> str:
    if len(set(alphabet)) != len(alphabet) or len(alphabet) < 2 or any(c.isspace() for c in alphabet):
        raise ValueError(f"alphabet {alphabet!r} must be two or more different characters without white space")
    return alphabet


def _task(prompt: str, text: str) -> Task:
    return Task(prompt=(user(prompt.replace("{text}", text)),), reference=text[::-1])


def _words(low: int, high: int, share: float, make: Callable[[str], Task]) -> tuple[Tasks, Tasks]:
    """In the order of a hash, so that the first few are as mixed as all of them."""
    fitting = [word for word in words() if low <= len(word) <= high and word != word[::-1]]
    fitting.sort(key=lambda word: derive_seed(0, "order of words", word))
    train = [word for word in fitting if not is_held_out(word, share)]
    held_out = [word for word in fitting if is_held_out(word, share)]
    if not train or not held_out:
        name = "held-out" if train else "train"
        raise ValueError(f"no {name} words of {low} to {high} letters; widen min_length and max_length")
    return (
        Tasks(lambda index: make(train[index]), len(train)),
        Tasks(lambda index: make(held_out[index]), len(held_out)),
    )


def _shuffled(
    words: Tasks, shuffled_share: float, held_out_share: float, seed: int, make: Callable[[str], Task]
) -> Tasks:
    """Endless: words, and words with their letters in another order, which nobody can have learned by heart."""
    assert words.count is not None
    count = words.count

    def task(index: int) -> Task:
        draw = random.Random(derive_seed(seed, "shuffled", index))
        word = words[draw.randrange(count)]
        assert word.reference is not None
        letters = list(word.reference)
        if draw.random() >= shuffled_share or len(set(letters)) == 1:
            return word
        for _ in range(MAX_DRAWS):
            draw.shuffle(letters)
            text = "".join(letters)
            if text != text[::-1] and not is_held_out(text, held_out_share):
                return make(text)
        return word  # every order of its letters is held out

    return Tasks(task)


def _drawn(
    write: Callable[[random.Random], str],
    low: int,
    high: int,
    share: float,
    seed: int,
    make: Callable[[str], Task],
) -> tuple[Tasks, Tasks]:
    def text(side: bool, index: int) -> str:
        draw = random.Random(derive_seed(seed, "text", side, index))
        for _ in range(MAX_DRAWS):
            text = write(draw)
            if low <= len(text) <= high and text != text[::-1] and is_held_out(text, share) is side:
                return text
        raise ValueError(f"found no text of {low} to {high} characters in {MAX_DRAWS} draws; widen the lengths")

    text(False, 0), text(True, 0)  # what cannot be drawn shall be refused now
    return Tasks(lambda index: make(text(False, index))), Tasks(lambda index: make(text(True, index)))


def _string(letters: str, low: int, high: int, draw: random.Random) -> str:
    return "".join(draw.choices(letters, k=draw.randint(low, high)))


def _first(tasks: Tasks, count: int | None) -> Tasks:
    if count is None:
        return tasks
    if count < 1 or (tasks.count is not None and count > tasks.count):
        raise ValueError(f"num_train_tasks {count}: there are {tasks.count or 'endless'} train texts of these lengths")
    return Tasks(tasks.make, count)
