"""Stand-ins shared by tests: a sampler that plays a script."""

import asyncio
from collections.abc import Callable, Sequence

from hone.schema.messages import Message, ToolSpec
from hone.schema.sampling import FinishReason, SamplingParameters, Turn, VersionRun
from hone.schema.traces import Node

Line = str | Turn | Exception
Script = Sequence[Line] | Callable[[Sequence[Node]], Line]


class ScriptedSampler:
    """Gives the lines of a script in order (the last one again and again), or what a function of the branch says.

    A text becomes a turn with one token per character (its code point), logprob -0.5, sampled by `version`; a text
    longer than max_tokens is cut. An exception is raised. `calls` remembers the messages and sampling of each turn.
    """

    def __init__(self, script: Script, *, seconds: float = 0.0, version: int = 0) -> None:
        self.script = script
        self.seconds = seconds
        self.version = version
        self.calls: list[tuple[list[Message], SamplingParameters]] = []
        self.num_waiting = 0
        self.max_waiting = 0

    async def sample(self, branch: Sequence[Node], tools: Sequence[ToolSpec], sampling: SamplingParameters) -> Turn:
        self.calls.append(([node.message for node in branch], sampling))
        line = self.script(branch) if callable(self.script) else self._next_line()
        self.num_waiting += 1
        self.max_waiting = max(self.max_waiting, self.num_waiting)
        try:
            await asyncio.sleep(self.seconds)
        finally:
            self.num_waiting -= 1
        if isinstance(line, Exception):
            raise line
        return line if isinstance(line, Turn) else self._turn(branch, line, sampling)

    def _next_line(self) -> Line:
        assert not callable(self.script)
        return self.script[min(len(self.calls), len(self.script)) - 1]

    def _turn(self, branch: Sequence[Node], text: str, sampling: SamplingParameters) -> Turn:
        new = [node for node in branch if node.turn is None]
        context = [ord(c) for node in new[-1:] for c in node.message.content]
        cut = text[: sampling.max_tokens]
        token_ids = [ord(c) for c in cut]
        return Turn(
            message=Message("assistant", cut),
            finish_reason=FinishReason.STOP if cut == text else FinishReason.LENGTH,
            context_token_ids=context,
            token_ids=token_ids,
            logprobs=[-0.5] * len(token_ids),
            versions=[VersionRun(self.version, len(token_ids))] if token_ids else [],
            num_prompt_tokens=sum(len(node.message.content) for node in branch),
            num_completion_tokens=len(token_ids),
        )
