"""One rollout's side of the proxy: each call of the program becomes a turn of the rollout, until a budget ends it."""

import asyncio
import contextvars
import hashlib
import hmac
import secrets
from collections import Counter
from collections.abc import Sequence

import msgspec

from hone.envs.failures import RolloutFailure
from hone.envs.harness.dialect import Call, Refusal, Trouble
from hone.envs.harness.matching import NodeGraph
from hone.envs.rollout import Rollout, Stopped
from hone.schema.messages import Message
from hone.schema.sampling import Turn

CHARACTERS_PER_TOKEN = 4
TOKENS_PER_MESSAGE = 4
"""For estimates of what was never tokenised: the text of a message, and what a template writes around it."""


class Recorder:
    """Answers the calls of one program, until it is closed.

    ended: set when a turn was refused because the rollout has ended.
    """

    def __init__(self, rollout: Rollout) -> None:
        self.identity = secrets.token_hex(8)
        self._secret = secrets.token_urlsafe(24)
        self.ended = asyncio.Event()
        self.num_calls = 0
        self.not_enforced: set[str] = set()
        self.graph = NodeGraph(rollout.nodes)
        self._rollout = rollout
        self._repeats: Counter[str] = Counter()
        self._context = contextvars.copy_context()  # of the rollout, not of the server
        self._under_way: set[asyncio.Task[Turn]] = set()
        self._is_closed = False

    @property
    def api_key(self) -> str:
        """The secret that lets a program take turns of this rollout, and of no other."""
        return f"sk-{self.identity}-{self._secret}"

    def opens(self, secret: str) -> bool:
        """Whether this is the secret, compared in constant time."""
        return hmac.compare_digest(secret.encode(errors="surrogateescape"), self._secret.encode())

    async def close(self) -> None:
        """Give up the turns under way; none is added to the rollout after this."""
        self._is_closed = True
        for turn in self._under_way:
            turn.cancel()
        await asyncio.gather(*self._under_way, return_exceptions=True)

    async def turn(self, call: Call) -> Turn:
        """The policy's answer, which is a node of the rollout. Raises a `Refusal` when the rollout has ended.

        Cancelling the awaiting task gives up the turn.
        """
        self.num_calls += 1
        self.not_enforced.update(call.not_enforced)
        turn = asyncio.create_task(self._sample(call), context=self._context)
        self._under_way.add(turn)
        turn.add_done_callback(self._under_way.discard)
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.cancelled() and self._is_closed:
                raise Refusal(Trouble.ENDED, "the rollout is over: no further turn is given") from None
            raise

    def estimated_tokens(self, call: Call) -> int:
        """About how long the prompt of this call is: what was counted on its branch, and the rest by characters."""
        place = self.graph.place(call.messages, call.tools)
        num_counted, uncounted = 0, []
        for node in self._rollout.branch(place.parent):
            if node.turn is None:
                uncounted.append(node.message)
            else:
                num_counted, uncounted = node.turn.num_prompt_tokens + node.turn.num_completion_tokens, []
        uncounted += place.new
        num_characters = sum(len(message.content) for message in uncounted)
        if call.tools and not num_counted:
            num_characters += len(msgspec.json.encode(call.tools))
        return num_counted + num_characters // CHARACTERS_PER_TOKEN + TOKENS_PER_MESSAGE * len(uncounted)

    async def _sample(self, call: Call) -> Turn:
        rollout = self._rollout
        if rollout.stop_reason is not None:  # what is asked for now is no part of the rollout
            raise self._ended()
        place = self.graph.place(call.messages, call.tools)
        self.graph.show(place.root, call.tools)
        parent = rollout.append_after(place.parent, *place.new)
        assert parent is not None, "a call has messages"
        try:
            turn = await rollout.turn_after(parent, call.tools, stop=call.stop, seed=self._seed(parent, call))
            rollout.count_tool_calls(len(turn.message.tool_calls))
        except Stopped:
            raise self._ended() from None
        except RolloutFailure as error:
            self.ended.set()
            raise Refusal(Trouble.FAILED, f"the rollout has failed: {error}") from error
        return turn

    def _ended(self) -> Refusal:
        self.ended.set()
        return Refusal(Trouble.ENDED, f"the rollout has ended ({self._rollout.stop_reason}): no further turn is given")

    def _seed(self, parent: int, call: Call) -> int:
        """Of what is asked, not of the order in which calls arrive: a program's parallel calls race."""
        messages: Sequence[Message] = [node.message for node in self._rollout.branch(parent)]
        asked = hashlib.blake2b(msgspec.json.encode([messages, call.tools, call.stop]), digest_size=16).hexdigest()
        self._repeats[asked] += 1
        return self._rollout.derive_seed("sampling", asked, self._repeats[asked])
