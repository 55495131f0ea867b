"""Environment: the policy writes a text backwards."""

from hone.envs import Message, Rubric, SingleTurn, Task, assistant
from hone_reverse_text.rewards import exact, reversal
from hone_reverse_text.tasks import Mode, tasks_of


def load_environment(
    mode: Mode = "words",
    *,
    min_length: int | None = None,
    max_length: int | None = None,
    alphabet: str | None = None,
    num_train_tasks: int | None = None,
    held_out_share: float = 0.2,
    shuffled_share: float = 0.0,
    prompt: str = "Write this backwards, and nothing else: {text}",
    partial_credit: float = 0.5,
    seed: int = 0,
) -> SingleTurn:
    """Texts to write backwards; the reward is 1 for the exact answer and partial below.

    mode: `words` (some 2,500 common English words), `sentences` (of a small grammar; endless), `letters` (random
    strings of `alphabet`; endless). min_length, max_length: of the text, in characters; by default 3 to 8 for words, 10
    to 60 for sentences, 4 to 6 for letters. num_train_tasks: only the first so many; default: all.
    held_out_share: share of all texts that is never trained. shuffled_share: of the train words, which then are drawn
    without end, so many have their letters shuffled: a policy learns to reverse instead of learning the list. prompt: must contain {text}.
    partial_credit: most that an answer earns which is not exact. seed: of the texts that are drawn.
    """
    if not 0 <= partial_credit < 1:
        raise ValueError(f"partial_credit {partial_credit} is not in [0, 1); an inexact answer must earn less than 1")
    train, held_out = tasks_of(
        mode,
        lengths=(min_length, max_length),
        alphabet=alphabet,
        num_train_tasks=num_train_tasks,
        held_out_share=held_out_share,
        shuffled_share=shuffled_share,
        prompt=prompt,
        seed=seed,
    )
    return SingleTurn(
        name="reverse_text",
        rubric=Rubric([reversal(partial_credit), exact]),
        train=train,
        held_out=held_out,
        max_turns=1,
        gold=_gold,
    )


def _gold(task: Task) -> list[Message]:
    assert task.reference is not None
    return [assistant(task.reference)]
