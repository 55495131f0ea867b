"""What a gateway decides: placement, quotas, and the ledger under everything that may happen to nodes."""

import dataclasses
from typing import get_args

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from hone.sandbox.errors import Busy, SandboxError
from hone.sandbox.gateway.ledger import HEARD_SECONDS, Entry, Ledger, Totals
from hone.sandbox.gateway.placement import Candidate, order
from hone.sandbox.gateway.quotas import Rate, check_quota
from hone.sandbox.gateway.relay import Route, head_of, routes
from hone.sandbox.gateway.tenants import Quota
from hone.sandbox.wire.frames import framed
from hone.schema import sandbox_calls as calls
from hone.schema.sandbox_nodes import Leased
from hone.schema.sandboxes import SandboxSpec

SMALL = SandboxSpec(memory_mb=64)
PLAIN = Candidate("n.0.", False, frozenset({"python"}), 0, 100, 0, 64_000, 60_000, 0.0, 8)


def candidates() -> st.SearchStrategy[list[Candidate]]:
    one = st.builds(
        Candidate,
        prefix=st.integers(0, 1000).map("n{}.0.".format),
        is_draining=st.booleans(),
        images=st.sampled_from([frozenset(), frozenset({"python"})]),
        num_sandboxes=st.integers(0, 120),
        max_sandboxes=st.just(100),
        promised_memory_mb=st.integers(0, 200_000),
        memory_mb=st.sampled_from([32, 1000, 64_000]),
        free_memory_mb=st.sampled_from([0, 10_000]),
        promised_cpus=st.floats(0, 1000),
        cores=st.integers(1, 64),
    )
    return st.lists(one, max_size=8, unique_by=lambda candidate: candidate.prefix)


# --- placement ------------------------------------------------------------------------------------------------------


@given(candidates(), st.text(max_size=8))
def test_every_node_that_may_take_it_is_asked_once_and_no_other(nodes, key):
    may = {one.prefix for one in nodes if not one.is_draining and one.memory_mb >= SMALL.memory_mb}
    ordered = order(nodes, SMALL, key)
    assert len(ordered) == len(may)
    assert set(ordered) == may


@given(candidates(), st.text(max_size=8))
def test_room_comes_before_the_image_and_the_image_before_nothing(nodes, key):
    by_prefix = {one.prefix: one for one in nodes}
    ordered = [by_prefix[prefix] for prefix in order(nodes, SMALL, key)]
    tiers = [(not one.has_room(SMALL), "python" not in one.images) for one in ordered]
    assert tiers == sorted(tiers)


@given(candidates(), st.text(max_size=8), st.randoms())
def test_the_order_in_which_nodes_are_known_does_not_matter(nodes, key, chance):
    shuffled = list(nodes)
    chance.shuffle(shuffled)
    assert order(shuffled, SMALL, key)[:1] == order(nodes, SMALL, key)[:1]


def test_sandboxes_are_spread_and_a_loaded_node_gets_fewer():
    nodes = [dataclasses.replace(PLAIN, prefix=f"n{number}.0.") for number in range(4)]
    counts = dict.fromkeys((one.prefix for one in nodes), 0)
    for number in range(400):
        now = [dataclasses.replace(one, num_sandboxes=counts[one.prefix], max_sandboxes=1000) for one in nodes]
        counts[order(now, SMALL, f"key {number}")[0]] += 1
    assert max(counts.values()) - min(counts.values()) <= 10
    nodes[0] = dataclasses.replace(nodes[0], num_sandboxes=99)
    firsts = [order(nodes, SMALL, f"key {number}")[0] for number in range(100)]
    assert firsts.count("n0.0.") == 0


# --- quotas ---------------------------------------------------------------------------------------------------------


@given(
    st.builds(Quota, max_sandboxes=st.integers(1, 5), max_memory_mb=st.integers(1, 500), max_cpus=st.floats(0.1, 5)),
    st.lists(st.tuples(st.integers(1, 300), st.floats(0.1, 3)), max_size=12),
)
def test_no_quota_is_ever_passed_and_what_can_never_fit_is_denied_for_good(quota, wishes):
    totals = Totals()
    for memory_mb, cpus in wishes:
        spec = SandboxSpec(memory_mb=memory_mb, cpus=cpus)
        fits_alone = memory_mb <= quota.max_memory_mb and cpus <= quota.max_cpus
        try:
            check_quota(quota, totals, spec)
        except Busy:
            assert fits_alone
            continue
        except SandboxError:
            assert not fits_alone
            continue
        totals = Totals(totals.num_sandboxes + 1, totals.memory_mb + memory_mb, totals.cpus + cpus)
        assert totals.num_sandboxes <= quota.max_sandboxes
        assert totals.memory_mb <= quota.max_memory_mb
        assert totals.cpus <= quota.max_cpus + 1e-5


@given(st.floats(0.1, 100), st.integers(1, 10), st.lists(st.floats(0, 2), max_size=50))
def test_a_rate_lets_through_what_it_says_and_tells_how_long_to_wait(per_second, at_once, gaps):
    rate, now, num_passed = Rate(per_second, at_once, left=at_once), 0.0, 0
    for gap in gaps:
        now += gap
        seconds = rate.wait_seconds(now)
        num_passed += not seconds
        assert num_passed <= at_once + per_second * now + 1e-6
        if seconds:
            assert dataclasses.replace(rate).wait_seconds(now + seconds + 1e-6) == 0.0


# --- routes ---------------------------------------------------------------------------------------------------------


def test_every_message_to_a_node_has_a_route():
    known = routes()
    assert [kind.__name__ for kind in get_args(calls.ToNode) if kind.__name__ not in known] == []


@pytest.mark.parametrize("message", [calls.Read(1 << 40, "n.0.1", "/x", 5), calls.Cancel(7), calls.Data(3, 1, b"x")])
def test_a_head_says_where_a_frame_belongs(message):
    head = head_of(framed(message))
    assert (head.kind, head.call) == (type(message).__name__, message.call)
    if routes()[head.kind] is Route.SANDBOX:
        assert msgspec.msgpack.decode(head.about) == message.sandbox_id


# --- the ledger -----------------------------------------------------------------------------------------------------

FENCE = 15.0
PATIENCE = 10.0
KEYS = ("", "k", "l")


@dataclasses.dataclass
class Request:
    """A creation on its way to a node."""

    entry: Entry
    prefix: str
    key: str
    is_waited_for: bool = True


class World(RuleBasedStateMachine):
    """Nodes that make and end sandboxes, are cut off, come back and die, beside what the ledger makes of it.

    A node that is cut off ends everything after ten seconds, as one does whose clients are gone; a stubborn one does not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger()
        self.now = 0.0
        self.has: dict[str, dict[str, Leased]] = {"n0.0.": {}, "n1.0.": {}}
        self.cut: dict[str, tuple[float, bool]] = {}
        self.asked: dict[str, tuple[float, list[Leased]]] = {}
        self.flying: list[Request] = []
        self.num_made = 0

    def here(self) -> list[str]:
        return [prefix for prefix in self.has if prefix not in self.cut]

    @rule(key=st.sampled_from(KEYS), choice=st.integers(0, 9), is_fast=st.booleans())
    def create(self, key, choice, is_fast):
        entry = self.ledger.find("a", key)
        if entry is None:
            if self.ledger.fenced_seconds("a", key, self.now) or not self.here():
                return
            entry = self.ledger.begin("a", key, SMALL)
            self.ledger.ask(entry, self.here()[choice % len(self.here())])
        elif entry.is_bound:
            self.ledger.ask(entry, entry.prefix)
        else:
            return  # somebody else has asked, and will hear
        self.flying.append(Request(entry, entry.prefix, key))
        if is_fast:
            self.arrive(-1)

    @precondition(lambda self: self.flying)
    @rule(choice=st.integers(0, 9))
    def arrive(self, choice):
        request = self.flying.pop(choice % len(self.flying))
        sandbox_id = self.make(request.prefix, request.key)
        if request.is_waited_for:
            self.ledger.confirm(request.entry, sandbox_id, self.now)

    @precondition(lambda self: self.flying)
    @rule(choice=st.integers(0, 9))
    def give_up(self, choice):
        """Its client is gone; the node may yet hear of it."""
        request = self.flying[choice % len(self.flying)]
        if request.is_waited_for:
            request.is_waited_for = False
            self.ledger.doubt(request.entry, self.now)

    def deliver(self):
        while self.flying:
            self.arrive(-1)

    def make(self, prefix, key):
        for one in self.has[prefix].values():
            if key and one.key == key:
                return one.sandbox_id
        self.num_made += 1
        sandbox_id = f"{prefix}{self.num_made}"
        self.has[prefix][sandbox_id] = Leased(sandbox_id, "a", key, SMALL.memory_mb, SMALL.cpus)
        return sandbox_id

    @precondition(lambda self: any(self.has[prefix] for prefix in self.here()))
    @rule(choice=st.integers(0, 99), is_seen=st.booleans())
    def end(self, choice, is_seen):
        living = [(prefix, one) for prefix in self.here() for one in self.has[prefix].values()]
        prefix, one = living[choice % len(living)]
        del self.has[prefix][one.sandbox_id]
        if is_seen:
            self.ledger.end(one.sandbox_id, "b")  # who is not its owner ends nothing
            self.ledger.end(one.sandbox_id, "a")

    @rule(seconds=st.sampled_from([0.5, 2.0, 11.0]))
    def wait(self, seconds):
        self.deliver()  # nothing is under way for longer than the ledger waits
        self.now += seconds
        for prefix, (since, is_stubborn) in self.cut.items():
            if self.now - since > PATIENCE and not is_stubborn:
                self.has[prefix].clear()

    @precondition(lambda self: self.here())
    @rule(choice=st.integers(0, 9))
    def ask_report(self, choice):
        self.now += 0.01
        prefix = self.here()[choice % len(self.here())]
        self.asked.setdefault(prefix, (self.now, list(self.has[prefix].values())))
        self.now += 0.01

    @precondition(lambda self: self.asked)
    @rule(choice=st.integers(0, 9))
    def hear_report(self, choice):
        prefix = sorted(self.asked)[choice % len(self.asked)]
        self.take(prefix, *self.asked.pop(prefix))

    def take(self, prefix, asked, told):
        for sandbox_id in self.ledger.take_report(prefix, asked, told):
            self.has[prefix].pop(sandbox_id, None)

    def take_now(self, prefix):
        self.now += 0.01
        self.take(prefix, self.now, list(self.has[prefix].values()))
        self.now += 0.01

    @precondition(lambda self: self.here())
    @rule(choice=st.integers(0, 9), is_stubborn=st.booleans(), is_unwanted=st.booleans())
    def lose(self, choice, is_stubborn, is_unwanted):
        prefix = self.here()[choice % len(self.here())]
        self.cut[prefix] = (self.now, is_stubborn)
        self.asked.pop(prefix, None)
        self.ledger.lose(prefix, self.now + FENCE)
        for request in [one for one in self.flying if one.prefix == prefix]:
            self.flying.remove(request)
            if request.is_waited_for:
                self.ledger.doubt(request.entry, self.now)
        if is_unwanted:
            for sandbox_id in self.has[prefix]:
                self.ledger.unwant(prefix, sandbox_id, "a")

    @precondition(lambda self: self.cut)
    @rule(choice=st.integers(0, 9))
    def come_back(self, choice):
        prefix = sorted(self.cut)[choice % len(self.cut)]
        del self.cut[prefix]
        self.take_now(prefix)

    @precondition(lambda self: self.cut)
    @rule(choice=st.integers(0, 9))
    def start_anew(self, choice):
        prefix = sorted(self.cut)[choice % len(self.cut)]
        del self.cut[prefix], self.has[prefix]
        self.ledger.bury(prefix)
        name, number, _ = prefix.split(".")
        self.has[f"{name}.{int(number) + 1}."] = {}
        self.take_now(f"{name}.{int(number) + 1}.")

    @invariant()
    def a_key_never_has_two_sandboxes(self):
        obedient = [there for prefix, there in self.has.items() if not self.cut.get(prefix, (0, False))[1]]
        living = [one.key for there in obedient for one in there.values() if one.key]
        assert len(living) == len(set(living))

    def teardown(self):
        """What is counted is what there is, once all have told."""
        for prefix in list(self.cut):
            del self.cut[prefix]
            self.take_now(prefix)
        self.deliver()
        self.now += HEARD_SECONDS + 1.0
        for prefix in self.has:
            self.take_now(prefix)
        for prefix in self.has:
            self.take_now(prefix)
        self.a_key_never_has_two_sandboxes()
        living = sum(len(there) for there in self.has.values())
        assert self.ledger.totals("a") == Totals(living, living * SMALL.memory_mb, living * SMALL.cpus)
        for prefix, there in self.has.items():
            assert self.ledger.at(prefix).num_sandboxes == len(there)
        for prefix, there in self.has.items():
            for one in there.values():
                if one.key:
                    assert self.ledger.find("a", one.key).prefix == prefix


@pytest.mark.parametrize("num_worlds", [200, pytest.param(5000, marks=pytest.mark.slow)])
def test_whatever_happens_a_key_is_one_sandbox_and_the_count_is_right(num_worlds):
    run_state_machine_as_test(
        World, settings=settings(max_examples=num_worlds, stateful_step_count=30, deadline=None, database=None)
    )
