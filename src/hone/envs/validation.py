"""An environment checked without a model: play given answers through it, gold ones above all."""

from collections.abc import Iterator, Sequence

from hone.envs.environment import Environment
from hone.envs.messages import assistant
from hone.envs.rollout import Limits, run_rollout
from hone.schema.messages import Message, ToolSpec
from hone.schema.sampling import FinishReason, SamplingParameters, Turn
from hone.schema.tasks import Task
from hone.schema.traces import Node, Trace

MAX_TURNS = 16
"""Answers that repeat do so for at most so many turns, in an environment that sets no limit itself."""


class GoldError(ValueError):
    """An environment whose gold conversation is not what a rollout of it gives."""


async def play(environment: Environment, task: Task, *answers: str | Message, truncated: bool = False) -> Trace:
    """The trace of a policy that gives these answers, one a turn; one more turn than answers is a failure.

    truncated: the last answer was cut off by the token budget.
    """
    return await play_answers(environment, task, Answers(answers, truncated=truncated))


async def check_gold(environment: Environment, task: Task) -> Trace:
    """Play the gold conversation: it must be solved, and the environment must reply what the conversation says."""
    gold = environment.gold(task)
    if gold is None:
        raise GoldError(f"{environment.name} knows no gold conversation for task {task.key}")
    trace = await play(environment, task, *(message for message in gold if message.role == "assistant"))
    if trace.failure is not None:
        raise GoldError(f"gold conversation of {environment.name}, task {task.key}: {trace.failure.message}")
    happened = trace.messages[len(task.prompt) :]
    if happened != gold:
        raise GoldError(f"gold conversation of {environment.name}, task {task.key}: got {happened}, expected {gold}")
    if not environment.is_solved(trace):
        raise GoldError(f"gold conversation of {environment.name}, task {task.key}, has reward {trace.reward}, not 1")
    return trace


async def play_answers(environment: Environment, task: Task, answers: "Answers") -> Trace:
    """The trace of a policy that says what `answers` gives."""
    limits = Limits(max_turns=MAX_TURNS if answers.repeats else None)
    return await run_rollout(environment, task, 0, answers, SamplingParameters(), seed=0, limits=limits)


class Answers:
    """A sampler that gives answers in their order; repeats: the last one again and again."""

    def __init__(self, answers: Sequence[str | Message], repeats: bool = False, truncated: bool = False) -> None:
        self.repeats = repeats
        self._left: Iterator[str | Message] = iter(answers)
        self._last = answers[-1] if answers and repeats else None
        self._num_left = len(answers)
        self._truncated = truncated

    async def sample(self, branch: Sequence[Node], tools: Sequence[ToolSpec], sampling: SamplingParameters) -> Turn:
        answer = next(self._left, self._last)
        if answer is None:
            raise LookupError("the environment asks for one more turn than there are answers")
        self._num_left -= 1
        message = assistant(answer) if isinstance(answer, str) else answer
        is_cut = self._truncated and not self._num_left
        return Turn(message, FinishReason.LENGTH if is_cut else FinishReason.STOP)
