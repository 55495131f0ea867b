"""What a rollout calls for the next turn; engines, endpoints and test fakes provide it."""

from collections.abc import Sequence
from typing import Protocol

from hone.schema.messages import ToolSpec
from hone.schema.sampling import SamplingParameters, Turn
from hone.schema.traces import Node


class Sampler(Protocol):
    """The policy, seen from an environment."""

    async def sample(self, branch: Sequence[Node], tools: Sequence[ToolSpec], sampling: SamplingParameters) -> Turn:
        """Continue the conversation of `branch` (nodes from a root to a leaf) by one turn.

        Whatever it raises is a failure of class model. A context that is full is no failure: answer a turn with
        finish reason length, which ends the rollout as truncated.
        """
        ...
