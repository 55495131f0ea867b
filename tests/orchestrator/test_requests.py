"""What is asked for reaches the queues: whole groups in one request, failures after a delay."""

import asyncio

from hone.orchestrator.dispatch import Dispatch
from hone.orchestrator.requests import Requests
from hone.schema.messages import Message
from hone.schema.rollouts import RolloutRequest
from hone.schema.sampling import SamplingParameters
from hone.schema.tasks import Task


class Purpose:
    group_size = 2

    def __init__(self):
        self.sent = []
        self.over = set()

    def waits_for(self, key):
        return key not in self.over

    def note_sent(self, request):
        self.sent.append(request)


def request(*attempts, group="1", environment="alone"):
    task = Task(prompt=(Message("user"),))
    return RolloutRequest(group, environment, task, list(attempts), SamplingParameters(), 0)


def begin(wake=lambda: None):
    dispatch, purpose = Dispatch(100), Purpose()
    dispatch.greet("w", 1, b"w", frozenset({"alone", "together"}), 0)
    return Requests(dispatch, {"together"}, lambda group: purpose, wake), purpose


def test_a_request_is_sent_at_once_and_its_purpose_told():
    requests, purpose = begin()
    requests.submit(request(0), 0)
    assert requests.assign(0) == [(b"w", request(0))]
    assert purpose.sent == [request(0)]
    assert requests.assign(0) == []


def test_what_a_tick_asks_for_of_a_group_scored_together_is_one_request():
    requests, _ = begin()
    for attempt in (0, 1):
        requests.submit(request(attempt, environment="together"), 0)
    assert requests.assign(0) == [(b"w", request(0, 1, environment="together"))]


def test_a_withdrawn_group_is_not_sent():
    requests, purpose = begin()
    requests.submit(request(0, 1, environment="together"), 0)
    requests.submit(request(0), 0)
    assert requests.withdraw("1") == []
    assert requests.assign(0) == purpose.sent == []


async def test_a_failure_delays_what_no_late_answer_has_settled_by_then(monkeypatch):
    monkeypatch.setattr("hone.orchestrator.requests.RETRY_SECONDS", 0.01)
    woken = asyncio.Event()
    requests, purpose = begin(woken.set)
    requests.submit(request(0, 1, environment="together"), 1)
    assert requests.assign(0) == []
    purpose.over.add(("1", 0))
    async with asyncio.timeout(10):
        await woken.wait()
    assert requests.assign(0) == [(b"w", request(1, environment="together"))]
