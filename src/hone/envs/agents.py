"""Several agents in one rollout: self-play, a proposer and a solver, a user that a second model simulates.

Each agent has a conversation of its own, a branch of the trace's graph. All of them are played by the policy, and
their turns train it, unless an agent is declared otherwise. What one agent says reaches another when the
environment's code tells it.
"""

import asyncio
import contextlib
import os
from abc import abstractmethod
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, field
from typing import Protocol, Unpack
from weakref import WeakKeyDictionary

import msgspec

from hone.envs.environment import Environment, EnvironmentArguments
from hone.envs.rollout import Rollout
from hone.envs.sampler import Sampler
from hone.schema.messages import Message, ToolSpec
from hone.schema.sampling import SamplingParameters, Turn
from hone.schema.traces import AgentRecord, Node, Reward


class Model(Protocol):
    """Another model than the policy, opened by the rollouts that use it."""

    def open(self) -> AbstractAsyncContextManager[Sampler]:
        """The sampler, within a rollout."""


@dataclass(frozen=True, slots=True)
class Agent:
    """What an environment declares of one agent.

    trains: whether its turns train the policy that plays it; off for the frozen side of a game. model: another model
    that plays it, which never trains. sampling: of that model. tools: what it is told that it can call.
    """

    name: str
    trains: bool = True
    model: Model | None = None
    sampling: SamplingParameters = field(default_factory=SamplingParameters)
    tools: Sequence[ToolSpec] = ()

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("an agent needs a name")
        if self.model is None and self.sampling != SamplingParameters():
            raise ValueError(
                f"agent {self.name!r} is played by the policy, whose sampling the run decides; remove sampling"
            )

    @property
    def learns(self) -> bool:
        """Whether what it says can be trained on."""
        return self.trains and self.model is None


class Seat:
    """An agent in one rollout: its conversation, which begins with the task's prompt unless `start` gives it another."""

    __slots__ = ("_agent", "_leaf", "_num_turns", "_rollout", "_sampler")

    def __init__(self, agent: Agent, rollout: Rollout, sampler: Sampler | None) -> None:
        self._agent = agent
        self._rollout = rollout
        self._sampler = sampler
        self._leaf: int | None = len(rollout.task.prompt) - 1 if rollout.task.prompt else None
        self._num_turns = 0

    @property
    def messages(self) -> list[Message]:
        """The conversation as this agent sees it."""
        return [node.message for node in self._branch()]

    @property
    def answer(self) -> str:
        """What this agent said last in this conversation; empty before its first turn."""
        return next((node.message.content for node in reversed(self._branch()) if node.turn is not None), "")

    @property
    def num_turns(self) -> int:
        """Turns of this agent in all its conversations."""
        return self._num_turns

    def start(self, *messages: Message) -> None:
        """Begin a new conversation for this agent, without the task's prompt and without what was said before."""
        self._leaf = None
        self.append(*messages)

    def append(self, *messages: Message) -> None:
        """Tell this agent something; at least one message."""
        if not messages:
            raise ValueError(f"nothing was said to agent {self._agent.name!r}; give at least one message")
        self._leaf = self._rollout.append_after(self._leaf, *messages)

    async def turn(self) -> Turn:
        """Let this agent speak. Several agents may speak at once; a budget that is used up ends the rollout."""
        if self._leaf is None:
            raise ValueError(f"agent {self._agent.name!r} has no conversation to continue; call start(...) first")
        rollout, agent, number = self._rollout, self._agent, self._num_turns
        self._num_turns += 1
        # By agent and turn, not by the order in which agents speak at once.
        seed = rollout.derive_seed("sampling", agent.name, number)
        if self._sampler is None:
            turn = await rollout.turn_after(self._leaf, agent.tools, seed=seed, agent=agent.name)
        else:
            sampling = msgspec.structs.replace(agent.sampling, seed=seed)
            turn = await rollout.turn_of(self._leaf, agent.tools, self._sampler, sampling, agent.name)
        self._leaf = next(i for i in reversed(range(len(rollout.nodes))) if rollout.nodes[i].turn is turn)
        return turn

    def record(self, rewards: dict[str, Reward]) -> AgentRecord:
        """What the trace remembers of this agent."""
        return AgentRecord(self._agent.learns, rewards)

    def _branch(self) -> list[Node]:
        return self._rollout.branch(self._leaf)


class MultiAgent(Environment):
    """An environment in which several agents speak: `play` says who, to whom and when.

    Example::

        class Debate(MultiAgent):
            async def play(self, rollout):
                pro, con = rollout.agent("pro"), rollout.agent("con")
                for _ in range(2):
                    await pro.turn()
                    con.append(user(pro.answer))
                    await con.turn()
                    pro.append(user(con.answer))

    Rewards are common to all agents, or of the one that `@reward(agent=...)` names. An agent's advantage is relative to
    the same agent in the other rollouts of the group.
    """

    def __init__(self, *, agents: Iterable[Agent], **common: Unpack[EnvironmentArguments]) -> None:
        super().__init__(**common)
        given = list(agents)
        self.agents = {agent.name: agent for agent in given}
        if len(self.agents) < len(given):
            raise ValueError(f"environment {self.name!r}: two agents have the same name")
        if not any(agent.learns for agent in given):
            raise ValueError(f"environment {self.name!r}: no agent trains; declare one with trains=True and no model")
        unknown = sorted(self.rubric.agents - self.agents.keys())
        if unknown:
            raise ValueError(
                f"environment {self.name!r}: a reward is for agent {unknown[0]!r}; there are {', '.join(self.agents)}"
            )

    async def run(self, rollout: Rollout) -> None:
        """Seat the agents and let them play."""
        async with AsyncExitStack() as stack:
            for agent in self.agents.values():
                sampler = None if agent.model is None else await stack.enter_async_context(agent.model.open())
                rollout.agents[agent.name] = Seat(agent, rollout, sampler)
            await self.play(rollout)

    @abstractmethod
    async def play(self, rollout: Rollout) -> None:
        """The course of a rollout: `rollout.agent(name)` is a `Seat`. Returning means that it is complete."""


class Fixed:
    """A sampler that is there already, as the model of an agent."""

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[Sampler]:
        """The sampler as it is."""
        yield self._sampler


class ChatModel:
    """A model behind an OpenAI-compatible address, for example a simulated user; its connections last while it is used.

    base_url: with the version part, as in http://127.0.0.1:8000/v1. api_key_variable: environment variable with the key.
    deadline_seconds: for one turn.
    """

    def __init__(
        self, base_url: str, model: str, *, api_key_variable: str | None = None, deadline_seconds: float = 600.0
    ) -> None:
        self._base_url = base_url
        self._model = model
        self._api_key_variable = api_key_variable
        self._deadline_seconds = deadline_seconds
        self._opened: WeakKeyDictionary[asyncio.AbstractEventLoop, _Opened] = WeakKeyDictionary()

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[Sampler]:
        """A client, which the rollouts of an event loop share and the last one closes."""
        loop = asyncio.get_running_loop()
        opened = self._opened.get(loop)
        if opened is None:
            opened = self._opened[loop] = self._connect()
        opened.num_users += 1
        try:
            yield opened.sampler
        finally:
            opened.num_users -= 1
            if not opened.num_users:
                del self._opened[loop]
                await opened.closing.aclose()

    def _connect(self) -> "_Opened":
        from hone.inference.client import ChatSampler  # its dependencies are an extra that few environments need

        key = None
        if self._api_key_variable is not None:
            key = os.environ.get(self._api_key_variable)
            if key is None:
                raise ValueError(
                    f"environment variable {self._api_key_variable} is not set; it holds the key of {self._base_url}"
                )
        sampler = ChatSampler(self._base_url, self._model, key, deadline_seconds=self._deadline_seconds)
        closing = AsyncExitStack()
        closing.push_async_exit(sampler)
        return _Opened(sampler, closing)


@dataclass(slots=True)
class _Opened:
    sampler: Sampler
    closing: AsyncExitStack
    num_users: int = 0
