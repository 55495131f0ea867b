import msgspec
import pytest

from fakes import ScriptedSampler
from hone.cli.replay import replay_table
from hone.envs import (
    Agent,
    MultiAgent,
    MultiTurn,
    Rubric,
    SingleTurn,
    Task,
    assistant,
    group_reward,
    metric,
    reward,
    user,
)
from hone.envs.replay import groups_of, replay
from hone.envs.rollout import run_group, run_rollout
from hone.envs.validation import play
from hone.schema.sampling import SamplingParameters
from hone.schema.traces import AgentRecord, Failure, FailureClass, Reward, StopReason

TASK = Task(prompt=(user("2 + 2?"),), reference="4")


@reward
def exact(answer, reference):
    return answer == reference


@reward
def lenient(answer, reference):
    return reference in answer


@metric
def size(answer):
    return len(answer)


def environment_of(*measures, kind=SingleTurn, **more):
    return kind(name="sum", version="2", rubric=Rubric(measures), train=[TASK], **more)


async def test_the_present_rubric_judges_and_the_difference_is_told():
    old = await play(environment_of(exact), TASK, "it is 4")
    (one,) = await replay(environment_of(lenient, size), [old])
    assert (one.before.reward, one.after.reward, one.difference) == (0, 1, 1)
    assert one.after.rewards == {"lenient": Reward(1.0)}
    assert one.after.metrics == {"size": 7}
    assert one.after.environment_version == "2"
    assert one.after.nodes == old.nodes
    assert one.is_changed
    assert one.note == ""


async def test_what_stays_the_same_is_unchanged():
    old = await play(environment_of(exact, size), TASK, "4")
    (one,) = await replay(environment_of(exact, size), [old])
    assert not one.is_changed
    assert one.difference == 0


async def test_a_rollout_whose_reward_failed_is_judged_now():
    @reward(name="exact")
    def broken(answer):
        raise ValueError("a bug")

    old = await play(environment_of(broken), TASK, "4", truncated=True)
    assert old.failure is not None
    (one,) = await replay(environment_of(exact), [old])
    assert one.after.reward == 1
    assert one.after.stop_reason is StopReason.MAX_TOKENS
    assert one.difference is None
    (back,) = await replay(environment_of(broken), [one.after])
    assert back.after.failure.where == "reward exact"
    assert back.after.stop_reason is None


async def test_a_rollout_that_failed_before_stays_as_it_is():
    failed = msgspec.structs.replace(
        await play(environment_of(exact), TASK, "4"),
        rewards={},
        stop_reason=None,
        failure=Failure(FailureClass.MODEL, "sample", "gone"),
    )
    (one,) = await replay(environment_of(exact), [failed])
    assert one.after is failed
    assert one.note == "failed before it was judged (model)"


@reward
def kept(state):
    return state["turns"]


class Counts(MultiTurn):
    said = "again"

    async def setup(self, rollout):
        rollout.state = {"turns": 0}

    async def reply(self, rollout):
        rollout.state["turns"] += 1
        return None if rollout.answer == "4" else [user(self.said)]


async def test_a_rubric_that_looks_at_state_sees_the_rollout_again():
    old = await play(environment_of(kept, kind=Counts), TASK, "5", "4")
    assert old.reward == 2
    (one,) = await replay(
        environment_of(kept, kind=Counts), [msgspec.structs.replace(old, rewards={"kept": Reward(7)})]
    )
    assert one.after.reward == 2
    assert one.note == ""


async def test_an_environment_that_replies_otherwise_now_is_told():
    old = await play(environment_of(kept, kind=Counts), TASK, "5", "4")
    other = environment_of(kept, kind=Counts)
    other.said = "once more"
    (one,) = await replay(other, [old])
    assert one.note == "the environment replies otherwise now"
    asks_more = msgspec.structs.replace(old, nodes=old.nodes[:2])
    (short,) = await replay(other, [asks_more])
    assert short.after.failure.where == "replay"


async def test_sampled_tokens_are_kept_when_a_rollout_is_seen_again():
    environment = environment_of(kept, kind=Counts)
    old = await run_rollout(environment, TASK, 3, ScriptedSampler(["5", "4"]), SamplingParameters(), 0)
    (one,) = await replay(environment, [old])
    assert one.after.nodes == old.nodes
    assert one.after.attempt == 3


@group_reward
def shares(answers):
    return [answers.count(answer) / len(answers) for answer in answers]


async def test_groups_are_judged_together():
    environment = environment_of(exact, shares)
    sampler = ScriptedSampler(["4", "4", "5"])
    traces = await run_group(environment, TASK, [0, 1, 2], sampler, SamplingParameters(), 0, group="g")
    (group,) = groups_of(traces)
    assert not any(one.is_changed for one in await replay(environment, group))
    pair = [one.after.rewards["shares"].value for one in await replay(environment, group[1:])]
    assert pair == [0.5, 0.5]


async def test_metrics_of_the_rollout_itself_stay():
    old = msgspec.structs.replace(await play(environment_of(exact, size), TASK, "4"), metrics={"size": 9, "own": 3})
    (one,) = await replay(environment_of(exact), [old])
    assert one.after.metrics == {"size": 9, "own": 3}
    (one,) = await replay(environment_of(exact, size), [old])
    assert one.after.metrics == {"size": 1, "own": 3}


@pytest.mark.parametrize("gold", [None, lambda task: [assistant("4")]])
async def test_traces_are_grouped_by_environment_and_group(gold):
    environment = environment_of(exact, gold=gold)
    first, second = await play(environment, TASK, "4"), await play(environment, TASK, "5")
    other = msgspec.structs.replace(first, environment="other")
    assert [len(group) for group in groups_of([first, other, second])] == [2, 1]


class Two(MultiAgent):
    """Both say something to the task."""

    async def play(self, rollout):
        await rollout.agent("a").turn()
        await rollout.agent("b").turn()


def game(*measures):
    return Two(name="game", agents=[Agent("a"), Agent("b")], rubric=Rubric(measures), train=[TASK])


async def play_game(environment):
    return await run_rollout(environment, TASK, 0, ScriptedSampler(["4", "5"]), SamplingParameters(), 0)


@reward(agent="a")
def is_four(agent_answers):
    return agent_answers["a"] == "4"


@reward(agent="a", name="is_four")
def is_five(agent_answers):
    return agent_answers["a"] == "5"


@reward
def common(agent_answers):
    return float(len(agent_answers))


@reward(agent="b")
def broken(agent_answers):
    raise ValueError("a bug")


async def test_each_of_several_agents_is_judged_anew():
    old = await play_game(game(is_four, common))
    assert old.agent_rewards == {"a": 3.0, "b": 2.0}
    (same,) = await replay(game(is_four, common), [old])
    assert (same.is_changed, same.after.agent_rewards) == (False, old.agent_rewards)
    (one,) = await replay(game(is_five, common), [old])
    assert one.is_changed
    assert one.after.agents == {"a": AgentRecord(rewards={"is_four": Reward(0.0)}), "b": AgentRecord()}
    assert one.after.agent_rewards == {"a": 2.0, "b": 2.0}
    [cells] = [list(column.cells) for column in replay_table([one], 5).columns[-1:]]
    assert cells == ["a.is_four 1.0 → 0.0"]


async def test_an_agents_reward_that_fails_now_leaves_no_old_rewards():
    (one,) = await replay(game(is_four, common, broken), [await play_game(game(is_four, common))])
    assert one.after.failure.where == "reward broken"
    assert one.after.agents == {"a": AgentRecord(), "b": AgentRecord()}


async def test_what_several_agents_did_to_the_state_is_not_played_again():
    @reward(agent="b")
    def looks(state):
        return 1.0

    old = await play_game(game(is_four))
    (one,) = await replay(game(looks), [old])
    assert one.after == old
    assert "cannot be played again" in one.note
