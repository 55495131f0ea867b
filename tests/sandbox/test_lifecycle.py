"""What a node decides, without a clock, a process or a cell."""

import random

import pytest

from hone.sandbox.errors import Busy, SandboxError
from hone.sandbox.node.lifecycle import Destroy, End, Give, Lifecycle, Limits, Make, Over, Stage
from hone.schema.sandboxes import Outcome, SandboxSpec

SPEC = SandboxSpec(ttl_seconds=100)


def of(kind, commands):
    return [command for command in commands if isinstance(command, kind)]


def ready(lifecycle, spec=SPEC, now=0.0, **arguments):
    """A lease whose cell is made at once, and the number of the cell."""
    lease = lifecycle.ask(spec, now, **arguments)
    (make,) = of(Make, lifecycle.take())
    lifecycle.made(make.number, now)
    lifecycle.take()
    return lease, make.number


def test_a_sandbox_is_leased_before_it_is_ready():
    lifecycle = Lifecycle("n.1.")
    lease = lifecycle.ask(SPEC, 0.0)
    (make,) = lifecycle.take()
    assert (lease.sandbox_id, lease.stage, make.number) == ("n.1.1", Stage.STARTING, 1)
    lifecycle.made(1, 0.5)
    assert lifecycle.take() == [Give("n.1.1", 1)]
    assert (lease.stage, lease.deadline()) == (Stage.READY, 100.5)


def test_the_same_key_is_the_same_sandbox_while_it_lives():
    lifecycle = Lifecycle("n.1.")
    first, _ = ready(lifecycle, key="k", owner="a")
    assert lifecycle.ask(SPEC, 1.0, key="k", owner="a") is first
    assert lifecycle.ask(SPEC, 1.0, key="k", owner="b") is not first
    with pytest.raises(ValueError, match="another kind"):
        lifecycle.ask(SandboxSpec(memory_mb=1), 1.0, key="k", owner="a")
    lifecycle.end(first.sandbox_id, 2.0, "closed")
    assert lifecycle.ask(SPEC, 3.0, key="k", owner="a") is not first


def test_few_start_at_once_and_who_comes_when_the_queue_is_full_is_told_when_to_come_back():
    lifecycle = Lifecycle("n.1.", Limits(max_starting=2, max_queued=3))
    for _ in range(5):
        lifecycle.ask(SPEC, 0.0)
    assert len(of(Make, lifecycle.take())) == 2
    with pytest.raises(Busy) as busy:
        lifecycle.ask(SPEC, 0.0)
    assert 0 < busy.value.retry_after_seconds < 10
    lifecycle.made(1, 0.1)
    assert [type(command) for command in lifecycle.take()] == [Give, Make]


def test_no_more_cells_than_allowed_and_the_next_one_follows_when_one_is_gone():
    lifecycle = Lifecycle("n.1.", Limits(max_sandboxes=1))
    first, number = ready(lifecycle)
    lifecycle.ask(SPEC, 1.0)
    assert lifecycle.take() == []
    lifecycle.end(first.sandbox_id, 2.0, "closed")
    assert of(Make, lifecycle.take()) == []  # it still dies
    lifecycle.gone(number, 3.0)
    assert len(of(Make, lifecycle.take())) == 1


def test_who_waits_too_long_is_given_up_and_its_cell_destroyed_when_it_comes():
    lifecycle = Lifecycle("n.1.", Limits(queue_seconds=5))
    lease = lifecycle.ask(SPEC, 0.0)
    lifecycle.take()
    lifecycle.tick(5.0)
    assert of(Over, lifecycle.take())[0].outcome is Outcome.NODE_LOST
    lifecycle.made(1, 6.0)
    assert lifecycle.take() == [Destroy(1)]
    with pytest.raises(SandboxError, match="not ready within 5 s"):
        lifecycle.find(lease.sandbox_id)


def test_a_lease_ends_at_its_time_unless_it_is_renewed():
    lifecycle = Lifecycle("n.1.")
    lease, _ = ready(lifecycle)
    assert lifecycle.next_deadline() <= 100
    lifecycle.tick(99.0)
    lifecycle.renew(lease, 99.0, seconds=50)
    lifecycle.tick(148.0)
    assert lifecycle.take() == []
    lifecycle.tick(149.0)
    assert [type(command) for command in lifecycle.take()] == [Over, Destroy]


def test_an_idle_sandbox_ends_and_one_in_use_does_not():
    lifecycle = Lifecycle("n.1.")
    lease, _ = ready(lifecycle, SandboxSpec(idle_seconds=10))
    lifecycle.begin_use(lease)
    lifecycle.tick(50.0)
    lifecycle.end_use(lease, 50.0)
    lifecycle.tick(59.0)
    assert lifecycle.take() == []
    lifecycle.tick(60.0)
    assert "nothing was asked of it for 10 s" in of(Over, lifecycle.take())[0].problem


def test_a_cell_that_cannot_be_made_ends_its_lease_with_the_reason():
    lifecycle = Lifecycle("n.1.")
    lease = lifecycle.ask(SPEC, 0.0)
    lifecycle.take()
    lifecycle.failed(1, 1.0, "no room", Outcome.POLICY_DENIED)
    assert lifecycle.take() == [Over(lease.sandbox_id, "no room", Outcome.POLICY_DENIED, End.NOT_READY)]
    assert lifecycle.num_cells == 0


def test_demand_fills_a_pool_and_its_cells_are_given_once():
    lifecycle = Lifecycle("n.1.", Limits(max_warm=8, max_starting=100))
    for _ in range(10):
        ready_or_waiting = lifecycle.ask(SPEC, 0.0)
    makes = of(Make, lifecycle.take())
    num_warm = len(makes) - 10
    assert 0 < num_warm <= 8
    for make in makes:
        lifecycle.made(make.number, 0.1)
    lifecycle.take()
    assert lifecycle.num_warm == num_warm
    lease = lifecycle.ask(SandboxSpec(ttl_seconds=7, env={"A": "b"}), 0.2)
    assert lease.stage is Stage.READY  # from the pool: lease and variables make no other kind
    given = of(Give, lifecycle.take())[0].number
    lifecycle.end(lease.sandbox_id, 0.3, "closed")
    assert Destroy(given) in lifecycle.take()
    assert ready_or_waiting.cell != given


def test_a_pool_without_demand_shrinks_to_nothing():
    lifecycle = Lifecycle("n.1.", Limits(max_warm=8, max_starting=100))
    for _ in range(10):
        lifecycle.ask(SPEC, 0.0)
    for make in of(Make, lifecycle.take()):
        lifecycle.made(make.number, 0.1)
    lifecycle.take()
    num_warm = lifecycle.num_warm
    lifecycle.tick(60.0)
    assert len(of(Destroy, lifecycle.take())) == num_warm > 0
    assert lifecycle.num_warm == 0


def test_ids_of_other_nodes_and_of_earlier_starts_are_lost():
    with pytest.raises(SandboxError) as error:
        Lifecycle("n.2.").find("n.1.7")
    assert error.value.outcome is Outcome.NODE_LOST


def test_what_begins_from_a_snapshot_is_not_from_a_pool():
    lifecycle = Lifecycle("n.1.", Limits(max_warm=2))
    lifecycle.keep_warm(SPEC, 1, 0.0)
    (warm,) = of(Make, lifecycle.take())
    lifecycle.made(warm.number, 0.0)
    lease = lifecycle.ask(SPEC, 1.0, snapshot_id="n.1.s1")
    (make,) = of(Make, lifecycle.take())
    assert (make.sandbox_id, warm.sandbox_id) == (lease.sandbox_id, "")
    lifecycle.ask(SPEC, 1.0, key="k")
    with pytest.raises(ValueError, match="another kind"):
        lifecycle.ask(SPEC, 1.0, key="k", snapshot_id="n.1.s1")


def test_an_exchange_of_cells_is_the_same_lease():
    lifecycle = Lifecycle("n.1.", Limits(max_sandboxes=1))
    lease, number = ready(lifecycle)
    waiting = lifecycle.ask(SPEC, 1.0)
    lifecycle.exchange(lease, 50.0)
    assert lifecycle.take() == [Destroy(number)]  # there is no room for two
    lifecycle.gone(number, 51.0)
    (make,) = of(Make, lifecycle.take())
    assert make.sandbox_id == lease.sandbox_id
    lifecycle.made(make.number, 52.0)
    assert lifecycle.take() == [Give(lease.sandbox_id, make.number)]
    assert lease.deadline() == 100.0
    lifecycle.exchange(lease, 99.0)
    lifecycle.tick(100.5)
    ended = {over.sandbox_id: over.problem for over in of(Over, lifecycle.take())}
    assert ended == {lease.sandbox_id: "its lease is over", waiting.sandbox_id: ended[waiting.sandbox_id]}


@pytest.mark.parametrize("seed", range(20))
def test_cells_and_leases_agree_whatever_happens(seed):
    """The books against a machine that makes, loses and destroys cells in random order."""
    chance = random.Random(seed)
    limits = Limits(max_sandboxes=12, max_starting=3, max_queued=6, queue_seconds=20, max_warm=4)
    lifecycle = Lifecycle("n.1.", limits)
    making, alive, dying, given, made_for = set(), set(), set(), {}, {}
    now = 0.0
    for _ in range(600):
        now += chance.random()
        match chance.randrange(8):
            case 0 | 1:
                try:
                    spec = SandboxSpec(memory_mb=chance.choice((1, 2)), ttl_seconds=30, idle_seconds=9)
                    lifecycle.ask(spec, now, snapshot_id=chance.choice(("", "n.1.s1")))
                except Busy:
                    assert lifecycle.num_in(Stage.QUEUED) >= limits.max_queued
            case 2 if making:
                number = chance.choice(sorted(making))
                making.discard(number)
                alive.add(number)
                lifecycle.made(number, now)
            case 3 if making:
                number = chance.choice(sorted(making))
                making.discard(number)
                lifecycle.failed(number, now, "bad luck", Outcome.AGENT_LOST)
            case 4 if dying:
                number = chance.choice(sorted(dying))
                dying.discard(number)
                lifecycle.gone(number, now)
            case 5 if lifecycle.leases:
                lifecycle.end(chance.choice(sorted(lifecycle.leases)), now, "closed")
            case 6 if ready_ones := [one for one in lifecycle.leases.values() if one.stage is Stage.READY]:
                lease = chance.choice(ready_ones)
                del given[lease.sandbox_id]
                ends = lease.ends
                lifecycle.exchange(lease, now)
                assert lease.ends == ends
            case _:
                lifecycle.tick(now)
        for command in lifecycle.take():
            match command:
                case Make(number, _, sandbox_id):
                    making.add(number)
                    made_for[number] = sandbox_id
                case Give(sandbox_id, number):
                    assert number in alive
                    assert number not in given.values(), "a cell was given twice"
                    if lifecycle.leases[sandbox_id].needs_own:
                        assert made_for[number] == sandbox_id
                    given[sandbox_id] = number
                case Destroy(number):
                    alive.remove(number)
                    dying.add(number)
        assert len(making) <= limits.max_starting
        assert len(making) + len(alive) + len(dying) == lifecycle.num_cells <= limits.max_sandboxes
        assert set(lifecycle.cells()) == alive
    for sandbox_id in list(lifecycle.leases):
        lifecycle.end(sandbox_id, now, "closed")
    for command in lifecycle.take():
        if isinstance(command, Destroy):
            alive.discard(command.number)
    assert len(alive) == lifecycle.num_warm
