"""Judges against a real server that speaks the OpenAI API and misbehaves on purpose."""

import asyncio
import json
import socket
import sqlite3
import time

import msgspec
import pytest
from aiohttp import web

from hone.envs import FailureClass, RolloutFailure, Rubric, SingleTurn, Task, assistant, play, reward, user
from hone.envs.judges import (
    Judge,
    UnreadableVerdictError,
    choice_verdict,
    json_verdict,
    number_verdict,
    transcript,
)


class Grade(msgspec.Struct):
    reason: str
    is_correct: bool


def says(text, **more):
    message = {"role": "assistant", "content": text}
    return {"choices": [{"message": message, "finish_reason": "stop"}], "usage": {"prompt_tokens": 1}} | more


class JudgeServer:
    """Answers each chat completion with the next of its lines: a text, a status, or a function of the request."""

    def __init__(self, port=0):
        self.port = port
        self.lines = ['{"reason": "same", "is_correct": true}']
        self.bodies = []
        self.headers = []
        self.num_waiting = 0
        self.max_waiting = 0

    async def __aenter__(self):
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self.answer)
        self.runner = web.AppRunner(app, handler_cancellation=True)
        await self.runner.setup()
        site = web.TCPSite(self.runner, "127.0.0.1", self.port)
        await site.start()
        port = site._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/v1"
        return self

    async def __aexit__(self, *_):
        await self.runner.cleanup()

    async def answer(self, request):
        self.bodies.append(await request.json())
        self.headers.append(request.headers)
        line = self.lines[min(len(self.bodies), len(self.lines)) - 1]
        self.num_waiting += 1
        self.max_waiting = max(self.max_waiting, self.num_waiting)
        try:
            await asyncio.sleep(0)
            if callable(line):
                return await line(request)
            if isinstance(line, int):
                return web.json_response({"error": {"message": "go away"}}, status=line)
            return web.json_response(says(line))
        finally:
            self.num_waiting -= 1


async def hangs(request):
    await asyncio.sleep(60)


async def breaks(request):
    request.transport.close()
    return web.Response()


async def babbles(request):
    return web.Response(text="<html>502</html>", content_type="text/html")


async def says_no_completion(request):
    return web.json_response({"choices": []})


@pytest.fixture
async def server():
    async with JudgeServer() as server:
        yield server


def judge(server, verdict=None, prompt="Is {answer} right?", **options):
    return Judge(server.url, "judge-1", prompt, verdict or json_verdict(Grade), **options)


async def test_a_verdict_is_read_by_its_schema(server):
    grade = await judge(server, system="Be strict.").ask(answer="4")
    assert grade == Grade("same", True)
    assert server.bodies[0]["model"] == "judge-1"
    assert server.bodies[0]["messages"] == [
        {"role": "system", "content": "Be strict."},
        {"role": "user", "content": "Is 4 right?"},
    ]
    assert server.bodies[0]["temperature"] == 0


async def test_braces_in_an_answer_are_text(server):
    await judge(server, prompt='{{"answer": "{answer}"}}').ask(answer="{0} {answer} {{")
    assert server.bodies[0]["messages"][0]["content"] == '{"answer": "{0} {answer} {{"}'


async def test_a_judge_is_used_in_a_reward(server):
    grader = judge(server, prompt="{question}: {answer}, not {reference}?")

    @reward
    async def correct(prompt, answer, reference):
        return (await grader.ask(question=prompt[0].content, answer=answer, reference=reference)).is_correct

    task = Task(prompt=(user("2 + 2?"),), reference="4")
    environment = SingleTurn(name="sum", rubric=Rubric([correct]), train=[task])
    assert (await play(environment, task, "four")).reward == 1
    server.lines = ['{"reason": "no", "is_correct": false}']
    assert (await play(environment, task, "five")).reward == 0
    server.lines = [400]
    failure = (await play(environment, task, "six")).failure
    assert (failure.kind, failure.where) == (FailureClass.JUDGE, "judge judge-1")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (401, "answered 401"),
        (400, "go away"),
        (hangs, "within 0.3 s|longer than 0.3 s"),
        (503, "503"),
        (429, "429"),
        (500, "500"),
        (breaks, "no answer from"),
        (babbles, "no chat completion"),
        (says_no_completion, "no chat completion"),
        ("I think so.", "there is no JSON"),
        ("", "there is no JSON"),
        ('{"reason": "no", "is_correct": "maybe"}', "Expected `bool`"),
        ('{"is_correct": true}', "missing required field `reason`"),
    ],
)
async def test_a_dead_or_unreadable_judge_is_a_failure_and_never_a_zero(server, line, message):
    server.lines = [line]
    with pytest.raises(RolloutFailure, match=message) as caught:
        await judge(server, deadline_seconds=0.3 if line is hangs else 1.5).ask(answer="4")
    assert caught.value.failure.kind is FailureClass.JUDGE


async def test_a_judge_that_is_not_there_is_a_failure(server):
    await server.runner.cleanup()
    with pytest.raises(RolloutFailure) as caught:
        await judge(server, deadline_seconds=1.0).ask(answer="4")
    assert caught.value.failure.kind is FailureClass.JUDGE


@pytest.mark.parametrize("trouble", [503, 429, 500, breaks])
async def test_passing_trouble_of_the_endpoint_is_waited_out(server, trouble):
    server.lines = [trouble, '{"reason": "same", "is_correct": true}']
    assert (await judge(server).ask(answer="4")).is_correct
    assert len(server.bodies) == 2


async def test_an_unreadable_answer_is_asked_for_again_with_another_seed(server):
    server.lines = ["well ...", '{"reason": "same", "is_correct": true}']
    assert (await judge(server).ask(answer="4")).is_correct
    assert ["seed" in body for body in server.bodies] == [False, True]
    server.lines = ["well ..."]
    with pytest.raises(RolloutFailure, match="no verdict in 3 answers; the last: 'well"):
        await judge(server).ask(answer="5")
    assert len(server.bodies) == 2 + 3


async def test_the_same_question_is_asked_once_also_at_the_same_time(server):
    grader = judge(server)
    grades = await asyncio.gather(*(grader.ask(answer=answer) for answer in ["4", "5", "4", "4"]))
    assert all(grade.is_correct for grade in grades)
    await grader.ask(answer="5")
    assert len(server.bodies) == 2


async def test_failures_are_not_remembered(server):
    server.lines = [400, '{"reason": "same", "is_correct": true}']
    grader = judge(server)
    with pytest.raises(RolloutFailure):
        await grader.ask(answer="4")
    assert (await grader.ask(answer="4")).is_correct


async def test_one_who_waits_may_be_cancelled_without_harm_to_the_others(server):
    release = asyncio.Event()

    async def waits(request):
        await release.wait()
        return web.json_response(says('{"reason": "same", "is_correct": true}'))

    server.lines = [waits]
    grader = judge(server)
    first, second = (asyncio.create_task(grader.ask(answer="4")) for _ in range(2))
    while not server.bodies:
        await asyncio.sleep(0.001)
    first.cancel()
    release.set()
    assert (await second).is_correct
    assert first.cancelled() or await asyncio.gather(first, return_exceptions=True)


async def test_a_cache_is_shared_by_processes_and_survives_them(server, tmp_path):
    path = tmp_path / "deep" / "verdicts.sqlite"
    assert (await judge(server, cache=path).ask(answer="4")).is_correct
    server.lines = [500]
    assert (await judge(server, cache=path).ask(answer="4")).is_correct
    assert len(server.bodies) == 1
    with sqlite3.connect(path) as database:
        assert [json.loads(said)["reason"] for (said,) in database.execute("SELECT said FROM verdicts")] == ["same"]


async def test_what_another_verdict_had_read_is_asked_again(server, tmp_path):
    path = tmp_path / "verdicts.sqlite"
    await judge(server, cache=path).ask(answer="4")
    server.lines = ["7"]
    assert await judge(server, number_verdict(0, 10), cache=path).ask(answer="4") == 7


async def test_a_broken_cache_costs_requests_and_no_verdict(server, tmp_path, caplog):
    path = tmp_path / "verdicts.sqlite"
    path.write_bytes(b"no database" * 1000)
    assert (await judge(server, cache=path).ask(answer="4")).is_correct
    assert "is not used: file is not a database" in caplog.text
    assert caplog.text.count("is not used") == 1


async def test_no_more_requests_run_at_once_than_allowed(server):
    async def waits(request):
        await asyncio.sleep(0.02)
        return web.json_response(says("5"))

    server.lines = [waits]
    grader = judge(server, number_verdict(0, 10), max_concurrent=3)
    await asyncio.gather(*(grader.ask(answer=str(number)) for number in range(9)))
    assert server.max_waiting == 3


async def test_requests_keep_their_distance(server):
    server.lines = ["5"]
    grader = judge(server, number_verdict(0, 10), requests_per_minute=60 / 0.05)
    started = time.monotonic()
    await asyncio.gather(*(grader.ask(answer=str(number)) for number in range(5)))
    assert time.monotonic() - started >= 4 * 0.05 - 0.01


async def test_the_key_comes_from_an_environment_variable(server, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret")
    await judge(server, api_key_variable="JUDGE_KEY").ask(answer="4")
    assert server.headers[0]["Authorization"] == "Bearer secret"
    with pytest.raises(ValueError, match="environment variable NO_KEY"):
        judge(server, api_key_variable="NO_KEY")


def test_a_judge_serves_one_event_loop_after_the_other():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    grader = Judge(f"http://127.0.0.1:{port}/v1", "judge-1", "{answer}?", choice_verdict("yes", "no"))

    async def ask(answer):
        async with JudgeServer(port) as server:
            server.lines = ["yes"]
            return await grader.ask(answer=answer)

    assert [asyncio.run(ask(answer)) for answer in ("a", "b", "a")] == ["yes"] * 3


@pytest.mark.parametrize(
    ("prompt", "options", "complaint"),
    [
        ("no field", {}, "has no field"),
        ("{}", {}, "use plain names"),
        ("{a.b}", {}, "use plain names"),
        ("{a!r}", {}, "use plain names"),
        ('{"a": 1}', {}, "use plain names"),
        ("{a", {}, "no template"),
        ("{a}", {"max_concurrent": 0}, "must be positive"),
        ("{a}", {"requests_per_minute": -1}, "must be positive"),
    ],
)
def test_mistakes_are_found_when_a_judge_is_made(prompt, options, complaint):
    with pytest.raises(ValueError, match=complaint):
        Judge("http://127.0.0.1:1/v1", "m", prompt, number_verdict(0, 1), **options)


async def test_other_fields_than_those_of_the_prompt_are_refused(server):
    with pytest.raises(ValueError, match="has the fields answer, not answer, reference"):
        await judge(server).ask(answer="4", reference="4")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("yes", "yes"),
        ("**Yes.**", "yes"),
        ("It is not quite no.\nVerdict: yes", "yes"),
        ("<think>no no no</think>yes", "yes"),
        ("yes or no", None),
        ("yesterday", None),
        ("yes\nI am sure.", None),
        ("", None),
    ],
)
def test_choices_are_read(text, expected):
    read = choice_verdict("yes", "no")
    if expected is not None:
        assert read(text) == expected
    else:
        with pytest.raises(UnreadableVerdictError):
            read(text)


def test_longer_choices_go_before_shorter_ones():
    assert choice_verdict("correct", "not correct")("It is not correct.") == "not correct"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8", 8),
        ("Score: 7.5", 7.5),
        ("**8**/10", 8),
        ("I give 3 out of 10.", 3),
        ("10/10", 10),
        ("1/100", 0.01),
        ("11", None),
        ("", None),
    ],
)
def test_numbers_are_read(text, expected):
    read = number_verdict(0, 10)
    if expected is not None:
        assert read(text) == expected
    else:
        with pytest.raises(UnreadableVerdictError):
            read(text)


def test_readers_that_cannot_read_are_refused():
    with pytest.raises(ValueError, match="two different words"):
        choice_verdict("yes", "Yes")
    with pytest.raises(ValueError, match="leave no numbers"):
        number_verdict(1, 1)


def test_a_conversation_is_shown_as_text():
    assert transcript([user("2 + 2?"), assistant("4")]) == "[user]\n2 + 2?\n\n[assistant]\n4"
