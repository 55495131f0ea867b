import asyncio
import json
import time

import openai
import pytest
from served import ADD, CALLING, GREETING, fetch, prepare, running, start

from hone.inference.client import AdminClient, ChatSampler, EngineRefused, TokenChannel, TokenSampler
from hone.inference.server.serve import secret
from hone.model.checkpoint import load_model, save_model
from hone.schema.messages import Message
from hone.schema.sampling import FinishReason, SamplingParameters
from hone.schema.traces import Node
from hone.text.rendering import Renderer
from hone.text.tokenizer import Tokenizer

HI = [{"role": "user", "content": "hi"}]
TOOLS = [
    {"type": "function", "function": {"name": "add", "description": ADD.description, "parameters": ADD.parameters}}
]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    run = prepare(tmp_path_factory.mktemp("run"), admin_port=0, admin_token_variable="ADMIN_TOKEN")
    with running(run, environment={"ADMIN_TOKEN": "secret"}) as served:
        yield served


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=server.api, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def tokenizer(server):
    return Tokenizer.load(server.folder.model)


def chat(client, **changes):
    return client.chat.completions.create(**{"model": "tiny", "messages": HI, "temperature": 0} | changes)


def drained(server) -> bool:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        health = server.health()
        if (health["running"], health["waiting"], health["kv_usage"]) == (0, 0, 0):
            return True
        time.sleep(0.02)
    return False


def test_a_chat_answers_with_reasoning_content_and_usage(client):
    answer = chat(client)
    [choice] = answer.choices
    assert (choice.message.content, choice.message.reasoning_content) == ("Hello there, friend!", "hm")
    assert (choice.finish_reason, answer.model, answer.object) == ("stop", "tiny", "chat.completion")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_streamed_chat_adds_up_to_the_same_answer(client):
    whole = chat(client)
    content, reasoning, usage, reasons = "", "", None, []
    for chunk in chat(client, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            content += choice.delta.content or ""
            reasoning += getattr(choice.delta, "reasoning_content", None) or ""
            reasons += [choice.finish_reason] if choice.finish_reason else []
    assert (content, reasoning, reasons) == ("Hello there, friend!", "hm", ["stop"])
    assert usage.completion_tokens == whole.usage.completion_tokens


def test_a_tool_call_is_parsed(client):
    answer = chat(client, messages=[{"role": "user", "content": "add"}], tools=TOOLS)
    [choice] = answer.choices
    [call] = choice.message.tool_calls
    assert (call.function.name, call.function.arguments) == ("add", '{"a": 1}')
    assert (choice.message.content, choice.finish_reason) == ("Sure.", "tool_calls")


def test_a_tool_call_is_parsed_from_a_stream(client):
    calls, reasons = [], []
    for chunk in chat(client, messages=[{"role": "user", "content": "add"}], tools=TOOLS, stream=True):
        for choice in chunk.choices:
            calls += choice.delta.tool_calls or []
            reasons += [choice.finish_reason] if choice.finish_reason else []
    assert [(c.index, c.function.name, c.function.arguments) for c in calls] == [(0, "add", '{"a": 1}')]
    assert reasons == ["tool_calls"]


def test_an_answer_can_be_sent_back_with_the_result_of_its_tool(client):
    message = chat(client, messages=[{"role": "user", "content": "add"}], tools=TOOLS).choices[0].message
    history = [{"role": "user", "content": "add"}, message, {"role": "tool", "content": "2", "tool_call_id": "x"}]
    history.append({"role": "user", "content": [{"type": "text", "text": "hi"}]})
    assert chat(client, messages=history, tools=TOOLS, max_tokens=3).usage.prompt_tokens > 300


def test_token_ids_and_versions_come_on_request(client, tokenizer):
    answer = chat(client, extra_body={"return_token_ids": True})
    [choice] = answer.choices
    assert tokenizer.decode(answer.prompt_token_ids).endswith("<|im_start|>assistant\n")
    assert "Hello there, friend!" in tokenizer.decode(choice.token_ids)
    assert choice.policy_versions == [[0, len(choice.token_ids)]]


def test_a_prompt_of_token_ids_continues_as_its_text_would(client, tokenizer):
    prompt = chat(client, extra_body={"return_token_ids": True}).prompt_token_ids
    answer = client.completions.create(model="tiny", prompt=prompt, temperature=0, max_tokens=50)
    assert answer.choices[0].text == "<think>\nhm\n</think>\n\nHello there, friend!"
    text = client.completions.create(model="tiny", prompt=tokenizer.decode(prompt), temperature=0, max_tokens=50)
    assert text.choices[0].text == answer.choices[0].text


def test_several_prompts_and_choices_come_in_order(client):
    answer = client.completions.create(model="tiny", prompt=[[5, 6], [7, 8, 9]], n=2, max_tokens=3, seed=1)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage.prompt_tokens == 5
    assert answer.choices[0].text != answer.choices[1].text


def test_a_streamed_completion_adds_up_to_the_same_text(client):
    settings = {"model": "tiny", "prompt": [5, 6], "max_tokens": 30, "seed": 3, "temperature": 2.0}
    whole = client.completions.create(**settings).choices[0]
    chunks = [chunk.choices[0] for chunk in client.completions.create(**settings, stream=True)]
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert chunks[-1].finish_reason == whole.finish_reason


def test_a_seed_repeats_a_choice_whatever_runs_beside_it(client):
    sampled = {"temperature": 3.0, "seed": 11, "max_tokens": 12, "extra_body": {"return_token_ids": True}}
    alone = chat(client, **sampled).choices[0].token_ids
    beside = chat(client, **sampled, n=5).choices
    assert beside[0].token_ids == alone
    assert len({tuple(choice.token_ids) for choice in beside}) == 5


def test_logprobs_come_with_alternatives(client):
    content = chat(client, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert all(len(entry.top_logprobs) == 3 for entry in content)
    assert all(entry.top_logprobs[0].token == entry.token for entry in content)
    assert b"".join(bytes(entry.bytes) for entry in content).decode().startswith("<think>")


def test_streamed_logprobs_cover_every_token(client):
    whole = chat(client, logprobs=True).choices[0].logprobs.content
    streamed = [
        entry
        for chunk in chat(client, logprobs=True, stream=True)
        for choice in chunk.choices
        if choice.logprobs
        for entry in choice.logprobs.content
    ]
    assert [entry.token for entry in streamed] == [entry.token for entry in whole]


def test_completion_logprobs_have_their_own_shape(client):
    found = client.completions.create(model="tiny", prompt=[5, 6], max_tokens=4, logprobs=2).choices[0].logprobs
    assert [len(part) for part in (found.tokens, found.token_logprobs, found.top_logprobs, found.text_offset)] == [
        4
    ] * 4
    assert found.text_offset[0] == 0


@pytest.mark.parametrize("streamed", [False, True])
def test_a_stop_string_is_cut_off_even_if_it_ends_inside_a_token(client, streamed):
    answer = chat(client, stop=["re, f"], stream=streamed)
    if streamed:
        deltas = [choice.delta.content or "" for chunk in answer for choice in chunk.choices]
        assert "".join(deltas) == "Hello the"
    else:
        assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("Hello the", "stop")


def test_max_tokens_ends_with_length(client):
    for limit in ({"max_tokens": 4}, {"max_completion_tokens": 4}):
        answer = chat(client, **limit)
        assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 4)


def test_logit_bias_reaches_the_engine(client):
    answer = chat(client, logit_bias={"40": 100}, max_tokens=3, extra_body={"return_token_ids": True})
    assert answer.choices[0].token_ids == [40, 40, 40]


def test_thinking_can_be_switched_off_by_a_variable_of_the_template(client):
    with_it, without = chat(client), chat(client, extra_body={"chat_template_kwargs": {"enable_thinking": False}})
    assert without.usage.prompt_tokens > with_it.usage.prompt_tokens


def test_repeated_prompts_are_cached(client):
    question = [{"role": "user", "content": "hi " * 60}]
    chat(client, messages=question, max_tokens=1)
    usage = chat(client, messages=question, max_tokens=1).usage
    assert usage.prompt_tokens - usage.prompt_tokens_details.cached_tokens <= 16


@pytest.mark.parametrize(
    ("changes", "status", "param", "message"),
    [
        ({"model": "other"}, 404, "model", "'other' does not exist"),
        ({"temperature": -1}, 400, "temperature", "greater than or equal to 0"),
        ({"extra_body": {"temprature": 1}}, 400, "temprature", "unknown field 'temprature'"),
        ({"messages": []}, 400, "messages", "at least 1"),
        ({"messages": [{"role": "king", "content": "x"}]}, 400, "messages.0.role", "'user'"),
        ({"max_tokens": 0}, 400, "max_tokens", "greater than 0"),
        ({"top_logprobs": 3}, 400, None, "without logprobs"),
        ({"n": 1000}, 400, "n", "less than or equal to 128"),
        ({"presence_penalty": 1}, 400, "presence_penalty", "less than or equal to 0"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format.type", "'text'"),
        ({"logit_bias": {"9999": 1}}, 400, None, "token 9999"),
        ({"extra_body": {"chat_template_kwargs": {"messages": []}}}, 400, None, "must not set messages"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_wrong_requests_say_what_is_wrong(client, changes, status, param, message):
    with pytest.raises(openai.APIStatusError) as caught:
        chat(client, **changes)
    error = caught.value
    assert (error.status_code, error.param, error.type) == (status, param, "invalid_request_error")
    assert message in error.message


def test_a_prompt_beyond_the_context_has_its_own_code(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt=[5] * 2000)
    assert caught.value.code == "context_length_exceeded"


def test_a_refused_stream_is_refused_with_a_status(client):
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="tiny", prompt=[5] * 2000, stream=True)


def test_an_unknown_model_and_an_unknown_path_are_not_found(client, server):
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    assert "error" in fetch(server.api + "/nothing").json()


def test_a_body_that_is_no_json_is_refused(server):
    answer = fetch(server.api + "/chat/completions", b"{")
    assert (answer.status, answer.json()["error"]["type"]) == (400, "invalid_request_error")


def test_closing_a_stream_frees_its_blocks(client, server):
    stream = client.completions.create(
        model="tiny", prompt=[5, 6], max_tokens=1000, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    assert server.health()["running"] == 1
    stream.close()
    assert drained(server)


def test_a_client_that_goes_away_frees_its_blocks(server):
    body = {"model": "tiny", "prompt": [5, 6], "max_tokens": 1000, "n": 64, "ignore_eos": True}
    with pytest.raises(TimeoutError):
        fetch(server.api + "/completions", body, timeout=0.3)
    assert drained(server)


def test_the_chat_page_needs_nothing_from_outside(server):
    page = fetch(server.addresses.api + "/").text
    assert "<!doctype html>" in page.lower()
    assert 'src="http' not in page
    assert "@import" not in page


def test_metrics_are_readable_by_prometheus(server):
    from prometheus_client.parser import text_string_to_metric_families

    text = fetch(server.addresses.admin + "/metrics").text
    names = {family.name for family in text_string_to_metric_families(text)}
    assert {"hone_engine_running_requests", "hone_engine_sampled_tokens", "hone_engine_kv_usage_ratio"} <= names


def test_admin_routes_are_elsewhere_and_want_their_token(server):
    assert fetch(server.addresses.api + "/admin/pause", {}).status == 404
    assert fetch(server.addresses.admin + "/admin/pause", {}).status == 401
    wrong = {"Authorization": "Bearer wrong"}
    assert fetch(server.addresses.admin + "/admin/pause", {}, wrong).status == 401


async def test_pause_holds_requests_and_resume_serves_them(server):
    async with AdminClient(server.addresses.admin, "secret") as admin, TokenChannel(server.addresses.tokens) as channel:
        await admin.pause()
        task = asyncio.create_task(channel.generate([5, 6], SamplingParameters(max_tokens=2)))
        async with asyncio.timeout(10):
            while (health := await admin.health()).waiting != 1:
                await asyncio.sleep(0.01)
        assert (health.paused, task.done()) == (True, False)
        await admin.resume()
        async with asyncio.timeout(10):
            assert await task


async def test_weights_are_swapped_by_folder_and_a_broken_folder_is_refused(server, tmp_path):
    model = load_model(server.folder.model)
    save_model(model, model.config, tmp_path / "v3")
    (tmp_path / "broken").mkdir()
    async with AdminClient(server.addresses.admin, "secret") as admin:
        before = (await admin.health()).version
        with pytest.raises(EngineRefused, match="cannot load version 9"):
            await admin.load(9, str(tmp_path / "broken"))
        assert (await admin.health()).version == before
        await admin.load(before + 3, str(tmp_path / "v3"))
        assert (await admin.health()).version == before + 3
    async with TokenChannel(server.addresses.tokens) as channel:
        done = await channel.generate([5, 6], SamplingParameters(max_tokens=3, ignore_eos=True))
    assert [run.version for run in done.versions] == [before + 3]


async def test_a_sampled_conversation_is_continued_without_tokenising_it_again(server, tokenizer):
    question = Node(GREETING[0])
    async with TokenChannel(server.addresses.tokens) as channel:
        sampler = TokenSampler(channel, Renderer(tokenizer))
        first = await sampler.sample([question], [], SamplingParameters(temperature=0))
        follow_up = [question, Node(first.message, 0, first), Node(GREETING[0], 1)]
        second = await sampler.sample(follow_up, [], SamplingParameters(temperature=0, max_tokens=5))
    assert (first.message.content, first.message.reasoning) == ("Hello there, friend!", "hm")
    assert len(first.logprobs) == len(first.token_ids) == first.num_completion_tokens
    assert second.num_prompt_tokens == len(first.context_token_ids + first.token_ids + second.context_token_ids)
    assert tokenizer.decode(second.context_token_ids) == "\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert second.finish_reason is FinishReason.LENGTH


async def test_a_stop_string_is_cut_off_of_a_sampled_turn_but_its_tokens_stay(server, tokenizer):
    async with TokenChannel(server.addresses.tokens) as channel:
        sampler = TokenSampler(channel, Renderer(tokenizer))
        turn = await sampler.sample([Node(GREETING[0])], [], SamplingParameters(temperature=0, stop=("there",)))
    assert turn.message.content == "Hello "
    assert tokenizer.decode(turn.token_ids).rstrip().endswith("there")


async def test_the_chat_sampler_gets_the_same_message_from_the_api(server):
    async with ChatSampler(server.api, "tiny") as sampler:
        turn = await sampler.sample([Node(CALLING[0])], [ADD], SamplingParameters(temperature=0))
        full = await sampler.sample([Node(Message(role="user", content="hi " * 3000))], [], SamplingParameters())
        with pytest.raises(EngineRefused, match="logit_bias names token 5000"):
            await sampler.sample([Node(CALLING[0])], [], SamplingParameters(logit_bias={5000: 1.0}))
    assert (turn.message.content, turn.message.tool_calls[0].arguments) == ("Sure.", '{"a": 1}')
    assert (full.finish_reason, full.message.content) == (FinishReason.LENGTH, "")


def test_a_taken_port_ends_with_one_readable_line(server):
    process = start(server.folder, environment={"ADMIN_TOKEN": "secret"})
    _, complaint = process.communicate(timeout=60)
    assert process.returncode == 2
    last = complaint.decode().strip().splitlines()[-1]
    assert last.startswith("error: cannot bind")
    assert "Traceback" not in complaint.decode()


def test_a_missing_secret_is_named():
    with pytest.raises(ValueError, match="HONE_NO_SUCH_TOKEN, which is not set"):
        secret("HONE_NO_SUCH_TOKEN")


def test_the_tokens_of_a_run_are_counted_in_its_metrics(server):
    deadline = time.monotonic() + 10
    while not server.folder.metrics.read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    lines = [json.loads(line) for line in server.folder.metrics.read_text().splitlines()]
    assert lines[-1]["process"] == "inference"
    assert lines[-1]["engine/sampled_tokens"] > 0
