"""The proxy as real client libraries meet it, and what the trace holds afterwards."""

import asyncio
import contextlib
import json

import aiohttp
import anthropic
import msgspec
import openai
import pytest
from policies import check_tokens

from hone.envs import (
    FailureClass,
    Limits,
    Rollout,
    RolloutFailure,
    Rubric,
    StopReason,
    Task,
    assistant,
    reward,
    run_group,
    run_rollout,
    system,
    user,
)
from hone.envs.harness import Endpoint, SdkHarness, proxy
from hone.envs.rollout import underway
from hone.inference.client import EngineLost
from hone.orchestrator.samples import training_samples
from hone.schema.sampling import SamplingParameters

SAMPLING = SamplingParameters(temperature=0.7, max_tokens=200)
ADD = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
    "required": ["a", "b"],
}
OPENAI_TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": ADD}}]
RESPONSES_TOOLS = [{"type": "function", "name": "add", "description": "Adds.", "parameters": ADD, "strict": False}]
ANTHROPIC_TOOLS = [{"name": "add", "description": "Adds.", "input_schema": ADD}]
QUESTION = [{"role": "user", "content": "Add 2 and 3."}]
CALLS = (
    "<think>\ntwo at once\n</think>\n\nLet me see.\n"
    '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call>\n'
    '<tool_call>\n{"name": "add", "arguments": {"a": 0, "b": 5}}\n</tool_call>'
)


@reward
def exact(answer, reference):
    return answer.strip() == reference


def harness(agent, **settings):
    task = Task(prompt=(user("Add 2 and 3."),), reference="5")
    return SdkHarness(name="sums", rubric=Rubric([exact]), train=[task], agent=agent, grace_seconds=0.5, **settings)


async def run(agent, policy, *, limits=Limits(), sampling=SAMPLING, **settings):
    environment = harness(agent, **settings)
    return await run_rollout(environment, environment.train_task(0), 0, policy, sampling, 7, limits, group="g")


def openai_client(endpoint):
    return openai.AsyncOpenAI(base_url=endpoint.base_url, api_key=endpoint.api_key)


def anthropic_client(endpoint):
    return anthropic.AsyncAnthropic(base_url=endpoint.anthropic_base_url, api_key=endpoint.api_key)


def calls_then_answers(prompt):
    return "5" if "<tool_response>" in prompt else CALLS


async def ask_openai(client, messages, *, stream, **settings):
    """The assistant's message as the program keeps it."""
    if not stream:
        answer = await client.chat.completions.create(model="m", messages=messages, **settings)
        return answer.choices[0].message.model_dump(exclude_none=True)
    said = {"role": "assistant", "content": ""}
    async for chunk in await client.chat.completions.create(model="m", messages=messages, stream=True, **settings):
        delta = chunk.choices[0].delta
        said["content"] += delta.content or ""
        for call in delta.tool_calls or ():
            said.setdefault("tool_calls", []).append(call.model_dump(exclude={"index"}))
    return said


async def ask_anthropic(client, messages, *, stream, **settings):
    if stream:
        async with client.messages.stream(model="m", max_tokens=9, messages=messages, **settings) as events:
            return await events.get_final_message()
    return await client.messages.create(model="m", max_tokens=9, messages=messages, **settings)


@pytest.mark.parametrize("stream", [False, True])
async def test_openai_calls_with_tools_become_turns_of_one_branch(policy, stream):
    async def agent(rollout, endpoint):
        async with openai_client(endpoint) as client:
            messages = list(QUESTION)
            said = await ask_openai(client, messages, stream=stream, tools=OPENAI_TOOLS)
            calls = said["tool_calls"]
            assert [json.loads(call["function"]["arguments"]) for call in calls] == [{"a": 2, "b": 3}, {"a": 0, "b": 5}]
            messages += [said, *({"role": "tool", "content": "5", "tool_call_id": call["id"]} for call in calls)]
            said = await ask_openai(client, messages, stream=stream, tools=OPENAI_TOOLS)
            messages += [said, {"role": "user", "content": "Are you sure?"}]
            await ask_openai(client, messages, stream=stream, tools=OPENAI_TOOLS)

    trace = await run(agent, policy := policy(calls_then_answers))
    assert trace.reward == 1
    assert [node.parent for node in trace.nodes] == [None, 0, 1, 2, 3, 4, 5, 6][: len(trace.nodes)]
    assert [message.role for message in trace.messages] == [
        "user",
        "assistant",
        "tool",
        "tool",
        "assistant",
        "user",
        "assistant",
    ]
    assert trace.nodes[1].message.reasoning == "two at once"
    check_tokens(trace, policy)
    assert trace.metrics["num_branches"] == len(training_samples(trace, 1.0, 1.0, 1.0)) == 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("thinking", [False, True])
async def test_anthropic_calls_with_tools_become_turns_of_one_branch(policy, stream, thinking):
    settings = {"thinking": {"type": "enabled", "budget_tokens": 1024}} if thinking else {}

    async def agent(rollout, endpoint):
        async with anthropic_client(endpoint) as client:
            messages = list(QUESTION)
            said = await ask_anthropic(
                client, messages, stream=stream, tools=ANTHROPIC_TOOLS, system="Be brief.", **settings
            )
            assert said.stop_reason == "tool_use"
            assert [block.type for block in said.content] == ["thinking"] * thinking + ["text", "tool_use", "tool_use"]
            calls = said.content[-2:]
            assert [call.input for call in calls] == [{"a": 2, "b": 3}, {"a": 0, "b": 5}]
            results = [{"type": "tool_result", "tool_use_id": call.id, "content": "5"} for call in calls]
            messages += [{"role": "assistant", "content": said.content}]
            messages += [{"role": "user", "content": [*results, {"type": "text", "text": "Go on."}]}]
            blocks = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
            said = await ask_anthropic(
                client, messages, stream=stream, tools=ANTHROPIC_TOOLS, system=blocks, **settings
            )
            assert (said.stop_reason, said.content[0].text) == ("end_turn", "5")
            assert said.usage.output_tokens == 2
            assert said.usage.input_tokens > 50

    trace = await run(agent, policy := policy(calls_then_answers))
    assert trace.reward == 1
    question, *conversation = trace.messages
    assert question == trace.task.prompt[0]
    assert [message.role for message in conversation] == [
        "system",
        "user",
        "assistant",
        "tool",
        "tool",
        "user",
        "assistant",
    ]
    assert [node.parent for node in trace.nodes] == [None, None, 1, 2, 3, 4, 5, 6]
    check_tokens(trace, policy)
    [sample] = training_samples(trace, 1.0, 1.0, 1.0)
    assert sum(sample.loss_mask) == trace.num_completion_tokens


@pytest.mark.parametrize("stream", [False, True])
async def test_openai_responses_with_tools_become_turns_of_one_branch(policy, stream):
    async def ask(client, history):
        settings = {"model": "m", "input": history, "instructions": "Be brief.", "tools": RESPONSES_TOOLS}
        if not stream:
            return await client.responses.create(**settings)
        async with client.responses.stream(**settings) as events:
            kinds = [event.type async for event in events]
            assert (kinds[0], kinds[-1]) == ("response.created", "response.completed")
            return await events.get_final_response()

    async def agent(rollout, endpoint):
        async with openai_client(endpoint) as client:
            history = list(QUESTION)
            said = await ask(client, history)
            assert [item.type for item in said.output] == ["reasoning", "message", "function_call", "function_call"]
            calls = said.output[-2:]
            assert [json.loads(call.arguments) for call in calls] == [{"a": 2, "b": 3}, {"a": 0, "b": 5}]
            history += [item.model_dump(exclude_none=True, exclude={"parsed_arguments"}) for item in said.output]
            history += [{"type": "function_call_output", "call_id": call.call_id, "output": "5"} for call in calls]
            said = await ask(client, history)
            assert (said.output_text, said.status, said.usage.output_tokens) == ("5", "completed", 2)
            history += [*said.output, {"role": "user", "content": [{"type": "input_text", "text": "Are you sure?"}]}]
            await ask(client, history)

    trace = await run(agent, policy := policy(calls_then_answers))
    assert trace.reward == 1
    assert [message.role for message in trace.messages[1:]] == [
        *("system", "user", "assistant", "tool", "tool", "assistant", "user", "assistant")
    ]
    assert len(trace.branches()) == 2
    check_tokens(trace, policy)


async def test_responses_that_would_need_a_memory_are_refused(policy):
    async def agent(rollout, endpoint):
        async with openai_client(endpoint) as client:
            said = await client.responses.create(model="m", input="hello", tool_choice="none", tools=RESPONSES_TOOLS)
            with pytest.raises(openai.BadRequestError, match="send the whole input"):
                await client.responses.create(model="m", input="go on", previous_response_id=said.id)
            with pytest.raises(openai.BadRequestError, match="'web_search'"):
                await client.responses.create(model="m", input="hello", tools=[{"type": "web_search"}])
            picture = [{"role": "user", "content": [{"type": "input_image", "image_url": "x", "detail": "auto"}]}]
            with pytest.raises(openai.BadRequestError, match="'input_image'"):
                await client.responses.create(model="m", input=picture)
            with pytest.raises(openai.BadRequestError, match="'item_reference'"):
                await client.responses.create(model="m", input=[{"type": "item_reference", "id": "x"}])

    trace = await run(agent, policy(lambda prompt: CALLS if "Adds." in prompt else "5"))
    assert (trace.reward, len(trace.turns)) == (1, 1)


async def test_the_dialects_continue_one_another(policy):
    async def agent(rollout, endpoint):
        messages = list(QUESTION)
        async with openai_client(endpoint) as client:
            messages += [await ask_openai(client, messages, stream=False), {"role": "user", "content": "Sure?"}]
            messages = [{key: message[key] for key in ("role", "content")} for message in messages]
            said = await client.responses.create(model="m", input=messages)
            messages += [{"role": "assistant", "content": said.output_text}, {"role": "user", "content": "Really?"}]
        async with anthropic_client(endpoint) as client:
            await ask_anthropic(client, messages, stream=True)

    trace = await run(agent, policy := policy(lambda prompt: "5"))
    assert (len(trace.branches()), len(trace.turns)) == (1, 3)
    check_tokens(trace, policy)


async def test_sub_agents_that_run_at_once_are_branches_of_their_own(policy):
    async def sub_agent(client, number):
        messages = [{"role": "system", "content": "You are a helpful agent."}]
        for turn in range(3):
            messages.append({"role": "user", "content": f"Add {number} and {turn}."})
            messages.append(await ask_openai(client, messages, stream=bool(number % 2)))

    async def agent(rollout, endpoint):
        async with openai_client(endpoint) as client:
            await asyncio.gather(*(sub_agent(client, number) for number in range(4)))

    policy = policy(lambda prompt: "5")
    policy.engine.before = lambda: asyncio.sleep(0.01)
    trace = await run(agent, policy)
    assert len(trace.turns) == 12
    assert [len(branch) for branch in trace.branches()] == [1, 7, 7, 7, 7]
    assert sum(message.role == "system" for message in trace.messages) == 1
    check_tokens(trace, policy)
    assert trace.metrics["num_branches"] == len(training_samples(trace, 1.0, 1.0, 1.0)) == 4


async def test_a_turn_runs_in_the_context_of_its_rollout(policy):
    seen = []

    class Watching:
        async def sample(self, branch, tools, sampling):
            seen.append((underway.get().rollout.attempt, branch[-1].message.content))
            return await scripted.sample(branch, tools, sampling)

    async def agent(rollout, endpoint):
        async with openai_client(endpoint) as client:
            await ask_openai(client, [{"role": "user", "content": str(rollout.attempt)}], stream=False)

    scripted = policy(lambda prompt: "5")
    environment = harness(agent)
    await run_group(environment, environment.train_task(0), [0, 1, 2], Watching(), SAMPLING, 7)
    assert sorted(seen) == [(0, "0"), (1, "1"), (2, "2")]


async def test_a_compacted_history_is_a_branch_and_shared_turns_train_once(policy):
    async def agent(rollout, endpoint):
        async with openai_client(endpoint) as client:
            messages = list(QUESTION)
            for _ in range(3):
                messages += [await ask_openai(client, messages, stream=False), {"role": "user", "content": "Go on."}]
            summary = {"role": "user", "content": "Until now: nothing."}
            await ask_openai(client, [*messages[:2], summary, *messages[4:]], stream=False)
            await ask_openai(client, [summary], stream=False)

    trace = await run(agent, policy := policy(lambda prompt: "5"))
    assert len(trace.branches()) == 3
    check_tokens(trace, policy)
    assert trace.metrics["num_branches"] == len(training_samples(trace, 1.0, 1.0, 1.0)) == 3


async def test_a_program_that_asks_twice_gets_two_turns_with_seeds_of_their_own(policy):
    async def agent(rollout, endpoint):
        async with openai_client(endpoint) as client:
            await asyncio.gather(*(ask_openai(client, QUESTION, stream=False) for _ in range(3)))

    first = policy(lambda prompt: "5")
    trace = await run(agent, first)
    assert [node.parent for node in trace.nodes] == [None, 0, 0, 0]
    check_tokens(trace, first)
    seeds = [sampling.seed for sampling in first.engine.samplings]
    assert len(set(seeds)) == 3
    await run(agent, second := policy(lambda prompt: "5"))
    assert [sampling.seed for sampling in second.engine.samplings] == seeds


async def test_the_seed_of_a_call_does_not_depend_on_which_call_comes_first(policy):
    def agent(questions):
        async def ask(rollout, endpoint):
            async with openai_client(endpoint) as client:
                for question in questions:
                    await ask_openai(client, [{"role": "user", "content": question}], stream=False)

        return ask

    await run(agent(["yes", "no"]), first := policy(lambda prompt: "5"))
    await run(agent(["no", "yes"]), second := policy(lambda prompt: "5"))
    seeds = [sampling.seed for sampling in first.engine.samplings]
    assert [sampling.seed for sampling in second.engine.samplings] == seeds[::-1]


async def test_sampling_is_the_rollouts_and_stop_strings_are_the_programs(policy):
    async def agent(rollout, endpoint):
        async with openai_client(endpoint) as client:
            await ask_openai(client, QUESTION, stream=False, temperature=0, max_tokens=1, stop=["Obs:"], seed=1)
        async with anthropic_client(endpoint) as client:
            await ask_anthropic(client, QUESTION, stream=False, stop_sequences=["a", "b"])

    trace = await run(agent, policy := policy(lambda prompt: "5"))
    assert trace.failure is None
    assert {(s.temperature, s.max_tokens) for s in policy.engine.samplings} == {(0.7, 200)}
    assert [s.stop for s in policy.engine.samplings] == [("Obs:",), ("a", "b")]


async def test_what_a_policy_is_not_held_to_is_noted(policy):
    async def agent(rollout, endpoint):
        async with openai_client(endpoint) as client:
            format = {"type": "json_object"}
            await ask_openai(
                client, QUESTION, stream=False, tools=OPENAI_TOOLS, tool_choice="required", response_format=format
            )

    trace = await run(agent, policy(lambda prompt: "5"))
    assert trace.info["harness"]["not_enforced"] == ["response_format", "tool_choice"]
    assert trace.info["harness"]["tools_of_roots"]["0"][0]["name"] == "add"


async def test_tools_that_may_not_be_called_are_not_shown(policy):
    async def agent(rollout, endpoint):
        async with openai_client(endpoint) as client:
            await ask_openai(client, QUESTION, stream=False, tools=OPENAI_TOOLS, tool_choice="none")

    trace = await run(agent, policy(lambda prompt: CALLS if "Adds." in prompt else "5"))
    assert trace.reward == 1


def catching(kind, failures, ask):
    """An agent that asks until it is refused, and remembers the errors."""

    async def agent(rollout, endpoint):
        for _ in range(10):
            try:
                await ask(endpoint)
            except kind as error:
                failures.append(error)
                return

    return agent


async def one_openai_call(endpoint, stream=False):
    async with openai_client(endpoint) as client:
        await ask_openai(client, QUESTION, stream=stream, tools=OPENAI_TOOLS)


async def one_response(endpoint, stream=False):
    async with openai_client(endpoint) as client:
        answer = await client.responses.create(model="m", input=QUESTION, tools=RESPONSES_TOOLS, stream=stream)
        if stream:
            assert [event async for event in answer]


async def one_anthropic_call(endpoint, stream=False):
    async with anthropic_client(endpoint) as client:
        await ask_anthropic(client, QUESTION, stream=stream, tools=ANTHROPIC_TOOLS)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("limits", "reason", "num_turns"),
    [
        (Limits(max_turns=2), StopReason.MAX_TURNS, 2),
        (Limits(max_tokens=250), StopReason.MAX_TOKENS, 2),
        (Limits(max_tool_calls=5), StopReason.MAX_TOOL_CALLS, 3),
        (Limits(budget_seconds=0.0), StopReason.TIMEOUT, 0),
    ],
)
@pytest.mark.parametrize(
    ("ask", "kind"),
    [
        (one_openai_call, openai.PermissionDeniedError),
        (one_response, openai.PermissionDeniedError),
        (one_anthropic_call, anthropic.PermissionDeniedError),
    ],
)
async def test_budgets_refuse_turns_with_an_error_that_is_not_retried(
    policy, limits, reason, num_turns, stream, ask, kind
):
    failures = []
    agent = catching(kind, failures, lambda endpoint: ask(endpoint, stream))
    trace = await run(agent, policy(lambda prompt: CALLS), limits=limits)
    assert (trace.failure, trace.stop_reason, len(trace.turns)) == (None, reason, num_turns)
    assert trace.is_truncated
    if reason is not StopReason.TIMEOUT:  # which ends the program, whatever it does
        assert f"the rollout has ended ({reason})" in str(failures[0])


async def test_a_turn_that_is_cut_truncates_the_rollout(policy):
    failures = []
    agent = catching(openai.PermissionDeniedError, failures, one_openai_call)
    trace = await run(agent, policy(lambda prompt: CALLS), sampling=SamplingParameters(max_tokens=10))
    assert (trace.stop_reason, len(trace.turns), len(failures)) == (StopReason.MAX_TOKENS, 1, 1)


async def test_a_program_may_write_down_what_it_has_after_a_refusal_but_not_go_on_for_long(policy):
    done = []

    async def agent(rollout, endpoint):
        await one_openai_call(endpoint)
        with pytest.raises(openai.PermissionDeniedError):
            await one_openai_call(endpoint)
        done.append("saved")
        try:
            await asyncio.sleep(60)
        finally:
            done.append("ended")

    trace = await run(agent, policy(lambda prompt: "5"), limits=Limits(max_turns=1))
    assert (trace.stop_reason, trace.reward, done) == (StopReason.MAX_TURNS, 1, ["saved", "ended"])


async def test_a_program_that_fails_because_it_was_refused_has_not_crashed(policy):
    async def agent(rollout, endpoint):
        for _ in range(2):
            await one_openai_call(endpoint)

    trace = await run(agent, policy(lambda prompt: "5"), limits=Limits(max_turns=1))
    assert (trace.stop_reason, trace.failure) == (StopReason.MAX_TURNS, None)


async def test_an_engine_that_is_lost_fails_the_rollout_and_ends_the_program(policy):
    ended = []

    async def agent(rollout, endpoint):
        try:
            with contextlib.suppress(openai.InternalServerError):
                await one_openai_call(endpoint)
            await asyncio.sleep(60)
        finally:
            ended.append(endpoint)

    trace = await run(agent, policy(lambda prompt: EngineLost("no route")))
    assert (trace.failure.kind, len(ended)) == (FailureClass.MODEL, 1)
    assert "no route" in trace.failure.message


@pytest.mark.parametrize("keep_alive_seconds", [5.0, 0.02])  # an error by its status, and one in a stream under way
@pytest.mark.parametrize(
    ("ask", "kind"),
    [
        (one_openai_call, openai.APIError),
        (one_response, openai.APIError),
        (one_anthropic_call, anthropic.APIError),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_failed_turn_is_an_error_that_is_not_retried(
    policy, monkeypatch, keep_alive_seconds, ask, kind, stream
):
    monkeypatch.setattr(proxy, "KEEP_ALIVE_SECONDS", keep_alive_seconds)
    scripted = policy(lambda prompt: EngineLost("no route"))
    scripted.engine.before = lambda: asyncio.sleep(0.1)
    rollout = Rollout(Task(prompt=(user("Add 2 and 3."),)), 0, scripted, SAMPLING, 7)
    async with proxy.proxy_of_this_loop().record(rollout) as recorder:
        with pytest.raises(kind, match="no route"):
            await ask(Endpoint(proxy.proxy_of_this_loop().address, recorder.api_key, "m"), stream)
    assert len(scripted.engine.prompts) == 1


async def test_a_key_of_no_rollout_is_refused_in_the_dialect_of_the_client(policy):
    async def agent(rollout, endpoint):
        await one_openai_call(endpoint)
        for key in ("", "sk-1-2", "none", endpoint.api_key[:-1], endpoint.api_key + "x", "sk-" + "é" * 9):
            other = Endpoint(endpoint.address, key or "-", endpoint.model)
            with pytest.raises((openai.AuthenticationError, UnicodeEncodeError)):
                await one_openai_call(other)
            with pytest.raises((anthropic.AuthenticationError, UnicodeEncodeError)):
                await one_anthropic_call(other)

    assert (await run(agent, policy(lambda prompt: "5"))).reward == 1


async def test_a_key_opens_its_own_rollout_only_and_only_while_it_runs(policy):
    endpoints = []

    async def agent(rollout, endpoint):
        endpoints.append(endpoint)
        async with openai_client(endpoint) as client:
            await ask_openai(client, [{"role": "user", "content": f"attempt {rollout.attempt}"}], stream=False)
        if rollout.attempt == 1:
            await asyncio.sleep(0.05)  # the first is over by now
            with pytest.raises(openai.AuthenticationError):
                await one_openai_call(endpoints[0])

    environment = harness(agent)
    task = environment.train_task(0)
    traces = await run_group(environment, task, [0, 1], policy(lambda prompt: "5"), SAMPLING, 7)
    assert len({endpoint.api_key for endpoint in endpoints}) == 2
    assert len({endpoint.address for endpoint in endpoints}) == 1
    assert [trace.failure for trace in traces] == [None, None]
    assert [trace.messages[1].content for trace in traces] == ["attempt 0", "attempt 1"]
    async with openai.AsyncOpenAI(base_url=endpoints[0].base_url, api_key="-", max_retries=0) as client:
        with pytest.raises(openai.APIConnectionError):  # nobody needs the server any more
            await client.models.list()


async def test_bad_requests_are_told_what_is_wrong_and_cost_nothing(policy):
    bad = [
        ({"messages": []}, "no messages"),
        ({"messages": [{"role": "function", "content": "x"}]}, "role 'function'"),
        ({"messages": [*QUESTION, {"role": "assistant", "content": "The answer"}]}, "last message is the assistant's"),
        ({"messages": QUESTION, "n": 2}, "n = 2"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "'image_url'"),
        ({"messages": QUESTION, "tools": [{"type": "web_search"}]}, "'web_search'"),
        ({"messages": "hello"}, "Expected `array`"),
        ({"messages": [{"role": "user", "content": 7}]}, r"$.messages[0].content"),
    ]

    async def agent(rollout, endpoint):
        headers = {"Authorization": f"Bearer {endpoint.api_key}"}
        async with aiohttp.ClientSession(headers=headers) as session:
            for body, complaint in bad:
                async with session.post(endpoint.base_url + "/chat/completions", json=body) as answer:
                    error = (await answer.json())["error"]
                    assert (answer.status, error["type"]) == (400, "invalid_request_error")
                    assert complaint in error["message"]
            for body, _ in bad[:3] + bad[-2:]:
                async with session.post(endpoint.address + "/v1/messages", json=body) as answer:
                    error = await answer.json()
                    assert (answer.status, error["type"]) == (400, "error")
                    assert error["error"]["type"] == "invalid_request_error"
            async with session.post(endpoint.base_url + "/chat/completions", data=b"{") as answer:
                assert answer.status == 400
            async with session.post(endpoint.base_url + "/images", json={}) as answer:
                assert answer.status == 404
        await one_openai_call(endpoint)

    trace = await run(agent, policy(lambda prompt: "5"))
    assert (trace.reward, len(trace.turns), len(trace.nodes)) == (1, 1, 2)


async def test_a_client_that_goes_away_gives_up_its_turn(policy):
    given_up = asyncio.Event()

    async def slow():
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            given_up.set()
            raise

    scripted = policy(lambda prompt: "5")
    scripted.engine.before = slow

    async def agent(rollout, endpoint):
        for stream in (False, True):
            given_up.clear()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await one_openai_call(endpoint, stream)
            async with asyncio.timeout(5):
                await given_up.wait()
        scripted.engine.before = None
        await one_openai_call(endpoint)

    trace = await run(agent, scripted)
    assert (trace.failure, len(trace.turns), trace.reward) == (None, 1, 1)


async def test_a_program_that_ends_gives_up_its_turns(policy):
    async def agent(rollout, endpoint):
        await one_openai_call(endpoint)
        scripted.engine.before = lambda: asyncio.sleep(60)
        calls.append(asyncio.create_task(one_openai_call(endpoint)))
        await asyncio.sleep(0.2)

    calls = []
    scripted = policy(lambda prompt: "5")
    trace = await run(agent, scripted)
    assert (trace.failure, len(trace.turns), len(scripted.engine.prompts)) == (None, 1, 2)
    with pytest.raises(openai.PermissionDeniedError, match="the rollout is over"):
        await calls[0]


@pytest.mark.parametrize("ask", [one_openai_call, one_response, one_anthropic_call])
async def test_a_stream_that_waits_for_long_is_kept_alive(policy, monkeypatch, ask):
    monkeypatch.setattr(proxy, "KEEP_ALIVE_SECONDS", 0.02)
    scripted = policy(lambda prompt: "5")
    scripted.engine.before = lambda: asyncio.sleep(0.2)
    trace = await run(lambda rollout, endpoint: ask(endpoint, stream=True), scripted)
    assert (trace.reward, len(scripted.engine.prompts)) == (1, 1)


async def test_tokens_are_counted_about_right_and_cost_no_turn(policy):
    async def agent(rollout, endpoint):
        async with anthropic_client(endpoint) as client:
            messages = [
                {"role": "user", "content": "Add the numbers, call the tool, and say what the result is. " * 20}
            ]
            before = await client.messages.count_tokens(model="m", messages=messages)
            said = await client.messages.create(model="m", max_tokens=9, messages=messages)
            assert said.usage.input_tokens == pytest.approx(before.input_tokens, rel=0.5)
            messages += [{"role": "assistant", "content": said.content}, {"role": "user", "content": "Go on."}]
            before = await client.messages.count_tokens(model="m", messages=messages)
            said = await client.messages.create(model="m", max_tokens=9, messages=messages)
            assert said.usage.input_tokens == pytest.approx(before.input_tokens, abs=12)

    trace = await run(agent, policy(lambda prompt: "5"))
    assert (trace.failure, len(trace.turns)) == (None, 2)


async def test_models_are_listed_in_both_dialects(policy):
    async def agent(rollout, endpoint):
        async with openai_client(endpoint) as client:
            assert [model.id async for model in client.models.list()] == ["policy"]
            assert (await client.models.retrieve("openai/any")).id == "openai/any"
        async with anthropic_client(endpoint) as client:
            assert [model.id async for model in client.models.list()] == ["policy"]
        async with openai.AsyncOpenAI(base_url=endpoint.base_url, api_key="-") as client:
            with pytest.raises(openai.AuthenticationError):
                await client.models.list()
        await one_openai_call(endpoint)

    assert (await run(agent, policy(lambda prompt: "5"))).reward == 1


async def test_a_program_that_takes_no_turn_is_a_failure_of_the_harness(policy):
    async def agent(rollout, endpoint):
        pass

    for on_crash in ("fail", "score"):
        trace = await run(agent, policy(lambda prompt: "5"), on_crash=on_crash)
        assert trace.failure.kind is FailureClass.HARNESS
        assert "took no turn" in trace.failure.message


@pytest.mark.parametrize("error", [KeyError, SystemExit, asyncio.CancelledError, TimeoutError])
async def test_an_error_of_the_agent_is_a_failure_of_the_harness(policy, error):
    async def agent(rollout, endpoint):
        await one_openai_call(endpoint)
        raise error

    trace = await run(agent, policy(lambda prompt: "5"))
    assert trace.failure.kind is FailureClass.HARNESS
    assert error.__name__ in trace.failure.message


async def test_a_failure_that_the_agent_names_itself_keeps_its_class(policy):
    async def agent(rollout, endpoint):
        await one_openai_call(endpoint)
        raise RolloutFailure(FailureClass.TOOL, "search", "it is down")

    trace = await run(agent, policy(lambda prompt: "5"), on_crash="score")
    assert trace.failure.kind is FailureClass.TOOL


async def test_a_crash_fails_the_rollout_or_is_scored_by_choice(policy):
    async def agent(rollout, endpoint):
        await one_openai_call(endpoint)
        raise KeyError("a bug of the agent")

    trace = await run(agent, policy(lambda prompt: "5"))
    assert trace.failure.kind is FailureClass.HARNESS
    assert "a bug of the agent" in trace.failure.message
    trace = await run(agent, policy(lambda prompt: "5"), on_crash="score")
    assert (trace.failure, trace.reward) == (None, 1)
    assert "a bug of the agent" in trace.info["crash"]


async def test_a_program_that_hangs_is_ended_by_the_budget_of_time_or_fails_at_the_deadline(policy):
    async def agent(rollout, endpoint):
        await one_openai_call(endpoint)
        await asyncio.sleep(60)

    trace = await run(agent, policy(lambda prompt: "5"), limits=Limits(budget_seconds=0.3))
    assert (trace.stop_reason, trace.reward) == (StopReason.TIMEOUT, 1)
    trace = await run(agent, policy(lambda prompt: "5"), limits=Limits(deadline_seconds=0.3))
    assert trace.failure.kind is FailureClass.TIMEOUT


async def test_a_program_that_begins_with_the_tasks_prompt_continues_it(policy):
    async def agent(rollout, endpoint):
        messages = [msgspec.to_builtins(message) for message in rollout.task.prompt]
        async with openai_client(endpoint) as client:
            await ask_openai(client, messages, stream=False)

    trace = await run(agent, policy(lambda prompt: "5"))
    assert [(node.parent, node.message) for node in trace.nodes] == [
        (None, user("Add 2 and 3.")),
        (0, assistant("5")),
    ]
    assert system("x") not in trace.messages
