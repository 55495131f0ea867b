"""reasoning-gym's procedural data sets as an environment, after their scorers have told right from wrong."""

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from importlib import metadata
from typing import Any

from hone.envs.bridges import BridgeError
from hone.envs.environment import SingleTurn
from hone.envs.failures import describe
from hone.envs.messages import assistant, system, user
from hone.envs.rubric import Measure, Rubric, reward
from hone.envs.sources import concatenated
from hone.envs.streams import generated
from hone.schema.messages import Message
from hone.schema.tasks import Task

INSTRUCTIONS = "Think as long as you like, then write your final answer between <answer> and </answer>."
ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)

FULL_MARKS = 1 - 1e-9
NO_ANSWERS = ("", " ", "I do not know.", "asdf qwer", "{}", "nan", "x" * 1000)
"""What answers no question; full marks for one of them, once, show a broken scorer."""
GUESSES = ("0", "1", "-1", "yes", "no", "True", "False", "None", "[]")
"""What may be right by chance."""
LUCKY_SHARE = 0.25
"""A guess, or the answer to another question, may be right for so many of the questions."""


def load_environment(
    datasets: str | Sequence[str],
    *,
    size: int = 500,
    seed: int = 0,
    held_out_share: float = 0.2,
    configs: Mapping[str, Mapping[str, Any]] | None = None,
    instructions: str = INSTRUCTIONS,
    num_checked: int = 15,
) -> SingleTurn:
    """One or more of reasoning-gym's data sets, scored by their own scorers; the reward lies in [0, 1].

    size: tasks of each data set. seed: of its generator. configs: further arguments of a data set, by its name.
    instructions: a system message; the policy answers between <answer> and </answer>. num_checked: questions on which
    each scorer is tried first.

    A data set is refused when its own answers do not earn full marks, when no answer or the answer to another question
    does, and when its scorer raises: such a reward teaches the wrong thing.
    """
    names = [datasets] if isinstance(datasets, str) else list(datasets)
    sources = {name: _data_set(name, size, seed, (configs or {}).get(name, {})) for name in names}
    _check(sources, num_checked)
    parts = [generated(partial(_tasks, name, source, instructions)) for name, source in sources.items()]
    # By the question alone: what is asked twice is on one side.
    split = concatenated(*parts).split(held_out_share, by=lambda task: task.prompt[-1].content)
    return SingleTurn(
        name="reasoning_gym",
        version=metadata.version("reasoning-gym"),
        rubric=Rubric([_score(sources)]),
        train=split.train,
        held_out=split.held_out,
        gold=_gold,
        max_turns=1,
    )


def flaws(data_set: Any, num_checked: int = 15) -> list[str]:
    """What is wrong with a scorer of reasoning-gym, one sentence each; empty when it can be used.

    data_set: as `reasoning_gym.create_dataset` makes it.
    """
    entries = [data_set[index] for index in range(min(num_checked, len(data_set)))]
    without = sum(not isinstance(entry["answer"], str) for entry in entries)
    if without:
        return [f"{without} of {len(entries)} questions have no answer that could be checked"]
    try:
        return [*_gold_flaws(data_set, entries), *_junk_flaws(data_set, entries), *_luck_flaws(data_set, entries)]
    except Exception as error:  # code of the data set may raise anything
        return [f"its scorer raises on an answer that a policy may give: {describe(error)}"]


def _data_set(name: str, size: int, seed: int, config: Mapping[str, Any]) -> Any:
    try:
        import reasoning_gym  # an extra
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise BridgeError("reasoning-gym is not installed: pip install 'hone[reasoning-gym]'") from error
    if name not in DATASETS:
        raise BridgeError(f"reasoning-gym has no data set {name!r}; it has {', '.join(sorted(DATASETS))}")
    try:
        return reasoning_gym.create_dataset(name, size=size, seed=seed, **config)
    except (TypeError, ValueError, AssertionError) as error:
        raise BridgeError(f"reasoning-gym's {name} cannot be made with {dict(config)}: {error}") from error


def _check(sources: Mapping[str, Any], num_checked: int) -> None:
    if num_checked < 2:
        raise BridgeError(f"num_checked {num_checked} compares no two questions; use 2 or more")
    found = [f"  {name}: {flaw}" for name, source in sources.items() for flaw in flaws(source, num_checked)]
    if found:
        raise BridgeError(
            "reasoning-gym's scorers do not tell right from wrong, leave these data sets out:\n" + "\n".join(found)
        )


def _gold_flaws(data_set: Any, entries: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    poor = sum(not _is_full(data_set, entry["answer"], entry) for entry in entries)
    if poor:
        yield f"its own answer does not earn full marks for {poor} of {len(entries)} questions"


def _junk_flaws(data_set: Any, entries: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for text in NO_ANSWERS:
        full = sum(_is_wrongly_full(data_set, text, entry) for entry in entries)
        if full:
            yield f"{_shown(text)} earns full marks for {full} of {len(entries)} questions"
    full = sum(_is_wrongly_full(data_set, entry["question"], entry) for entry in entries)
    if full:
        yield f"the question as the answer earns full marks for {full} of {len(entries)} questions"


def _luck_flaws(data_set: Any, entries: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for text in GUESSES:
        full = sum(_is_wrongly_full(data_set, text, entry) for entry in entries)
        if full > LUCKY_SHARE * len(entries):
            yield f"{_shown(text)} earns full marks for {full} of {len(entries)} questions"
    others = [(entries[index - 1]["answer"], entry) for index, entry in enumerate(entries)]
    full = sum(_is_wrongly_full(data_set, text, entry) for text, entry in others)
    if full > LUCKY_SHARE * len(entries):
        yield f"the answer to another question earns full marks for {full} of {len(entries)} questions"


def _is_wrongly_full(data_set: Any, text: str, entry: Mapping[str, Any]) -> bool:
    return _is_full(data_set, text, entry) and not _is_same(text, entry["answer"])


def _is_full(data_set: Any, text: str, entry: Mapping[str, Any]) -> bool:
    return bool(data_set.score_answer(text, entry) >= FULL_MARKS)


def _is_same(text: str, answer: str) -> bool:
    """Whether two answers differ in nothing but case and white space, or are the same number."""
    if text.split() == answer.split() or text.lower().split() == answer.lower().split():
        return True
    try:
        return float(text) == float(answer)
    except ValueError:
        return False


def _shown(text: str) -> str:
    return repr(text if len(text) < 40 else text[:20] + "…")


def _tasks(name: str, data_set: Any, instructions: str) -> Iterator[Task]:
    for index in range(len(data_set)):
        entry = data_set[index]
        prompt = (system(instructions), user(entry["question"]))
        yield Task(prompt, entry["answer"], {"data_set": name, "index": index})


def _gold(task: Task) -> list[Message]:
    return [assistant(f"<answer>{task.reference}</answer>")]


def _score(sources: Mapping[str, Any]) -> Measure:
    @reward(blocking=True)
    def score(task: Task, answer: str) -> float:
        """What the data set's own scorer says of the text between the last answer tags."""
        source, index = sources.get(task.info["data_set"]), task.info["index"]
        if source is None or source[index]["question"] != task.prompt[-1].content:
            raise ValueError(f"question {index} of {task.info['data_set']} is another one here: its arguments differ")
        found = ANSWER.findall(answer)
        return float(source.score_answer(found[-1].strip() if found else "", source[index]))

    return score
