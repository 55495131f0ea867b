"""Outside agent programs as environments: each call of the program to a model becomes a turn of its rollout."""

from hone.envs.harness.endpoint import Endpoint
from hone.envs.harness.environment import Harness, ProgramCrash, SdkHarness
from hone.envs.harness.places import ProgramRun, SandboxRun, Workplace
from hone.envs.harness.program import ProgramHarness

__all__ = [
    "Endpoint",
    "Harness",
    "ProgramCrash",
    "ProgramHarness",
    "ProgramRun",
    "SandboxRun",
    "SdkHarness",
    "Workplace",
]
