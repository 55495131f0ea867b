"""The trace of one rollout, field by field, as it lies in files: what reads old runs depends on it."""

import json
from pathlib import Path

import msgspec

from fakes import ScriptedSampler
from hone.envs import load_environment, run_rollout
from hone.schema.sampling import SamplingParameters
from hone.schema.traces import Timing, Trace

GOLDEN = Path(__file__).parent / "golden_trace.json"


async def test_a_multi_turn_trace_is_written_as_ever():
    environment = load_environment("arithmetic", operations="+", max_operand=9)
    task = environment.train_task(1)
    sampler = ScriptedSampler(["1000", task.reference], version=3)
    trace = await run_rollout(environment, task, 2, sampler, SamplingParameters(max_tokens=8), 11, group="g1")
    trace = msgspec.structs.replace(trace, timing=Timing(), environment_version="0")
    expected = json.loads(GOLDEN.read_text())
    assert json.loads(msgspec.json.encode(trace)) == expected
    assert msgspec.convert(expected, Trace) == trace
