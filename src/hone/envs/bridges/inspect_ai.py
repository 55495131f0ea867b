"""inspect_ai's tasks as an environment: its solver writes the prompt, its scorers judge the one answer."""

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any

from hone.envs.bridges import BridgeError
from hone.envs.environment import SingleTurn
from hone.envs.messages import assistant
from hone.envs.rubric import Measure, Rubric, reward
from hone.envs.sources import Tasks
from hone.schema.messages import Message
from hone.schema.tasks import Task

SAMPLE = "sample"
"""Where a task's info has the number of its sample."""


def load_environment(
    task: str, *, arguments: Mapping[str, Any] | None = None, held_out_share: float = 1.0
) -> SingleTurn:
    """The task that a function makes, given as `package.module:function`, with its arguments."""
    module, _, name = task.partition(":")
    try:
        make = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise BridgeError(f"inspect_ai task {task!r} cannot be imported as package.module:function: {error}") from error
    return environment_from(make(**(arguments or {})), held_out_share=held_out_share)


def environment_from(task: Any, *, held_out_share: float = 1.0) -> SingleTurn:
    """An environment of an `inspect_ai.Task`: one answer to each sample, the mean of its scorers as the reward.

    held_out_share: of the samples, by the hash of their prompts; all by default: most such tasks are benchmarks.
    Refused are tasks with a sandbox, tools or model-graded scorers, and solvers that ask the model more than once.
    """
    inspected = _Inspected(task)
    split = Tasks(inspected.task, len(task.dataset)).split(held_out_share, by=lambda one: one.prompt[-1].content)
    return SingleTurn(
        name="inspect_ai",
        version=metadata.version("inspect-ai"),
        rubric=Rubric(inspected.measures()),
        train=split.train,
        held_out=split.held_out,
        gold=inspected.gold,
        max_turns=1,
    )


class _Asked(BaseException):
    """Ends a solver where it asks the model; not an Exception, so that no solver takes it for trouble."""


class _Inspected:
    """A task of inspect_ai that has been found to fit."""

    def __init__(self, task: Any) -> None:
        self._library = _library()
        self._task = task
        _refuse(self._library, task)
        self._check_solver()

    def task(self, index: int) -> Task:
        sample = self._task.dataset[index]
        target = [sample.target] if isinstance(sample.target, str) else list(sample.target)
        return Task(tuple(self._prompt(index)), "\n".join(target), {SAMPLE: index})

    def gold(self, task: Task) -> Sequence[Message]:
        sample = self._task.dataset[task.info[SAMPLE]]
        targets = [sample.target] if isinstance(sample.target, str) else list(sample.target)
        return [assistant(f"ANSWER: {', '.join(targets)}" if sample.choices else targets[0])]

    def measures(self) -> Iterator[Measure]:
        scorers = self._task.scorer
        names = [_name(scorer) for scorer in scorers]
        for number, (name, scorer) in enumerate(zip(names, scorers, strict=True)):
            unique = name if names.count(name) == 1 else f"{name}_{number + 1}"
            yield reward(name=unique, weight=1 / len(scorers))(self._measure(scorer))

    def _measure(self, scorer: Any) -> Callable[..., Any]:
        async def score(task: Task, answer: str) -> float:
            """What the scorer says, after the solver has taken the answer as the model's."""
            index = task.info[SAMPLE]
            state = await self._answered(index, answer)
            target = self._library.scorer.Target(self._task.dataset[index].target)
            value = (await scorer(state, target)).value
            if not isinstance(value, str | int | float):
                raise TypeError(f"the scorer's value is {type(value).__name__}; only single values can be rewards")
            return float(self._library.scorer.value_to_float()(value))

        return score

    def _prompt(self, index: int) -> list[Message]:
        """The messages that the solver shows to the model."""
        asked: list[Any] = []

        async def generate(state: Any, *_: Any, **__: Any) -> Any:
            asked.append(state)
            raise _Asked

        solving = self._task.solver(self._state(index), generate)
        try:
            solving.send(None)  # there is nothing to wait for before the model is asked
        except _Asked:
            if asked[0].tools:
                raise BridgeError("the task gives tools to the model, which this bridge does not run") from None
            return [_message(message) for message in asked[0].messages]
        except StopIteration:
            raise BridgeError("the task's solver does not ask the model; it needs generate() or the like") from None
        solving.close()
        raise BridgeError(
            "the task's solver waits for something before it asks the model; this bridge has no loop then"
        )

    async def _answered(self, index: int, answer: str) -> Any:
        """The state that the solver leaves when the model has given this answer."""
        num_asked = 0

        async def generate(state: Any, *_: Any, **__: Any) -> Any:
            nonlocal num_asked
            num_asked += 1
            if num_asked > 1:
                raise BridgeError("the task's solver asks the model more than once; only single answers are bridged")
            state.messages.append(self._library.model.ChatMessageAssistant(content=answer))
            state.output = self._library.model.ModelOutput.from_content(str(state.model), answer)
            return state

        return await self._task.solver(self._state(index), generate)

    def _state(self, index: int) -> Any:
        sample, model = self._task.dataset[index], self._library.model
        given = sample.input
        messages = [model.ChatMessageUser(content=given)] if isinstance(given, str) else list(given)
        return self._library.solver.TaskState(
            model=model.ModelName("hone/policy"),
            sample_id=sample.id if sample.id is not None else index,
            epoch=1,
            input=given,
            messages=[message.model_copy(deep=True) for message in messages],
            target=self._library.scorer.Target(sample.target),
            choices=sample.choices,
            metadata=dict(sample.metadata or {}),
        )

    def _check_solver(self) -> None:
        """Try the solver on the first sample, as far as it goes without waiting."""
        self._prompt(0)
        answering = self._answered(0, "")
        try:
            answering.send(None)
        except StopIteration:
            return
        except BridgeError:
            raise
        except Exception as error:  # a solver may raise anything
            raise BridgeError(f"the task's solver cannot take an answer: {error!r}") from error
        answering.close()


def _library() -> Any:
    try:
        import inspect_ai  # an extra that takes seconds to import
        import inspect_ai.model
        import inspect_ai.scorer
        import inspect_ai.solver
    except ImportError as error:
        raise BridgeError("inspect_ai is not installed: pip install 'hone[inspect-ai]'") from error
    return inspect_ai


def _refuse(library: Any, task: Any) -> None:
    if not isinstance(task, library.Task):
        raise BridgeError(f"{type(task).__name__} is no inspect_ai.Task; give the task, or a function that returns one")
    if not len(task.dataset):
        raise BridgeError("the task's data set is empty")
    if not task.scorer:
        raise BridgeError("the task has no scorer, so nothing says what an answer is worth")
    graded = [_name(scorer) for scorer in task.scorer if _name(scorer).startswith("model_graded")]
    if graded:
        raise BridgeError(f"scorer {graded[0]} asks a model of inspect_ai's; give the task a judge as a reward instead")
    if task.sandbox is not None or any(sample.sandbox or sample.files or sample.setup for sample in task.dataset):
        raise BridgeError("the task runs in a sandbox of inspect_ai's, which this bridge does not start")
    if task.setup is not None:
        raise BridgeError("the task has a setup solver, which this bridge does not run; put it into the solver")


def _name(scorer: Any) -> str:
    from inspect_ai._util.registry import registry_info  # a scorer does not tell its name otherwise

    return str(registry_info(scorer).name.rpartition("/")[2])


def _message(message: Any) -> Message:
    is_text = isinstance(message.content, str) or all(part.type == "text" for part in message.content)
    if message.role not in ("system", "user", "assistant") or not is_text or getattr(message, "tool_calls", None):
        raise BridgeError(f"a {message.role} message of the task is not plain text, which is all that is bridged")
    return Message(message.role, message.text)
