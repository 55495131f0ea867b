import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hone.inference.engine.kv_cache import KvCache
from hone.inference.engine.request import Request
from hone.inference.engine.scheduler import Plan, RequestTooLong, Scheduler


def make_scheduler(num_blocks=16, block_size=4, max_running=4, max_batch_tokens=16, max_context=64, prefix_cache=True):
    cache = KvCache(num_blocks, block_size, prefix_cache=prefix_cache)
    return Scheduler(cache, max_running=max_running, max_batch_tokens=max_batch_tokens, max_context=max_context)


def step(scheduler: Scheduler, token: int = 7) -> Plan:
    plan = scheduler.schedule()
    sampling = plan.decodes + [chunk.request for chunk in plan.chunks if chunk.is_last]
    for request in sampling:
        request.token_ids.append(token)
    scheduler.commit(plan, [request for request in sampling if len(request.token_ids) >= request.max_length])
    return plan


def test_a_prompt_is_prefilled_in_chunks_of_the_budget():
    scheduler = make_scheduler(max_batch_tokens=6)
    scheduler.add(Request("a", list(range(14)), 20))
    assert [(c.start, c.end, c.is_last) for _ in range(3) for c in step(scheduler).chunks] == [
        (0, 6, False),
        (6, 12, False),
        (12, 14, True),
    ]


def test_decodes_go_before_prefill_and_share_its_step():
    scheduler = make_scheduler(max_batch_tokens=6)
    first, second = Request("a", [1, 2], 10), Request("b", list(range(8)), 20)
    scheduler.add(first)
    step(scheduler)
    scheduler.add(second)
    plan = step(scheduler)
    assert plan.decodes == [first]
    assert [(c.request, c.start, c.end) for c in plan.chunks] == [(second, 0, 5)]


def test_the_list_of_decodes_stays_the_same_object_while_nobody_comes_or_goes():
    scheduler = make_scheduler()
    scheduler.add(Request("a", [1, 2], 10))
    step(scheduler)
    assert step(scheduler).decodes is step(scheduler).decodes


def test_a_prompt_that_fills_the_context_is_refused():
    with pytest.raises(RequestTooLong, match=r"64 tokens.*room for 64"):
        make_scheduler(num_blocks=99).add(Request("a", [1] * 64, 100))


def test_a_prompt_that_fills_the_cache_is_refused_and_the_cache_is_named():
    with pytest.raises(RequestTooLong, match="KV cache of 4 blocks of 4"):
        make_scheduler(num_blocks=4).add(Request("a", [1] * 16, 100))


def test_the_completion_is_bounded_by_the_context():
    scheduler = make_scheduler(max_context=8)
    request = Request("a", [1] * 6, 1000)
    scheduler.add(request)
    step(scheduler)
    step(scheduler)
    assert (request.max_length, scheduler.has_work) == (8, False)


def test_a_request_id_in_use_is_refused():
    scheduler = make_scheduler()
    scheduler.add(Request("a", [1], 4))
    with pytest.raises(ValueError, match="already being served"):
        scheduler.add(Request("a", [1], 4))


def test_a_step_must_be_able_to_decode_all_running_requests():
    with pytest.raises(ValueError, match=r"max_running 8 is more than engine.max_batch_tokens 4"):
        make_scheduler(max_running=8, max_batch_tokens=4)


def test_equal_prefixes_share_blocks_already_within_one_step():
    scheduler = make_scheduler(max_batch_tokens=64)
    first, second = Request("a", list(range(10)), 20), Request("b", [*range(8), 99, 98], 20)
    scheduler.add(first)
    scheduler.add(second)
    plan = step(scheduler)
    assert second.blocks[:2] == first.blocks[:2]
    assert second.blocks[2] != first.blocks[2]
    assert [(c.start, c.end) for c in plan.chunks] == [(0, 10), (8, 10)]
    assert second.num_cached == 8


def test_a_finished_request_leaves_its_prefix_for_the_next_turn():
    scheduler = make_scheduler()
    scheduler.add(Request("a", list(range(6)), 10))
    while scheduler.has_work:
        step(scheduler)
    later = Request("b", [*range(6), 7, 7, 7, 7, 5, 5, 5], 20)
    scheduler.add(later)
    step(scheduler)
    assert later.num_cached == 8  # the last sampled token was never computed


def test_the_last_token_of_a_prompt_is_always_computed():
    scheduler = make_scheduler()
    for name in "ab":
        request = Request(name, list(range(8)), 9)
        scheduler.add(request)
        step(scheduler)
    assert request.num_cached == 4


def test_new_weights_hide_the_old_prefixes_from_new_requests():
    scheduler = make_scheduler()
    old = Request("a", list(range(8)), 40)
    scheduler.add(old)
    step(scheduler)
    scheduler.start_version()
    for _ in range(6):
        step(scheduler)
    new = Request("b", list(old.token_ids), 40)
    scheduler.add(new)
    step(scheduler)
    assert new.num_cached == 0


def test_new_weights_leave_running_requests_their_blocks():
    scheduler = make_scheduler()
    request = Request("a", list(range(8)), 40)
    scheduler.add(request)
    step(scheduler)
    blocks = list(request.blocks)
    scheduler.start_version()
    plan = step(scheduler)
    assert request.blocks[: len(blocks)] == blocks
    assert plan.decodes == [request]


def test_the_latest_arrival_is_preempted_and_keeps_what_it_sampled():
    scheduler = make_scheduler(num_blocks=6, max_batch_tokens=32, prefix_cache=False)
    first, second = Request("a", [1] * 4, 16), Request("b", [2] * 4, 16)
    scheduler.add(first)
    scheduler.add(second)
    while not scheduler.num_preemptions:
        step(scheduler)
    assert (first.row >= 0, second.row) == (True, -1)
    sampled = len(second.token_ids)
    assert sampled > 4
    while not first.row < 0:
        step(scheduler)
    plan = step(scheduler)
    assert [(c.request, c.start, c.end) for c in plan.chunks] == [(second, 0, sampled)]


def test_a_cancelled_request_frees_its_blocks():
    scheduler = make_scheduler()
    scheduler.add(Request("a", list(range(30)), 40))
    step(scheduler)
    assert scheduler.cache.num_available < 16
    scheduler.cancel("a")
    assert (scheduler.cache.num_available, scheduler.has_work) == (16, False)


def test_the_least_recently_used_prefix_is_evicted_first():
    cache = KvCache(3, 1)
    blocks = cache.allocate(3)
    for token, block in enumerate(blocks):
        cache.publish(cache.root, [token], block)
        cache.release([block])
    cache.share(cache.find([0, 9]).blocks)
    cache.release([blocks[0]])
    assert cache.allocate(1) == [blocks[1]]


class SchedulerMachine(RuleBasedStateMachine):
    """Random arrivals, cancels, weight changes and steps; the invariants are checked after each."""

    @initialize(
        num_blocks=st.integers(2, 12),
        block_size=st.sampled_from([1, 2, 4]),
        max_running=st.integers(1, 4),
        extra=st.integers(0, 8),
        prefix_cache=st.booleans(),
    )
    def start(self, num_blocks, block_size, max_running, extra, prefix_cache):
        self.scheduler = make_scheduler(num_blocks, block_size, max_running, max_running + extra, 40, prefix_cache)
        self.max_running = max_running
        self.budget = max_running + extra
        self.open: dict[str, Request] = {}
        self.content: dict[int, tuple] = {}
        self.count = 0
        self.version = 0

    @rule(prompt=st.lists(st.integers(0, 1), min_size=1, max_size=20), new=st.integers(1, 12))
    def add(self, prompt, new):
        self.count += 1
        request = Request(f"r{self.count}", prompt, len(prompt) + new)
        try:
            self.scheduler.add(request)
        except RequestTooLong:
            return
        self.open[request.request_id] = request

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def cancel(self, data):
        name = data.draw(st.sampled_from(sorted(self.open)))
        assert self.scheduler.cancel(name) is self.open.pop(name)

    @rule()
    def change_weights(self):
        self.version += 1
        self.scheduler.start_version()

    @rule(token=st.integers(0, 1))
    def run_step(self, token):
        self.run(token)

    def run(self, token):
        known = len(self.scheduler.requests)
        plan = self.scheduler.schedule()
        assert plan.num_tokens <= self.budget
        assert plan.num_tokens > 0 or not known
        for request, start, end in [(r, r.num_computed - 1, r.num_computed) for r in plan.decodes] + [
            (c.request, c.start, c.end) for c in plan.chunks
        ]:
            self.compute(request, start, end)
        sampling = plan.decodes + [chunk.request for chunk in plan.chunks if chunk.is_last]
        for request in sampling:
            assert request.num_computed == len(request.token_ids)
            request.token_ids.append(token)
        finished = [request for request in sampling if len(request.token_ids) >= request.max_length]
        self.scheduler.commit(plan, finished)
        for request in finished:
            del self.open[request.request_id]

    def compute(self, request, start, end):
        """What a slot holds: the whole token prefix, and whether it was computed under one version only."""
        size = self.scheduler.cache.block_size
        for position in range(start, end):
            slot = request.blocks[position // size] * size + position % size
            before = self.slot(request, position - 1) if position else None
            pure = before is None or before[1] == self.version
            self.content[slot] = (tuple(request.token_ids[: position + 1]), self.version if pure else None)

    def slot(self, request, position):
        size = self.scheduler.cache.block_size
        return self.content[request.blocks[position // size] * size + position % size]

    @invariant()
    def every_block_has_its_owners(self):
        if not hasattr(self, "scheduler"):
            return
        cache = self.scheduler.cache
        references = [0] * cache.num_blocks
        for request in self.scheduler.requests:
            assert len(set(request.blocks)) == len(request.blocks)
            for block in request.blocks:
                references[block] += 1
        assert references == cache._references
        idle = list(cache._free) + list(cache._evictable)
        assert sorted(idle) == [block for block, count in enumerate(references) if count == 0]

    @invariant()
    def a_shared_block_holds_what_its_readers_think(self):
        if not hasattr(self, "scheduler"):
            return
        for request in self.scheduler.requests:
            if request.row >= 0:
                for position in range(request.num_computed):
                    assert self.slot(request, position)[0] == tuple(request.token_ids[: position + 1])

    @invariant()
    def what_can_be_reused_was_computed_under_the_weights_of_now(self):
        if not hasattr(self, "scheduler"):
            return
        cache = self.scheduler.cache
        for block in cache._published.values():
            for offset in range(cache.block_size):
                assert self.content[block * cache.block_size + offset][1] == self.version

    @invariant()
    def the_budgets_are_kept_and_nobody_overtakes(self):
        if not hasattr(self, "scheduler"):
            return
        running = [r.arrival for r in self.scheduler.requests if r.row >= 0]
        waiting = [r.arrival for r in self.scheduler.requests if r.row < 0]
        assert len(running) <= self.max_running
        assert waiting == sorted(waiting)
        assert not running or not waiting or max(running) < min(waiting)

    def teardown(self):
        if not hasattr(self, "scheduler"):
            return
        for _ in range(2000):
            if not self.open:
                break
            self.run(1)
        assert not self.open, "a request never finished"
        assert not self.scheduler.has_work
        assert self.scheduler.cache.num_available == self.scheduler.cache.num_blocks


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
