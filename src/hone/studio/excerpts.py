"""The first and the last traces of a run, shortened to what a page can show."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

from hone.schema.messages import Message
from hone.schema.traces import AgentRecord, Node, Reward, Trace

MAX_CHARACTERS = 4000
"""Characters of one message that are shown."""


@dataclass(frozen=True, slots=True)
class MessageView:
    """One message as shown."""

    role: str
    content: str
    reasoning: str
    detail: str


@dataclass(frozen=True, slots=True)
class TraceView:
    """One trace as shown."""

    title: str
    reward: str
    failure: str
    versions: str
    facts: str
    messages: tuple[MessageView, ...]


def first_and_last(traces: Iterable[Trace], count: int) -> tuple[list[Trace], list[Trace]]:
    """The first `count` traces, and the last `count` of the others."""
    rest = iter(traces)
    first = list(islice(rest, count))
    return first, list(deque(rest, maxlen=count))


def view(trace: Trace, max_characters: int = MAX_CHARACTERS) -> TraceView:
    """A trace as it is shown, with at most so many characters of each message."""
    failure = trace.failure
    return TraceView(
        title=f"{trace.environment} · {_one_line(trace)}",
        reward="" if failure is not None else f"{trace.reward:.3g}",
        failure="" if failure is None else f"{failure.kind}: {failure.where}: {failure.message}",
        versions=_versions(trace),
        facts=_facts(trace),
        messages=tuple(_message(node, max_characters) for node in trace.nodes)
        or tuple(_plain(message, max_characters) for message in trace.task.prompt),
    )


def _one_line(trace: Trace) -> str:
    """What was asked last before the policy's first turn, and what it said last."""
    asked = trace.task.prompt[-1].content if trace.task.prompt else ""
    said = next((node.message.content for node in reversed(trace.nodes) if node.turn is not None), "")
    return f"{_clipped(asked)} → {_clipped(said)}" if said else _clipped(asked)


def _clipped(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 70 else line[:69] + "…"


def _versions(trace: Trace) -> str:
    versions = [run.version for turn in trace.turns for run in turn.versions]
    if not versions:
        return ""
    return str(versions[0]) if min(versions) == max(versions) else f"{min(versions)}-{max(versions)}"


def _facts(trace: Trace) -> str:
    rewards = [_reward(name, reward) for name, reward in trace.rewards.items()]
    agents = [_agent(name, agent) for name, agent in trace.agents.items()]
    metrics = [f"{name} {value:.3g}" for name, value in trace.metrics.items()]
    facts = [
        f"task {trace.task.key}, attempt {trace.attempt}",
        f"rewards: {', '.join(rewards)}" if rewards else "",
        *agents,
        f"metrics: {', '.join(metrics)}" if metrics else "",
        f"reference: {_short(trace.task.reference)}" if trace.task.reference is not None else "",
        f"stopped: {trace.stop_reason}" if trace.stop_reason else "",
        f"{trace.num_completion_tokens} sampled tokens in {trace.timing.total_seconds:.3g} s",
    ]
    return " · ".join(fact for fact in facts if fact)


def _reward(name: str, reward: Reward) -> str:
    return f"{name} {reward.value:.3g} × {reward.weight:.3g}"


def _agent(name: str, agent: AgentRecord) -> str:
    """What one of several agents earned by itself."""
    own = ", ".join(_reward(*one) for one in agent.rewards.items()) or "no rewards of its own"
    return f"agent {name}{'' if agent.trains else ' (does not train)'}: {own}"


def _message(node: Node, max_characters: int) -> MessageView:
    turn = node.turn
    detail = "" if turn is None else f"{turn.num_completion_tokens} tokens, {turn.finish_reason}"
    if node.agent:
        detail = f"{node.agent}: {detail}"
    return _plain(node.message, max_characters, detail)


def _plain(message: Message, max_characters: int, detail: str = "") -> MessageView:
    calls = "".join(f"\n→ {call.name}({call.arguments})" for call in message.tool_calls)
    content, reasoning = message.content + calls, message.reasoning or ""
    return MessageView(message.role, _short(content, max_characters), _short(reasoning, max_characters), detail)


def _short(text: str, max_characters: int = MAX_CHARACTERS) -> str:
    left_out = len(text) - max_characters
    return text if left_out <= 0 else f"{text[:max_characters]}… ({left_out} more characters)"
