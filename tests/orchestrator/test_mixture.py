"""The order of tasks: by weight, without repetition, derived from the seed, resumable."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hone.orchestrator.mixture import Draw, Mixture
from hone.schema.messages import Message
from hone.schema.tasks import Task


class Numbers:
    def __init__(self, count):
        self.num_train_tasks = count

    def train_task(self, index):
        return Task(prompt=(Message("user", str(index)),))


def mixture(weights, counts=None, seed=0):
    lists = {name: Numbers((counts or {}).get(name, 5)) for name in weights}
    return Mixture(weights, lists, seed)


weights_of = st.dictionaries(st.sampled_from("abcde"), st.floats(0.1, 10), min_size=1)


@given(weights_of, st.integers(1, 200))
def test_every_prefix_keeps_the_shares_to_within_one_task(weights, num_draws):
    mix = mixture(weights)
    counts = dict.fromkeys(weights, 0)
    for total in range(1, num_draws + 1):
        counts[mix.draw().environment] += 1
        for name, weight in weights.items():
            assert abs(counts[name] - total * weight / sum(weights.values())) < 1 + 1e-9


@given(weights_of, st.integers(0, 50), st.integers(1, 50))
def test_a_resumed_mixture_goes_on_as_the_interrupted_one_would_have(weights, before, after):
    mix = mixture(weights)
    counts = {}
    for _ in range(before):
        draw = mix.draw()
        counts[draw.environment] = draw.number + 1
    resumed = mixture(weights)
    resumed.restore(counts)
    assert [resumed.draw() for _ in range(after)] == [mix.draw() for _ in range(after)]


def test_every_task_comes_once_before_any_comes_again():
    mix = mixture({"a": 1.0}, {"a": 7})
    prompts = [mix.task(mix.draw()).prompt[0].content for _ in range(14)]
    assert sorted(prompts[:7]) == sorted(prompts[7:]) == [str(i) for i in range(7)]
    assert prompts[:7] != prompts[7:]


def test_endless_tasks_come_in_their_own_order():
    mix = mixture({"a": 1.0}, {"a": None})
    assert [mix.draw() for _ in range(3)] == [Draw("a", number, number) for number in range(3)]
    assert mix.task(Draw("a", 12345, 12345)).prompt[0].content == "12345"


def test_four_environments_over_ten_thousand_tasks_resume_anywhere_with_the_same_sequence():
    weights = {"math": 0.4, "code": 0.3, "science": 0.2, "logic": 0.1}
    sizes = {"math": 700, "code": None, "science": 31, "logic": 1}
    mix, counts = mixture(weights, sizes, seed=3), {}
    drawn = [mix.draw() for _ in range(10_000)]
    for number, draw in enumerate(drawn):
        if number % 500 == 123:
            resumed = mixture(weights, sizes, seed=3)
            resumed.restore(counts)
            assert [resumed.draw() for _ in range(50)] == drawn[number : number + 50]
        counts[draw.environment] = draw.number + 1
    assert counts == {"math": 4000, "code": 3000, "science": 2000, "logic": 1000}


def test_an_environment_that_cannot_count_its_tasks_is_named():
    class Broken(Numbers):
        @property
        def num_train_tasks(self):
            raise OSError("no such file")

        @num_train_tasks.setter
        def num_train_tasks(self, count): ...

    with pytest.raises(ValueError, match="environment 'a' cannot count its train tasks: no such file"):
        Mixture({"a": 1.0}, {"a": Broken(1)}, 0)


def test_an_environment_without_tasks_is_refused():
    with pytest.raises(ValueError, match="no train tasks"):
        mixture({"a": 1.0, "b": 1.0}, {"b": 0})


def test_a_ledger_of_other_environments_is_refused():
    with pytest.raises(ValueError, match="'z'"):
        mixture({"a": 1.0}).restore({"z": 3})
