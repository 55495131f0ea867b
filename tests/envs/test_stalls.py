import asyncio
import logging
import re
import subprocess
import sys
import time

import pytest

from fakes import ScriptedSampler
from hone.envs import MultiTurn, Rubric, Task, reward, run_rollout, stalls, user
from hone.envs.stalls import STALLED, Stall, StallMeter
from hone.schema.sampling import SamplingParameters
from hone.schema.traces import FailureClass

TASK = Task(prompt=(user("say yes"),), reference="yes")


def blocks_everybody(seconds=60.0):
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        time.sleep(0.01)


def holds_the_lock():
    re.match("(a+)+$", "a" * 40 + "b")


def counts_for_ever():
    number = 0
    while number >= 0:
        number += 1


async def test_a_standing_loop_is_reported_with_its_place(caplog):
    with caplog.at_level(logging.WARNING), StallMeter(report_seconds=0.1) as meter:
        await asyncio.sleep(0.06)
        blocks_everybody(0.3)
        await asyncio.sleep(0.01)
        longest = meter.take_longest()
        assert longest.seconds > 0.2
        assert "blocks_everybody (test_stalls.py" in longest.place
        assert longest.environment == ""
        assert meter.take_longest() == Stall()
    assert "blocks_everybody (test_stalls.py" in caplog.text


class Blocking(MultiTurn):
    """One of its parts blocks in the first attempt, in a way of its own."""

    def __init__(self, part, block):
        @reward
        def fair(answer, reference, trace):
            self.do("reward", trace.attempt)
            return answer == reference

        super().__init__(name="blocking", rubric=Rubric([fair]), train=[TASK])
        self.part, self.block = part, block

    def do(self, part, attempt):
        if (part, attempt) == (self.part, 0):
            self.block()

    async def setup(self, rollout):
        self.do("setup", rollout.attempt)

    async def reply(self, rollout):
        self.do("reply", rollout.attempt)
        return

    async def teardown(self, rollout):
        self.do("teardown", rollout.attempt)


@pytest.fixture
def quick_alarm(monkeypatch):
    monkeypatch.setattr(stalls, "AGAIN_SECONDS", 0.1)


async def attempts_of(environment, report_seconds=0.05):
    with StallMeter(report_seconds=report_seconds, deadline_seconds=0.2) as meter:
        sampler = ScriptedSampler(["yes"], seconds=0.1)
        traces = await asyncio.gather(
            *(run_rollout(environment, TASK, attempt, sampler, SamplingParameters(), 0) for attempt in range(3))
        )
        return traces, meter.take_longest()


@pytest.mark.parametrize("block", [blocks_everybody, holds_the_lock, counts_for_ever])
@pytest.mark.parametrize("part", ["setup", "reply", "reward"])
async def test_what_stands_still_is_interrupted_and_fails_alone(quick_alarm, part, block):
    traces, longest = await attempts_of(Blocking(part, block))
    failure = traces[0].failure
    assert failure.kind is FailureClass.TIMEOUT
    assert "environment 'blocking' kept the event loop" in failure.message
    assert f"{block.__name__} (test_stalls.py" in failure.message
    assert [trace.reward for trace in traces[1:]] == [1, 1]
    assert longest.seconds > 0.2
    if block is not holds_the_lock:  # whose stack no thread can look at
        assert longest.environment == "blocking"


async def test_code_that_catches_the_interruption_does_not_turn_it_into_a_reward(quick_alarm):
    def forgiving():
        try:
            blocks_everybody()
        except Exception:
            return

    traces, _ = await attempts_of(Blocking("reward", forgiving))
    assert traces[0].failure.kind is FailureClass.TIMEOUT
    assert traces[0].rewards == {}


async def test_standing_still_after_the_reward_costs_none(quick_alarm):
    traces, _ = await attempts_of(Blocking("teardown", blocks_everybody))
    assert [trace.reward for trace in traces] == [1, 1, 1]
    assert "kept the event loop" in traces[0].info["teardown_failure"]


async def test_a_loop_that_goes_on_after_one_late_look_is_not_interrupted():
    """As when the whole process was stopped for a while."""
    traces, longest = await attempts_of(Blocking("reply", lambda: blocks_everybody(0.5)))
    assert longest.seconds > 0.4
    assert [trace.reward for trace in traces] == [1, 1, 1]


STUCK = """
import asyncio, logging, re, sys, time
from hone.envs import stalls
logging.basicConfig(level=logging.WARNING)
stalls.DUMP_SECONDS, stalls.GRACE_SECONDS, stalls.AGAIN_SECONDS = 0.2, 0.1, 0.1

def waits_for_ever():
    time.sleep(60)

def holds_the_lock_for_ever():
    re.match("(a+)+$", "a" * 40 + "b")

async def main():
    with stalls.StallMeter(report_seconds=0.1, deadline_seconds=0.4):
        await asyncio.sleep(0.1)
        globals()[sys.argv[1]]()

asyncio.run(main())
"""


@pytest.mark.parametrize("code", ["waits_for_ever", "holds_the_lock_for_ever"])
def test_code_of_no_rollout_that_never_comes_back_ends_the_process_and_is_named(code):
    process = subprocess.run(
        [sys.executable, "-c", STUCK, code], capture_output=True, text=True, timeout=30, check=False
    )
    assert process.returncode in (1, STALLED)
    assert code in process.stderr
