import asyncio

import pytest
from aiohttp import web

from fakes import ScriptedSampler
from hone.config.load import recipe_from
from hone.envs import (
    Agent,
    ChatModel,
    FailureClass,
    Fixed,
    Limits,
    MultiAgent,
    Rubric,
    StopReason,
    Task,
    group_reward,
    reward,
    run_group,
    run_rollout,
    system,
    user,
)
from hone.orchestrator.batching import make_batch
from hone.orchestrator.samples import UntrainableTraceError, agent_samples, check_trainable, credits_of
from hone.schema.sampling import SamplingParameters
from hone.schema.seeds import derive_seed
from hone.schema.traces import Trace
from hone.schema.wire import decode, encode
from hone.transport.batches import samples_of

TASK = Task(prompt=(user("Think of a sum."),), reference="4")
SAMPLING = SamplingParameters(max_tokens=64)


@reward(agent="solver")
def solved(agent_answers, reference):
    return agent_answers["solver"] == reference


@reward(agent="proposer", weight=0.5)
def hard(agent_answers, reference):
    return agent_answers["solver"] != reference


@reward(weight=0.25)
def polite(agent_answers):
    return "please" in agent_answers["proposer"]


class ProposeAndSolve(MultiAgent):
    """The proposer asks, the solver, who does not see the task, answers."""

    def __init__(self, solver=Agent("solver"), **settings):
        agents = [Agent("proposer"), solver]
        super().__init__(name="game", agents=agents, rubric=Rubric([solved, hard, polite]), train=[TASK], **settings)

    async def play(self, rollout):
        proposer, solver = rollout.agent("proposer"), rollout.agent("solver")
        await proposer.turn()
        solver.start(system("Answer with a number."), user(proposer.answer))
        await solver.turn()
        assert solver.messages[-2:] == [user(proposer.answer), rollout.nodes[-1].message]


def says(branch):
    """The policy as proposer, and as solver, who knows some sums."""
    return "2+2 please" if branch[-1].message == TASK.prompt[0] else "4" if "2+2" in branch[-1].message.content else "?"


async def play(environment, sampler, attempt=0, **arguments):
    return await run_rollout(environment, TASK, attempt, sampler, SAMPLING, 7, group="g", **arguments)


async def test_each_agent_has_a_conversation_and_rewards_of_its_own():
    trace = await play(ProposeAndSolve(), ScriptedSampler(says))
    assert trace.failure is None
    first, second = trace.branches()
    assert [(node.message.content, node.agent) for node in first] == [
        ("Think of a sum.", ""),
        ("2+2 please", "proposer"),
    ]
    assert [node.message.content for node in second] == ["Answer with a number.", "2+2 please", "4"]
    assert [node.agent for node in second] == ["", "", "solver"]
    assert trace.agent_rewards == {"proposer": 0.25, "solver": 1.25}
    assert trace.reward == 0.75
    assert decode(encode(trace), Trace) == trace


async def test_seeds_depend_on_agent_and_turn_and_not_on_who_speaks_first():
    sampler = ScriptedSampler(says)
    await play(ProposeAndSolve(), sampler, attempt=3)
    wanted = {derive_seed(7, "sampling", TASK.key, 3, name, 0) for name in ("proposer", "solver")}
    assert {sampling.seed for _, sampling in sampler.calls} == wanted


async def group_of(environment, scripts):
    traces = [await play(environment, ScriptedSampler(script), attempt) for attempt, script in enumerate(scripts)]
    assert [trace.failure for trace in traces] == [None] * len(traces)
    return traces


def script(proposal, answer):
    return lambda branch: proposal if branch[-1].message == TASK.prompt[0] else answer


async def test_an_agents_advantage_is_relative_to_the_same_agent_in_the_group():
    traces = await group_of(ProposeAndSolve(), [script("2+2", "4"), script("3+3", "5")])
    first, second = credits_of(traces, "dr_grpo")
    assert {name: credit.advantage for name, credit in first.items()} == {"proposer": -0.25, "solver": 0.5}
    assert {name: credit.advantage for name, credit in second.items()} == {"proposer": 0.25, "solver": -0.5}
    proposer, solver = agent_samples(traces[0], first, 1.0)
    assert (proposer.reward, set(proposer.advantages)) == (0.0, {0.0, -0.25})
    assert (solver.reward, set(solver.advantages)) == (1.0, {0.0, 0.5})
    assert bytes(solver.token_ids[-1:]) == b"4"
    assert solver.loss_mask.count(1) == 1
    assert proposer.loss_mask.count(1) == len("2+2")


async def test_a_batch_of_games_holds_a_sample_for_each_agent():
    recipe = recipe_from(
        {"model": {"path": "m"}, "environments": [{"name": "g"}], "rl": {"batch_normalisation": True}}, "t"
    )
    traces = await group_of(ProposeAndSolve(), [script("2+2", "4"), script("3+3", "5")])
    made = make_batch(1, [traces], recipe.rl)
    samples = list(samples_of(made.batch))
    assert len(samples) == 4
    assert made.metrics["batch/advantage_std"] == pytest.approx(1.0, abs=1e-4)
    assert sorted(sample.reward for sample in samples) == [0.0, 0.0, 0.5, 1.0]


async def test_an_agent_that_does_not_train_is_context():
    environment = ProposeAndSolve(Agent("solver", trains=False))
    traces = await group_of(environment, [script("2+2", "4"), script("3+3", "5")])
    assert [set(trace.agent_rewards) for trace in traces] == [{"proposer"}] * 2
    assert [trace.reward for trace in traces] == [0.0, 0.5]
    [sample] = agent_samples(traces[0], credits_of(traces, "dr_grpo")[0], 1.0)
    assert sample.loss_mask.count(1) == len("2+2")
    assert check_trainable(traces[0]).agent_rewards == (0.0,)


async def test_another_model_plays_an_agent_without_using_up_budgets_or_being_trained():
    simulated = ScriptedSampler(["123456"], version=9)
    model = Agent("solver", model=Fixed(simulated), sampling=SamplingParameters(temperature=0.1, max_tokens=3))
    sampler = ScriptedSampler(says, version=2)
    trace = await play(ProposeAndSolve(model), sampler, limits=Limits(max_turns=1, max_tokens=20))
    assert trace.failure is None
    assert trace.stop_reason is StopReason.COMPLETED
    assert trace.branches()[1][-1].message.content == "123"  # its own limit cuts it, which truncates nobody
    assert [sampling.temperature for _, sampling in simulated.calls] == [0.1]
    assert len(sampler.calls) == 1
    assert not trace.agents["solver"].trains
    assert check_trainable(trace).min_version == 2


async def test_trouble_of_another_model_is_a_failure_that_names_the_agent():
    model = Agent("solver", model=Fixed(ScriptedSampler([ConnectionError("no route")])))
    trace = await play(ProposeAndSolve(model), ScriptedSampler(says))
    assert (trace.failure.kind, trace.failure.where) == (FailureClass.MODEL, "sample solver")
    assert trace.agents["proposer"].rewards == {}


class ChatServer:
    """Answers chat completions with the number of messages, and counts its open connections."""

    async def __aenter__(self):
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self.complete)
        self.runner = web.AppRunner(app)
        await self.runner.setup()
        site = web.TCPSite(self.runner, "127.0.0.1", 0)
        await site.start()
        self.keys = set()
        self.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}/v1"
        return self

    async def __aexit__(self, *_):
        await self.runner.cleanup()

    @property
    def num_connections(self):
        return len(self.runner.server.connections)

    async def complete(self, request):
        self.keys.add(request.headers.get("Authorization"))
        body = await request.json()
        message = {"role": "assistant", "content": f"{body['model']} saw {len(body['messages'])}"}
        return web.json_response({"choices": [{"message": message, "finish_reason": "stop"}]})


async def test_a_user_is_simulated_by_a_model_behind_an_address(monkeypatch):
    monkeypatch.setenv("SIMULATED_USER_KEY", "secret")
    async with ChatServer() as server:
        model = ChatModel(server.url, "simulated", api_key_variable="SIMULATED_USER_KEY")
        environment = ProposeAndSolve(Agent("solver", model=model))
        traces = await asyncio.gather(*(play(environment, ScriptedSampler(says), attempt) for attempt in range(3)))
        assert {trace.nodes[-1].message.content for trace in traces} == {"simulated saw 2"}
        assert server.keys == {"Bearer secret"}
        async with asyncio.timeout(5):
            while server.num_connections:  # they end with the last rollout
                await asyncio.sleep(0.01)
        again = await play(environment, ScriptedSampler(says))
        assert again.failure is None


async def test_a_key_that_is_missing_is_a_failure_that_names_its_variable():
    model = ChatModel("http://127.0.0.1:9/v1", "simulated", api_key_variable="A_KEY_THAT_NOBODY_SET")
    trace = await play(ProposeAndSolve(Agent("solver", model=model)), ScriptedSampler(says))
    assert "A_KEY_THAT_NOBODY_SET is not set" in trace.failure.message


async def test_a_budget_of_turns_is_that_of_all_agents_the_policy_plays():
    trace = await play(ProposeAndSolve(), ScriptedSampler(says), limits=Limits(max_turns=1))
    assert trace.stop_reason is StopReason.MAX_TURNS
    assert trace.agent_rewards == {"proposer": 0.75, "solver": 0.25}


class Debate(MultiAgent):
    """Both sides speak at once, and hear one another."""

    async def play(self, rollout):
        sides = [rollout.agent("pro"), rollout.agent("con")]
        for _ in range(2):
            await asyncio.gather(*(side.turn() for side in sides))
            for side, other in (sides, sides[::-1]):
                side.append(user(f"The other side: {other.answer}"))


@reward(agent="pro")
def longer(agent_answers):
    return len(agent_answers["pro"]) - len(agent_answers["con"])


@reward(agent="con")
def shorter(agent_answers):
    return len(agent_answers["con"]) - len(agent_answers["pro"])


def debate(rubric=Rubric([longer, shorter])):
    return Debate(name="debate", agents=[Agent("pro"), Agent("con")], rubric=rubric, train=[TASK])


async def test_agents_that_speak_at_once_keep_their_conversations_apart():
    trace = await play(debate(), ScriptedSampler(lambda branch: f"I have heard {len(branch)}", seconds=0.01))
    assert trace.failure is None
    for branch in trace.branches():
        speakers = {node.agent for node in branch if node.turn is not None}
        assert len(speakers) == 1
        assert [node.message.role for node in branch] == ["user", "assistant", "user", "assistant", "user"]
    assert {node.agent for node in trace.nodes} == {"", "pro", "con"}


async def test_a_group_reward_is_common_to_all_agents():
    @group_reward
    def diverse(answers):
        return [1.0 for _ in answers]

    traces = await run_group(
        debate(Rubric([longer, shorter, diverse])), TASK, [0, 1], ScriptedSampler(["a"]), SAMPLING, 0
    )
    assert [trace.agent_rewards for trace in traces] == [{"pro": 1.0, "con": 1.0}] * 2


async def test_a_game_in_which_nobody_who_trains_spoke_cannot_be_trained():
    class Silent(Debate):
        async def play(self, rollout):
            rollout.agent("pro").append(user("Never mind."))

    silent = Silent(name="debate", agents=[Agent("pro"), Agent("con")], rubric=Rubric([longer, shorter]), train=[TASK])
    with pytest.raises(UntrainableTraceError, match="nothing to train"):
        check_trainable(await play(silent, ScriptedSampler(["a"])))


def test_a_declaration_that_cannot_work_is_refused():
    rubric = Rubric([longer, shorter])
    for agents, complaint in [
        ([Agent("pro"), Agent("pro")], "two agents have the same name"),
        ([Agent("pro"), Agent("contra")], "a reward is for agent 'con'; there are pro, contra"),
        ([Agent("pro", trains=False), Agent("con", model=Fixed(ScriptedSampler(["a"])))], "no agent trains"),
    ]:
        with pytest.raises(ValueError, match=complaint):
            Debate(name="debate", agents=agents, rubric=rubric, train=[])
    with pytest.raises(ValueError, match="whose sampling the run decides"):
        Agent("pro", sampling=SamplingParameters(temperature=0.5))


async def test_an_agent_that_is_not_declared_is_named():
    class Confused(Debate):
        async def play(self, rollout):
            rollout.agent("judge")

    agents = [Agent("pro"), Agent("con")]
    confused = Confused(name="debate", agents=agents, rubric=Rubric([longer, shorter]), train=[TASK])
    trace = await play(confused, ScriptedSampler(["a"]))
    assert "there is no agent 'judge' in this rollout; there are pro, con" in trace.failure.message
