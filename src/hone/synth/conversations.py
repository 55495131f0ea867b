"""Scored traces as conversations to train on, and back on disk as JSONL and parquet."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec

from hone.schema.messages import Message, ToolSpec
from hone.schema.traces import Node, Trace


@dataclass(frozen=True, slots=True)
class Conversation:
    """One conversation, and where it comes from. It ends with what the teacher said.

    num_prompt_messages: so many messages at the beginning are the task's. agent: of several, the one that spoke last.
    """

    environment: str
    task: str
    attempt: int
    reward: float
    is_truncated: bool
    num_tokens: int
    messages: tuple[Message, ...]
    tools: tuple[ToolSpec, ...]
    num_prompt_messages: int
    agent: str = ""

    @property
    def written(self) -> str:
        """What the teacher wrote: reasoning, text, tool calls."""
        parts: list[str] = []
        for message in self.answers:
            parts += [message.reasoning or "", message.content]
            parts += [f"{call.name}({call.arguments})" for call in message.tool_calls]
        return "\n".join(part for part in parts if part)

    @property
    def prose(self) -> str:
        """What the teacher wrote in words, tool calls aside."""
        return "\n".join(text for message in self.answers for text in (message.reasoning, message.content) if text)

    @property
    def answers(self) -> list[Message]:
        """The messages after the prompt that are the teacher's."""
        return [message for message in self.messages[self.num_prompt_messages :] if message.role == "assistant"]

    @property
    def prompts(self) -> list[str]:
        """What the user says in the prompt."""
        return [message.content for message in self.messages[: self.num_prompt_messages] if message.role == "user"]

    @property
    def text(self) -> str:
        """All that is said, the system message aside."""
        return "\n".join([*(m.content for m in self.messages if m.role in ("user", "tool")), self.written])

    @property
    def identity(self) -> str:
        """Equal for conversations that say the same; the ids of tool calls, which are drawn, do not count."""
        said = [
            [m.role, m.content, m.reasoning, [[call.name, call.arguments] for call in m.tool_calls]]
            for m in self.messages
        ]
        return hashlib.blake2b(msgspec.json.encode(said), digest_size=16).hexdigest()

    def row(self, teacher: str) -> dict[str, Any]:
        """As it is written: messages and tools in the shape of the OpenAI API, and where they come from."""
        return {
            "messages": [message_row(message) for message in self.messages],
            "tools": [{"type": "function", "function": msgspec.to_builtins(tool)} for tool in self.tools],
            "environment": self.environment,
            "task": self.task,
            "attempt": self.attempt,
            "reward": self.reward,
            "teacher": teacher,
        }


def conversations_of(
    trace: Trace, tools: Sequence[ToolSpec], agent_tools: Mapping[str, Sequence[ToolSpec]] = MappingProxyType({})
) -> list[Conversation]:
    """One conversation for each branch of a trace that has no failure, up to the last thing that the policy said.

    With several agents, a branch is kept if only agents speak in it that train, with the reward of the one that speaks
    last. tools: those of the environment; the trace says so itself where the rollout had others. agent_tools: those of
    agents, by name.
    """
    earned = trace.agent_rewards
    branches = [_until_last_turn(branch) for branch in trace.branches()]
    return [
        Conversation(
            environment=trace.environment,
            task=trace.task.key,
            attempt=trace.attempt,
            reward=earned[branch[-1].agent] if trace.agents else trace.reward,
            is_truncated=trace.is_truncated,
            num_tokens=sum(node.turn.num_completion_tokens for node in branch if node.turn is not None),
            messages=tuple(node.message for node in branch),
            tools=_shown_tools(trace, branch[0], agent_tools.get(branch[-1].agent, tools)),
            num_prompt_messages=next(index for index, node in enumerate(branch) if node.turn is not None),
            agent=branch[-1].agent,
        )
        for branch in branches
        if branch and (not trace.agents or all(node.turn is None or node.agent in earned for node in branch))
    ]


def _shown_tools(trace: Trace, root: Node, tools: Sequence[ToolSpec]) -> tuple[ToolSpec, ...]:
    """What the policy could call: an agent program shows tools of its own, and toolsets are made for each rollout."""
    if "harness" in trace.info:
        (index,) = (str(index) for index, node in enumerate(trace.nodes) if node is root)
        shown = trace.info["harness"].get("tools_of_roots", {}).get(index, [])
        return tuple(msgspec.convert(shown, list[ToolSpec]))
    return tuple(msgspec.convert(trace.info["tools"], list[ToolSpec])) if "tools" in trace.info else tuple(tools)


def message_row(message: Message) -> dict[str, Any]:
    """A message in the shape of the OpenAI API, with `reasoning_content` where there is reasoning."""
    row: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning is not None:
        row["reasoning_content"] = message.reasoning
    if message.tool_calls:
        row["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        row["tool_call_id"] = message.tool_call_id
    if message.name is not None:
        row["name"] = message.name
    return row


def write_jsonl(rows: Iterable[dict[str, Any]], path: Path) -> None:
    """One row a line; rows without tools have no such field. The file is whole, or not there."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        for row in rows:
            kept = {name: value for name, value in row.items() if value != []}
            file.write(json.dumps(kept, ensure_ascii=False) + "\n")
    temporary.replace(path)


def write_parquet(rows: Iterable[dict[str, Any]], path: Path) -> None:
    """A row each; `tools` is JSON text, because the schemas of their arguments have no common type."""
    import pyarrow  # of an extra, and heavy
    from pyarrow import parquet

    text = pyarrow.string()
    function = pyarrow.struct([("name", text), ("arguments", text)])
    call = pyarrow.struct([("id", text), ("type", text), ("function", function)])
    message = pyarrow.struct(
        [
            ("role", text),
            ("content", text),
            ("reasoning_content", text),
            ("tool_calls", pyarrow.list_(call)),
            ("tool_call_id", text),
            ("name", text),
        ]
    )
    schema = pyarrow.schema(
        [
            ("messages", pyarrow.list_(message)),
            ("tools", text),
            ("environment", text),
            ("task", text),
            ("attempt", pyarrow.int64()),
            ("reward", pyarrow.float64()),
            ("teacher", text),
        ]
    )
    plain = [row | {"tools": json.dumps(row["tools"], ensure_ascii=False) if row["tools"] else None} for row in rows]
    temporary = path.with_name(path.name + ".tmp")
    parquet.write_table(pyarrow.Table.from_pylist(plain, schema=schema), temporary)
    temporary.replace(path)


def _until_last_turn(branch: Sequence[Node]) -> list[Node]:
    """What follows the policy's last words teaches nothing; a branch in which it says nothing is empty."""
    last = max((index for index, node in enumerate(branch) if node.turn is not None), default=-1)
    return list(branch[: last + 1])
