"""The activity: the policy attempts a task once, under budgets and a deadline, and leaves a trace whatever happens."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import msgspec

from hone.envs.failures import RolloutFailure, failures_as
from hone.envs.pacing import take_turn
from hone.envs.rubric import NO_SCORES
from hone.envs.sampler import Sampler
from hone.schema.messages import Message, ToolSpec
from hone.schema.sampling import FinishReason, SamplingParameters, Turn
from hone.schema.seeds import derive_seed
from hone.schema.tasks import Task
from hone.schema.traces import Failure, FailureClass, Node, Reward, StopReason, Timing, Trace

if TYPE_CHECKING:  # these import this module
    from hone.envs.agents import Seat
    from hone.envs.environment import Environment


@dataclass(frozen=True, slots=True)
class Limits:
    """Budgets, which truncate a rollout that is scored all the same, and deadlines, which fail it.

    max_turns, max_tool_calls: the lower of this and the environment's own holds. max_tokens: sampled tokens over all
    turns.
    budget_seconds: no further turn begins after this long. deadline_seconds: for setup, turns and rewards together.
    teardown_seconds: for the environment's teardown.
    """

    max_turns: int | None = None
    max_tool_calls: int | None = None
    max_tokens: int | None = None
    budget_seconds: float | None = None
    deadline_seconds: float = 600.0
    teardown_seconds: float = 60.0


class Rollout:
    """One rollout under way, as the environment sees it.

    task: what is attempted. attempt: the rollout's number within its group. state: whatever the environment wants to
    keep for this rollout. agents: those of a `MultiAgent` environment, by name. info: what the trace shall remember; JSON-like values only. metrics: numbers that the course
    of the rollout measures, beside those of the rubric. tools: what the policy can call from its next turn on. nodes:
    the messages so far, each the child of the one before, unless `append_after` and `turn_after` make branches.
    """

    __slots__ = (
        "_budget_ends",
        "_max_tokens",
        "_max_tool_calls",
        "_max_turns",
        "_num_begun",
        "_sampler",
        "_sampling",
        "_seed",
        "agents",
        "attempt",
        "failure",
        "generate_seconds",
        "info",
        "metrics",
        "nodes",
        "num_tool_calls",
        "num_turns",
        "sandbox_seconds",
        "state",
        "stop_reason",
        "task",
        "tools",
    )

    def __init__(
        self,
        task: Task,
        attempt: int,
        sampler: Sampler,
        sampling: SamplingParameters,
        seed: int,
        *,
        max_turns: int | None = None,
        max_tool_calls: int | None = None,
        max_tokens: int | None = None,
        budget_seconds: float | None = None,
        tools: Sequence[ToolSpec] = (),
    ) -> None:
        self.task = task
        self.attempt = attempt
        self.tools = tools
        self.state: Any = None
        self.agents: dict[str, Seat] = {}
        self.info: dict[str, Any] = {}
        self.metrics: dict[str, float] = {}
        self.nodes = [Node(message, index - 1 if index else None) for index, message in enumerate(task.prompt)]
        self.num_turns = 0
        self.num_tool_calls = 0
        self.stop_reason: StopReason | None = None
        self.failure: Failure | None = None
        self.generate_seconds = 0.0
        self.sandbox_seconds = 0.0
        self._sampler = sampler
        self._sampling = sampling
        self._seed = seed
        self._max_turns = max_turns
        self._num_begun = 0
        self._max_tool_calls = max_tool_calls
        self._max_tokens = max_tokens
        self._budget_ends = None if budget_seconds is None else time.perf_counter() + budget_seconds

    @property
    def messages(self) -> list[Message]:
        """The conversation so far, prompt included."""
        return [node.message for node in self.nodes]

    @property
    def answer(self) -> str:
        """What the policy said last; empty before its first turn."""
        return next((node.message.content for node in reversed(self.nodes) if node.turn is not None), "")

    def append(self, *messages: Message) -> None:
        """Add messages of the environment to the conversation; at least one."""
        if not messages:
            raise ValueError("a reply without a message; return None from reply() to end the rollout")
        self.append_after(self._leaf, *messages)

    def append_after(self, parent: int | None, *messages: Message) -> int | None:
        """Add messages after node `parent`, or as a new root after None; the node that they end at."""
        for message in messages:
            if not isinstance(message, Message):
                raise TypeError(f"a reply must be messages, not {type(message).__name__}; use user(...) to make one")
            msgspec.msgpack.encode(message)  # what cannot be sent is refused where it comes from
            self._add(Node(message, parent))
            parent = self._leaf
        return parent

    async def turn(self) -> Turn:
        """Let the policy continue the conversation. When a budget is used up, the rollout ends here."""
        return await self._sample(self.nodes, self._leaf, self.tools, self._next_sampling())

    async def turn_after(
        self,
        parent: int,
        tools: Sequence[ToolSpec],
        *,
        stop: Sequence[str] = (),
        seed: int | None = None,
        agent: str = "",
    ) -> Turn:
        """Let the policy continue the branch that ends at node `parent`. Several turns may be under way at once.

        stop: stop strings besides those of the rollout. seed: in place of one derived from the turn's number, which
        depends on the order of turns that are under way at once. A budget of tokens counts finished turns.
        agent: as whom the policy speaks.
        """
        sampling = self._next_sampling()
        sampling = msgspec.structs.replace(
            sampling, stop=(*sampling.stop, *stop), seed=sampling.seed if seed is None else seed
        )
        return await self._sample(self.branch(parent), parent, tools, sampling, agent)

    async def turn_of(
        self, parent: int, tools: Sequence[ToolSpec], sampler: Sampler, sampling: SamplingParameters, agent: str
    ) -> Turn:
        """Let another model than the policy continue a branch. No budget counts it, and it ends no rollout."""
        self._check_going_on()
        turn = await self._answer_of(sampler, self.branch(parent), tools, sampling, f"sample {agent}")
        self._add(Node(turn.message, parent, turn, agent))
        return turn

    def agent(self, name: str) -> "Seat":
        """One of the agents of a `MultiAgent` environment."""
        if name not in self.agents:
            raise ValueError(
                f"there is no agent {name!r} in this rollout; there are {', '.join(self.agents) or 'none'}"
            )
        return self.agents[name]

    def branch(self, leaf: int | None) -> list[Node]:
        """The nodes from a root to node `leaf`."""
        path: list[Node] = []
        while leaf is not None:
            path.append(self.nodes[leaf])
            leaf = self.nodes[leaf].parent
        return path[::-1]

    @property
    def seconds_left(self) -> float | None:
        """What is left of the budget of time; None without one."""
        return None if self._budget_ends is None else max(0.0, self._budget_ends - time.perf_counter())

    def stop(self, reason: StopReason) -> NoReturn:
        """End the rollout as truncated, from inside the environment's code, which lets what this raises pass."""
        self.stop_reason = reason
        raise Stopped

    async def _sample(
        self,
        branch: Sequence[Node],
        parent: int | None,
        tools: Sequence[ToolSpec],
        sampling: SamplingParameters,
        agent: str = "",
    ) -> Turn:
        self._num_begun += 1
        turn = await self._answer_of(self._sampler, branch, tools, sampling, "sample")
        self._add(Node(turn.message, parent, turn, agent))
        self.num_turns += 1
        if self._max_tokens is not None:
            self._max_tokens -= turn.num_completion_tokens
        if turn.finish_reason is FinishReason.LENGTH:
            self.stop(StopReason.MAX_TOKENS)
        return turn

    async def _answer_of(
        self,
        sampler: Sampler,
        branch: Sequence[Node],
        tools: Sequence[ToolSpec],
        sampling: SamplingParameters,
        where: str,
    ) -> Turn:
        started = time.perf_counter()
        try:
            with failures_as(FailureClass.MODEL, where):
                turn = await sampler.sample(branch, tools, sampling)
                if turn.finish_reason is FinishReason.CANCELLED:
                    raise RolloutFailure(FailureClass.CANCELLED, where, "the engine gave up the request")
        except RolloutFailure as error:
            self.failure = error.failure
            raise
        finally:
            self.generate_seconds += time.perf_counter() - started
        await take_turn()
        return turn

    def count_tool_calls(self, count: int) -> None:
        """Take calls that are about to be executed from their budget; where it does not suffice, the rollout ends."""
        if self._max_tool_calls is not None and self.num_tool_calls + count > self._max_tool_calls:
            self.stop(StopReason.MAX_TOOL_CALLS)
        self.num_tool_calls += count

    def derive_seed(self, purpose: str, *identity: str | int) -> int:
        """A seed for a random choice of the environment: of this run, task and attempt, and of nothing else."""
        return derive_seed(self._seed, purpose, self.task.key, self.attempt, *identity)

    @property
    def _leaf(self) -> int | None:
        return len(self.nodes) - 1 if self.nodes else None

    def _add(self, node: Node) -> None:
        self.nodes.append(node)

    def _next_sampling(self) -> SamplingParameters:
        """The parameters of the next turn, if the budgets leave one; the first budget found used up stays the reason."""
        self._check_going_on()
        if self._max_turns is not None and self._num_begun >= self._max_turns:
            self.stop(StopReason.MAX_TURNS)
        if self._max_tokens is not None and self._max_tokens <= 0:
            self.stop(StopReason.MAX_TOKENS)
        if self._budget_ends is not None and time.perf_counter() >= self._budget_ends:
            self.stop(StopReason.TIMEOUT)
        budgets = [tokens for tokens in (self._sampling.max_tokens, self._max_tokens) if tokens is not None]
        return msgspec.structs.replace(
            self._sampling,
            seed=self.derive_seed("sampling", self._num_begun),
            max_tokens=min(budgets, default=None),
        )

    def _check_going_on(self) -> None:
        """Nobody speaks in a rollout that is over."""
        if self.failure is not None:
            raise RolloutFailure(self.failure.kind, self.failure.where, self.failure.message)
        if self.stop_reason is not None:
            raise Stopped


@dataclass(frozen=True, slots=True)
class Underway:
    """A rollout under way and where it belongs; `underway` is the one in whose context the current code runs."""

    environment: str
    group: str
    rollout: Rollout


underway: ContextVar[Underway | None] = ContextVar("underway", default=None)


class Elsewhere(Protocol):
    """Where the rollouts of an environment run that is installed in another Python."""

    async def attempt(
        self,
        task: Task,
        attempts: Sequence[int],
        sampler: Sampler,
        sampling: SamplingParameters,
        seed: int,
        limits: Limits,
        group: str,
        as_group: bool,
    ) -> list[Trace]:
        """As `run_group`, or as `run_rollout` of the one attempt."""
        ...


class Stopped(Exception):
    """Ends a rollout from inside `turn`, `count_tool_calls` or `stop`; environment code lets it pass."""


async def run_rollout(
    environment: "Environment",
    task: Task,
    attempt: int,
    sampler: Sampler,
    sampling: SamplingParameters,
    seed: int,
    limits: Limits = Limits(),
    *,
    group: str = "",
    is_alone: bool = True,
) -> Trace:
    """Attempt `task` once. Never raises for what happens in there: the trace has either rewards or a failure.

    The sampling seed of a turn is derived from (seed, "sampling", task.key, attempt, turn). Only a cancellation of the
    calling task passes, after the environment's teardown. is_alone: the rollout is its whole group; if not, its trace
    lacks the group's rewards, which `Rubric.score_group` adds.
    """
    if environment.elsewhere is not None:
        traces = await environment.elsewhere.attempt(task, [attempt], sampler, sampling, seed, limits, group, False)
        return traces[0]
    await take_turn()
    started_at, stopwatch = time.time(), _Stopwatch()
    rollout = Rollout(
        task,
        attempt,
        sampler,
        sampling,
        seed,
        max_turns=_lower(environment.max_turns, limits.max_turns),
        max_tool_calls=_lower(environment.max_tool_calls, limits.max_tool_calls),
        max_tokens=limits.max_tokens,
        budget_seconds=limits.budget_seconds,
        tools=environment.tools,
    )
    failure: Failure | None = None
    scores = NO_SCORES
    before = underway.set(Underway(environment.name, group, rollout))
    try:
        async with asyncio.timeout(limits.deadline_seconds):
            with failures_as(FailureClass.ENVIRONMENT, "setup"):
                await environment.setup(rollout)
            stopwatch.enter("run")
            await _drive(environment, rollout)
            stopwatch.enter("score")
            scores = await environment.rubric.score(
                _record(environment, rollout, group, metrics=rollout.metrics), rollout.state
            )
        failure = rollout.failure  # of code that caught what interrupted it
    except RolloutFailure as error:
        failure = rollout.failure or error.failure
    except TimeoutError:
        late = f"the rollout took longer than {limits.deadline_seconds:g} s"
        failure = rollout.failure or Failure(FailureClass.TIMEOUT, stopwatch.phase, late)
    finally:
        stopwatch.enter("teardown")
        if environment.has_teardown:
            await _teardown(environment, rollout, limits.teardown_seconds)
        underway.reset(before)
    if scores.failed_metrics:
        rollout.info["failed_metrics"] = scores.failed_metrics
    if rollout.info or rollout.metrics:
        failure = _without_unsendable(rollout) or failure
    trace = _record(
        environment,
        rollout,
        group,
        rewards=scores.rewards if failure is None else {},
        agent_rewards=scores.agent_rewards if failure is None else {},
        metrics=rollout.metrics | scores.metrics if failure is None else {},
        failure=failure,
        timing=stopwatch.timing(started_at, rollout),
    )
    if is_alone and environment.scores_groups:
        [trace] = await environment.rubric.score_group([trace])
    return trace


async def run_group(
    environment: "Environment",
    task: Task,
    attempts: Sequence[int],
    sampler: Sampler,
    sampling: SamplingParameters,
    seed: int,
    limits: Limits = Limits(),
    *,
    group: str = "",
) -> list[Trace]:
    """Attempt `task` once for each of `attempts`, at the same time; the traces come in the order of `attempts`."""
    if environment.elsewhere is not None:
        return await environment.elsewhere.attempt(task, attempts, sampler, sampling, seed, limits, group, True)
    async with asyncio.TaskGroup() as tasks:
        running = [
            tasks.create_task(
                run_rollout(environment, task, attempt, sampler, sampling, seed, limits, group=group, is_alone=False)
            )
            for attempt in attempts
        ]
    return await environment.rubric.score_group([rollout.result() for rollout in running])


async def _drive(environment: "Environment", rollout: Rollout) -> None:
    with failures_as(FailureClass.ENVIRONMENT, "run"):
        try:
            await environment.run(rollout)
        except Stopped:
            return
    if rollout.failure is not None:  # environment code caught what `turn` raised
        raise RolloutFailure(rollout.failure.kind, rollout.failure.where, rollout.failure.message)
    if rollout.stop_reason is None:
        rollout.stop_reason = StopReason.COMPLETED


async def _teardown(environment: "Environment", rollout: Rollout, seconds: float) -> None:
    """Trouble in here costs no reward that was earned before; the trace remembers it."""
    try:
        async with asyncio.timeout(seconds):
            with failures_as(FailureClass.ENVIRONMENT, "teardown"):
                await environment.teardown(rollout)
    except RolloutFailure as error:
        rollout.info["teardown_failure"] = error.failure.message
    except TimeoutError:
        rollout.info["teardown_failure"] = f"took longer than {seconds:g} s"


def _without_unsendable(rollout: Rollout) -> Failure | None:
    try:
        msgspec.msgpack.encode(rollout.info)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        rollout.info = {}
        return Failure(FailureClass.ENVIRONMENT, "info", f"rollout.info cannot be written down: {error}")
    try:
        rollout.metrics = msgspec.convert(rollout.metrics, dict[str, float])
    except msgspec.ValidationError as error:
        rollout.metrics = {}
        return Failure(FailureClass.ENVIRONMENT, "metrics", f"rollout.metrics are not all numbers: {error}")
    return None


def _record(
    environment: "Environment",
    rollout: Rollout,
    group: str,
    *,
    rewards: dict[str, Reward] | None = None,
    agent_rewards: Mapping[str, dict[str, Reward]] = MappingProxyType({}),
    metrics: dict[str, float] | None = None,
    failure: Failure | None = None,
    timing: Timing = Timing(),
) -> Trace:
    return Trace(
        environment=environment.name,
        task=rollout.task,
        attempt=rollout.attempt,
        environment_version=environment.version,
        group=group,
        nodes=rollout.nodes,
        rewards=rewards or {},
        metrics=metrics or {},
        stop_reason=None if failure is not None else rollout.stop_reason,
        failure=failure,
        timing=timing,
        info=rollout.info,
        agents={name: seat.record(agent_rewards.get(name, {})) for name, seat in rollout.agents.items()},
    )


def _lower(first: int | None, second: int | None) -> int | None:
    return first if second is None else second if first is None else min(first, second)


class _Stopwatch:
    """Seconds of each phase of a rollout: setup, run, score, teardown."""

    __slots__ = ("_entered", "_seconds", "_started", "phase")

    def __init__(self) -> None:
        self.phase = "setup"
        self._seconds = {"setup": 0.0, "run": 0.0, "score": 0.0}
        self._started = self._entered = time.perf_counter()

    def enter(self, phase: str) -> None:
        now = time.perf_counter()
        self._seconds[self.phase] = now - self._entered
        self.phase, self._entered = phase, now

    def timing(self, started_at: float, rollout: Rollout) -> Timing:
        return Timing(
            started_at=started_at,
            total_seconds=time.perf_counter() - self._started,
            setup_seconds=self._seconds["setup"],
            generate_seconds=rollout.generate_seconds,
            environment_seconds=max(0.0, self._seconds["run"] - rollout.generate_seconds),
            score_seconds=self._seconds["score"],
            sandbox_seconds=rollout.sandbox_seconds,
        )
