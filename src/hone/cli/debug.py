"""`hone env debug`: one rollout on the terminal, message by message, while it happens."""

import contextlib
import logging
import traceback
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hone.envs.attacks import gold_turns
from hone.envs.environment import Environment
from hone.envs.failures import logger as failures
from hone.envs.rollout import Limits, run_rollout
from hone.envs.sampler import Sampler
from hone.envs.validation import Answers
from hone.schema.messages import Message, ToolSpec
from hone.schema.sampling import SamplingParameters, Turn
from hone.schema.tasks import Task
from hone.schema.traces import Node, Reward, Trace

MAX_CHARACTERS = 8000
"""Characters of one message that are shown."""
COLOURS = {"system": "magenta", "user": "blue", "assistant": "green", "tool": "yellow"}


@dataclass(frozen=True, slots=True)
class Debugged:
    """Which rollout, and how it is sampled."""

    index: int
    is_held_out: bool
    seed: int
    temperature: float
    max_tokens: int | None
    max_turns: int | None
    deadline_seconds: float


async def debug_rollout(
    environment: Environment, settings: Debugged, target: str | None, model: str | None, api_key: str | None
) -> Trace:
    """Run the rollout and print it; target None plays the gold answer."""
    console = Console(highlight=False, soft_wrap=True)
    task, place = _task(environment, settings)
    async with _sampler(environment, task, settings, target, model, api_key) as sampler:
        _print_head(console, environment, task, place)
        watched = _Watched(sampler, console)
        with _tracebacks() as raised:
            trace = await run_rollout(
                environment,
                task,
                0,
                watched,
                SamplingParameters(temperature=settings.temperature, max_tokens=settings.max_tokens),
                settings.seed,
                Limits(max_turns=settings.max_turns, deadline_seconds=settings.deadline_seconds),
            )
    watched.show_new(trace.nodes)
    _print_end(console, trace, raised)
    return trace


def _task(environment: Environment, settings: Debugged) -> tuple[Task, str]:
    split = "held-out" if settings.is_held_out else "train"
    count = environment.num_held_out_tasks if settings.is_held_out else environment.num_train_tasks
    if count is not None and settings.index >= count:
        raise ValueError(f"--index {settings.index}: environment {environment.name!r} has {count} {split} tasks")
    task_at = environment.held_out_task if settings.is_held_out else environment.train_task
    return task_at(settings.index), f"{split} task {settings.index}"


@contextlib.asynccontextmanager
async def _sampler(
    environment: Environment, task: Task, settings: Debugged, target: str | None, model: str | None, api_key: str | None
) -> AsyncIterator[Sampler]:
    if target is None:
        gold = gold_turns(environment, task)
        if not gold:
            raise ValueError(f"environment {environment.name!r} knows no gold answer to this task; name who answers")
        yield Answers(gold)
        return
    from hone.launch.samplers import sampler_for  # with --gold no engine's client is needed

    async with sampler_for(target, model=model, api_key=api_key, deadline_seconds=settings.deadline_seconds) as sampler:
        yield sampler


class _Watched:
    """A sampler that prints what it is asked and what it answers, as it happens."""

    def __init__(self, sampler: Sampler, console: Console) -> None:
        self._sampler = sampler
        self._console = console
        self._num_shown = 0

    async def sample(self, branch: Sequence[Node], tools: Sequence[ToolSpec], sampling: SamplingParameters) -> Turn:
        self.show_new(branch)
        with self._console.status("the model answers") if self._console.is_terminal else contextlib.nullcontext():
            turn = await self._sampler.sample(branch, tools, sampling)
        _print_message(self._console, turn.message, _turn_facts(turn))
        self._num_shown += 1
        return turn

    def show_new(self, nodes: Sequence[Node]) -> None:
        """Print the messages since the last time."""
        for node in nodes[self._num_shown :]:
            _print_message(self._console, node.message, "" if node.turn is None else _turn_facts(node.turn))
        self._num_shown = max(self._num_shown, len(nodes))


def _turn_facts(turn: Turn) -> str:
    facts = [str(turn.finish_reason), f"{turn.num_prompt_tokens} prompt tokens ({turn.num_cached_tokens} cached)"]
    facts.append(f"{turn.num_completion_tokens} sampled")
    if turn.token_ids:
        mean = sum(turn.logprobs) / max(1, len(turn.logprobs))
        versions = ", ".join(dict.fromkeys(str(run.version) for run in turn.versions))
        facts.append(f"{len(turn.logprobs)} logprobs, mean {mean:.3f}, policy version {versions}")
    else:
        facts.append("no token ids")
    return " · ".join([*facts, f"{turn.seconds:.2f} s"])


def _print_head(console: Console, environment: Environment, task: Task, place: str) -> None:
    console.print(Text(f"{environment.name} {environment.version} · {place} · {task.key}", "bold"))
    for tool in environment.tools:
        console.print(Text(f"tool       {tool.name}: {tool.description}", "dim"))
    if task.reference is not None:
        console.print(Text(f"reference  {_cut(task.reference)}", "dim"))
    if task.info:
        console.print(Text(f"info       {_cut(str(task.info))}", "dim"))


def _print_message(console: Console, message: Message, facts: str) -> None:
    colour = COLOURS[message.role]
    name = f" {message.name}" if message.name else ""
    console.print(Text.assemble(("\n" + message.role + name, f"bold {colour}"), (f"  {facts}", "dim")))
    if message.reasoning is not None:
        console.print(Text(_cut(message.reasoning), "dim italic"))
    if message.content or not message.tool_calls:
        console.print(Text(_cut(message.content) or "(empty)"))
    for call in message.tool_calls:
        console.print(Text(f"→ {call.name}({_cut(call.arguments)})  {call.id}", "cyan"))


def _print_end(console: Console, trace: Trace, raised: Sequence[BaseException]) -> None:
    timing = trace.timing
    console.print()
    if trace.failure is not None:
        console.print(
            Text(f"failed: {trace.failure.kind} in {trace.failure.where}: {trace.failure.message}", "bold red")
        )
    for error in raised:
        console.print(Text("".join(traceback.format_exception(error)).rstrip(), "red"))
    if trace.failure is None:
        console.print(_scores(trace))
    turns = trace.turns
    console.print(
        f"{f'stopped: {trace.stop_reason} · ' if trace.stop_reason else ''}{len(turns)} turns ·"
        f" {sum(turn.num_completion_tokens for turn in turns)} tokens sampled · {timing.total_seconds:.2f} s:"
        f" setup {timing.setup_seconds:.2f}, model {timing.generate_seconds:.2f}, environment"
        f" {timing.environment_seconds:.2f}, rewards {timing.score_seconds:.2f}"
        + (f"; in sandboxes {timing.sandbox_seconds:.2f}" if timing.sandbox_seconds else "")
    )
    for name, value in trace.info.items():
        console.print(Text(f"info.{name}  {_cut(str(value))}", "dim"))


def _score(name: str, reward: Reward) -> tuple[str, str, str, str]:
    return name, f"{reward.value:.4g}", f"{reward.weight:g}", f"{reward.value * reward.weight:.4g}"


def _scores(trace: Trace) -> Table:
    table = Table("", "value", "weight", "counts")
    for name, reward in trace.rewards.items():
        table.add_row(*_score(name, reward))
    for agent, record in trace.agents.items():
        for name, reward in record.rewards.items():
            table.add_row(*_score(f"{agent}.{name}", reward))
    table.add_row(Text("reward", "bold"), "", "", Text(f"{trace.reward:.4g}", "bold"), end_section=True)
    for name, value in trace.metrics.items():
        table.add_row(name, f"{value:.4g}", "metric", "")
    return table


@contextlib.contextmanager
def _tracebacks() -> Iterator[list[BaseException]]:
    """The exceptions that become failures while the body runs: a trace keeps only a sentence of each."""
    raised: list[BaseException] = []

    class Keeps(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.exc_info and record.exc_info[1] is not None and record.exc_info[1] not in raised:
                raised.append(record.exc_info[1])

    handler, level, propagate = Keeps(), failures.level, failures.propagate
    failures.addHandler(handler)
    failures.setLevel(logging.DEBUG)
    failures.propagate = False
    try:
        yield raised
    finally:
        failures.removeHandler(handler)
        failures.setLevel(level)
        failures.propagate = propagate


def _cut(text: str) -> str:
    return text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]} … ({len(text):,} characters)"
