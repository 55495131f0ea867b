import struct

import pytest

from hone.sandbox.cells.plan import (
    NEW_NETWORK,
    NEW_USERS,
    OPERATION,
    SPAWN,
    Bind,
    Code,
    Grants,
    Image,
    Plan,
    plan_cell,
    plan_spawner,
)
from hone.schema.sandboxes import SandboxSpec

GRANTS = Grants(
    uid=1 << 20, gid=1 << 20, num_ids=1 << 16, cores=frozenset({1}), has_memory_limit=True, has_process_limit=True
)
IMAGE = Image(binds=(Bind("/usr", "/usr"),), links=(("/bin", "usr/bin"),))


def codes(plan: Plan) -> list[Code]:
    return [operation.code for operation in plan.operations]


def test_a_plan_ends_with_the_agent_behind_all_that_confines_it() -> None:
    assert codes(plan_cell(SandboxSpec(), IMAGE, GRANTS))[-3:] == [Code.DROP_POWERS, Code.FILTER, Code.BECOME_AGENT]


def test_sources_are_taken_before_the_ids_of_the_host_are_given_up_and_the_root_is_left_before_powers_are() -> None:
    order = codes(plan_cell(SandboxSpec(), IMAGE, GRANTS))
    assert order.index(Code.TAKE_TREE) < order.index(Code.IDENTITY) < order.index(Code.PIVOT)
    assert order.index(Code.PIVOT) < order.index(Code.LEAVE) < order.index(Code.DROP_POWERS)


def test_a_network_of_its_own_is_a_namespace() -> None:
    assert plan_cell(SandboxSpec(), IMAGE, GRANTS).namespaces & NEW_NETWORK
    shared = Grants(uid=0, gid=0, num_ids=1, cores=frozenset({0}), own_network=False)
    assert not plan_cell(SandboxSpec(), IMAGE, shared).namespaces & NEW_NETWORK


def test_limits_of_resources_stand_in_for_cgroups() -> None:
    alone = Grants(uid=5, gid=5, num_ids=1, cores=frozenset({0}))
    with_cgroups = plan_cell(SandboxSpec(), IMAGE, GRANTS)
    without = plan_cell(SandboxSpec(), IMAGE, alone)
    assert codes(without).count(Code.LIMIT) == codes(with_cgroups).count(Code.LIMIT) + 2
    assert without.uid_map == b"0 5 1\n"


def test_layers_belong_to_the_cells_ids_where_it_has_a_range() -> None:
    layered = Image(layers=("/images/a", "/images/b"))
    assert plan_cell(SandboxSpec(), layered, GRANTS).layers == ("/images/a", "/images/b")
    alone = Grants(uid=5, gid=5, num_ids=1, cores=frozenset({0}))
    assert plan_cell(SandboxSpec(), layered, GRANTS).maps_layers
    assert not plan_cell(SandboxSpec(), layered, alone).maps_layers


def test_an_order_can_be_read_back() -> None:
    plan = plan_cell(SandboxSpec(), IMAGE, GRANTS)
    order = plan.encode(7, cgroup=2)
    identity, namespaces, cgroup, uids, gids, _, layers, _, steps = SPAWN.unpack_from(order)
    assert (identity, namespaces, cgroup, steps) == (7, plan.namespaces, 2, len(plan.operations))
    position = SPAWN.size + uids + gids + layers
    for operation in plan.operations:
        code, size, a, b = OPERATION.unpack_from(order, position)
        position += OPERATION.size
        assert (code, order[position : position + size], a, b) == (
            operation.code,
            operation.data,
            operation.a,
            operation.b,
        )
        position += size + -size % 8
    assert position == len(order)


def test_cores_are_a_mask() -> None:
    grants = Grants(uid=0, gid=0, num_ids=1, cores=frozenset({0, 70}))
    (cores,) = (step for step in plan_cell(SandboxSpec(), IMAGE, grants).operations if step.code is Code.CORES)
    assert struct.unpack("<QQ", cores.data) == (1, 1 << 6)


def test_the_spawner_of_an_unprivileged_user_is_root_of_its_own() -> None:
    first = plan_spawner(is_unprivileged=True, uid=1000, gid=1000, own_network=True)[0]
    assert first.a & NEW_USERS
    assert not plan_spawner(is_unprivileged=False, uid=0, gid=0, own_network=True)[0].a & NEW_USERS


def test_what_cannot_be_encoded_is_refused() -> None:
    with pytest.raises(ValueError, match="zero byte"):
        plan_cell(SandboxSpec(), Image(binds=(Bind("/a\0b", "/c"),)), GRANTS)
    with pytest.raises(ValueError, match="64 layers"):
        plan_cell(SandboxSpec(), Image(layers=("/a",) * 65), GRANTS)
