"""Which requests compute which tokens in the next engine step: continuous batching, chunked prefill, preemption.

First come, first served: requests are admitted in the order of their arrival and nobody overtakes. An admitted request
owns the KV blocks of all tokens that it has; while it decodes it takes one more block whenever the last is full. Where
none is left, the latest arrival gives up its blocks and computes them again later, its sampled tokens included.
"""

from collections import OrderedDict
from dataclasses import dataclass

from hone.inference.engine.kv_cache import KvCache
from hone.inference.engine.request import Request


class RequestTooLong(ValueError):
    """A prompt that leaves no room for a completion in the context or in the KV cache."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Prefill of token_ids[start:end]; a request samples when its last chunk is computed."""

    request: Request
    start: int
    end: int
    is_last: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """One engine step. `decodes` is the same object as in the last plan when nobody came or went.

    admitted: requests that run from this step on, with the blocks of all their tokens; grown: decoding requests that
    got another block in this step.
    """

    decodes: list[Request]
    chunks: list[Chunk]
    admitted: list[Request]
    grown: list[Request]

    @property
    def num_tokens(self) -> int:
        return len(self.decodes) + sum(chunk.end - chunk.start for chunk in self.chunks)


class Scheduler:
    """Decides, step by step, who runs. The caller computes the plan, appends the sampled tokens and commits."""

    def __init__(self, cache: KvCache, *, max_running: int, max_batch_tokens: int, max_context: int) -> None:
        if max_running > max_batch_tokens:
            raise ValueError(
                f"engine.max_running {max_running} is more than engine.max_batch_tokens {max_batch_tokens}: a step could"
                " not decode all running requests; lower the first or raise the second"
            )
        self.cache = cache
        self.max_context = max_context
        self.num_preemptions = 0
        self._max_batch_tokens = max_batch_tokens
        self._waiting: OrderedDict[str, Request] = OrderedDict()
        self._running: dict[str, Request] = {}
        self._decoding: list[Request] = []
        self._prefilling: list[Request] = []
        self._free_rows = list(range(max_running - 1, -1, -1))
        self._num_arrived = 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def has_work(self) -> bool:
        return bool(self._running or self._waiting)

    @property
    def requests(self) -> list[Request]:
        """All unfinished requests, the running ones first."""
        return [*self._running.values(), *self._waiting.values()]

    def find(self, request_id: str) -> Request | None:
        """The unfinished request of this name."""
        return self._running.get(request_id) or self._waiting.get(request_id)

    def add(self, request: Request) -> None:
        """Queue a request; one that could never finish is refused with `RequestTooLong`.

        Its max_length is lowered to what context and cache can hold.
        """
        if self.find(request.request_id) is not None:
            raise ValueError(f"request {request.request_id!r} is already being served; request ids must be unique")
        if not request.token_ids:
            raise ValueError("the prompt is empty; give at least one token")
        longest = min(self.max_context, self.cache.num_blocks * self.cache.block_size)
        if request.num_prompt >= longest:
            raise RequestTooLong(
                f"the prompt has {request.num_prompt} tokens, but prompt and completion together have room for {longest}"
                f" ({self._limit()}); shorten the prompt"
            )
        request.max_length = min(request.max_length, longest)
        request.arrival = self._num_arrived
        self._num_arrived += 1
        self._waiting[request.request_id] = request

    def cancel(self, request_id: str) -> Request | None:
        """Forget a request and free what it has; None when it is not (or no longer) known."""
        request = self._waiting.pop(request_id, None)
        if request is None:
            request = self._running.get(request_id)
            if request is not None:
                self._leave(request)
        return request

    def schedule(self) -> Plan:
        """The next step: every decoding request, then prefill in the order of arrival as far as the budget goes."""
        grown = self._grow_decoding()
        for request in self._decoding:
            request.num_computed += 1
        budget = self._max_batch_tokens - len(self._decoding)
        chunks = []
        for request in self._prefilling:
            if budget > 0:
                chunks.append(self._chunk(request, budget))
                budget -= chunks[-1].end - chunks[-1].start
        admitted = []
        while budget > 0 and self._waiting and self._free_rows:
            request = next(iter(self._waiting.values()))
            if not self._admit(request):
                break
            admitted.append(request)
            chunks.append(self._chunk(request, budget))
            budget -= chunks[-1].end - chunks[-1].start
        return Plan(self._decoding, chunks, admitted, grown)

    def commit(self, plan: Plan, finished: list[Request]) -> None:
        """The step is computed and the sampled tokens are appended: finished prefills decode from now on."""
        ready = [chunk.request for chunk in plan.chunks if chunk.is_last]
        if ready:
            # Chunks are planned in the order of _prefilling, and only the last may be incomplete.
            self._prefilling = self._prefilling[len(ready) :]
            self._decoding = [*self._decoding, *ready]
        for request in finished:
            self._release(request)
        if finished:
            self._decoding = [request for request in self._decoding if request.row >= 0]

    def start_version(self) -> None:
        """The weights changed: running requests keep the keys and values they have, new ones reuse none of them."""
        self.cache.start_version()

    def _limit(self) -> str:
        cache_tokens = self.cache.num_blocks * self.cache.block_size
        if self.max_context <= cache_tokens:
            return f"a context of {self.max_context}"
        return f"a KV cache of {self.cache.num_blocks} blocks of {self.cache.block_size}"

    def _grow_decoding(self) -> list[Request]:
        full = [request for request in self._decoding if request.num_computed == request.capacity]
        grown = []
        for request in full:
            if request.row >= 0 and self._make_room(request):
                self._publish(request)
                request.blocks += self.cache.allocate(1)
                request.capacity += self.cache.block_size
                grown.append(request)
        return [request for request in grown if request.row >= 0]

    def _make_room(self, request: Request) -> bool:
        """Preempt the latest arrivals until a block is available; False when `request` itself had to go."""
        while not self.cache.num_available:
            victim = max(self._running.values(), key=_arrival)
            self._preempt(victim)
            if victim is request:
                return False
        return True

    def _preempt(self, request: Request) -> None:
        self.num_preemptions += 1
        self._leave(request)
        request.num_computed = 0
        self._waiting[request.request_id] = request
        self._waiting.move_to_end(request.request_id, last=False)

    def _admit(self, request: Request) -> bool:
        """Give the request a row and the blocks of all its tokens, if they are there.

        One block for each running request stays in reserve, so that an admission does not preempt at once.
        """
        if self._running and self.cache.num_available <= len(self._running):
            return False
        prefix = self.cache.find(request.token_ids)
        num_blocks = -(-len(request.token_ids) // self.cache.block_size)
        num_new = num_blocks - len(prefix.blocks)
        needed = num_new + self.cache.num_unreferenced(prefix.blocks)
        if needed + len(self._running) > self.cache.num_available and self._running:
            return False
        del self._waiting[request.request_id]
        self.cache.share(prefix.blocks)
        request.blocks = prefix.blocks + self.cache.allocate(num_new)
        request.capacity = num_blocks * self.cache.block_size
        request.num_computed = len(prefix.blocks) * self.cache.block_size
        request.num_published = len(prefix.blocks)
        request.node = prefix.node
        request.row = self._free_rows.pop()
        if request.num_cached < 0:
            request.num_cached = request.num_computed
        self._running[request.request_id] = request
        self._prefilling.append(request)
        return True

    def _chunk(self, request: Request, budget: int) -> Chunk:
        # Blocks are published when their computation is planned: a layer writes the keys and values of the whole step
        # before it attends, so a request admitted into the same step can already share them.
        start = request.num_computed
        request.num_computed = min(len(request.token_ids), start + budget)
        self._publish(request)
        return Chunk(request, start, request.num_computed, request.num_computed == len(request.token_ids))

    def _publish(self, request: Request) -> None:
        """Offer the blocks that are full by now; a chain begun under older weights is not continued."""
        size = self.cache.block_size
        for index in range(request.num_published, request.num_computed // size):
            token_ids = request.token_ids[index * size : (index + 1) * size]
            request.node = self.cache.publish(request.node, token_ids, request.blocks[index])
        request.num_published = request.num_computed // size

    def _leave(self, request: Request) -> None:
        self._release(request)
        self._decoding = [other for other in self._decoding if other is not request]
        self._prefilling = [other for other in self._prefilling if other is not request]

    def _release(self, request: Request) -> None:
        self._publish(request)
        self.cache.release(request.blocks)
        request.blocks = []
        request.capacity = 0
        self._free_rows.append(request.row)
        request.row = -1
        del self._running[request.request_id]


def _arrival(request: Request) -> int:
    return request.arrival
