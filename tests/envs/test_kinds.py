"""Every kind of environment takes what all of them take, and says what it does not know."""

import pytest

from hone.envs import (
    Environment,
    MultiAgent,
    ProgramHarness,
    Rubric,
    SandboxToolUse,
    SdkHarness,
    Task,
    ToolUse,
    reward,
    user,
)

TASK = Task(prompt=(user("?"),), reference="!")


@reward
def exact(answer, reference):
    return answer == reference


async def silent(rollout, endpoint):
    return None


class Duel(MultiAgent):
    async def play(self, rollout):
        return None


KINDS = {
    "tools": lambda **common: ToolUse(tools=[], **common),
    "sandbox": SandboxToolUse,
    "sdk harness": lambda **common: SdkHarness(agent=silent, **common),
    "program harness": lambda **common: ProgramHarness(command=["true"], **common),
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_kind_takes_what_every_environment_takes(kind):
    environment = kind(
        name="quiz",
        rubric=Rubric([exact]),
        train=[TASK],
        held_out=[TASK],
        version="1.2",
        max_turns=3,
        max_tool_calls=4,
        difficulty=lambda task: 7.0,
        wrong=lambda task: {"shout": "?!"},
    )
    assert isinstance(environment, Environment)
    assert (environment.name, environment.version) == ("quiz", "1.2")
    assert (environment.max_turns, environment.max_tool_calls) == (3, 4)
    assert environment.difficulty(TASK) == 7.0
    assert environment.wrong(TASK) == {"shout": "?!"}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_kind_names_the_argument_that_it_does_not_know(kind):
    with pytest.raises(TypeError, match="max_turn'"):
        kind(name="quiz", rubric=Rubric([exact]), train=[TASK], max_turn=3)


def test_several_agents_in_an_environment_take_no_other_arguments_either():
    with pytest.raises(TypeError, match="max_turn'"):
        Duel(agents=[], name="quiz", rubric=Rubric([exact]), train=[TASK], max_turn=3)
