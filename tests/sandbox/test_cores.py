"""Cores of cells: the least used first, and never fewer given back than taken."""

from hypothesis import given
from hypothesis import strategies as st

from hone.sandbox.cells.cores import Cores


def test_two_cells_of_one_core_do_not_share_it_while_another_is_free() -> None:
    cores = Cores({3, 5})
    first, second = cores.take(1.0), cores.take(0.5)
    assert first | second == {3, 5}
    cores.give_back(first)
    assert cores.take(1.0) == first


def test_who_wants_more_than_there_are_gets_all() -> None:
    assert Cores({0, 1}).take(7.5) == {0, 1}
    assert len(Cores(range(8)).take(1.1)) == 2


@given(st.lists(st.one_of(st.floats(0.1, 5.0), st.none()), max_size=40))
def test_use_is_even_to_within_one_whatever_comes_and_goes(steps: list[float | None]) -> None:
    cores, taken = Cores(range(4)), []
    for number in steps:
        if number is None and taken:
            cores.give_back(taken.pop())
        elif number is not None:
            before = [sum(core in one for one in taken) for core in range(4)]
            taken.append(cores.take(number))
            fewest = sorted(before)[: len(taken[-1])]
            assert sorted(before[core] for core in taken[-1]) == fewest
