"""Environments whose rollouts an outside agent program drives, through the recording proxy."""

import asyncio
import importlib.util
from abc import abstractmethod
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Literal, Unpack

import msgspec

from hone.envs.environment import Environment, EnvironmentArguments
from hone.envs.failures import RolloutFailure, describe, failures_as
from hone.envs.harness.endpoint import Endpoint
from hone.envs.rollout import Rollout
from hone.schema.traces import FailureClass, StopReason

if TYPE_CHECKING:
    from hone.envs.harness.recorder import Recorder

OnCrash = Literal["fail", "score"]
"""A program that ends in an error is a failure, or scored with what there is."""
Agent = Callable[[Rollout, Endpoint], Awaitable[None]]
"""The async function that an `SdkHarness` runs for each rollout."""


class ProgramCrash(Exception):
    """The agent program ended in an error of its own."""


class HarnessArguments(EnvironmentArguments, total=False):
    """What every kind of harness takes, with the meaning that `Harness` gives it, beside what is its own."""

    on_crash: OnCrash
    grace_seconds: float
    model: str


class Harness(Environment):
    """An agent program takes the turns: each of its calls to a model becomes a turn of the rollout.

    What the trace holds are the program's conversations, each from a root of its own, with a branch where the program
    rewrote its history; the task's prompt is a root that only a program that begins with it continues. The metric
    num_branches says how many sequences it trains.

    on_crash: what becomes of a program that ends in an error: "fail" is a failure of class harness; "score" scores what
    there is, and the trace's info has the error under `crash`. A program that takes no turn is always a failure.
    grace_seconds: so long a program may go on after a turn was refused, to write down what it has. model: the name
    that the program is told to ask for.

    Budgets of the rollout refuse turns; max_tool_calls refuses the turn that asks for too many. Temperature, token limits
    and the like are the rollout's: what the program asks for is ignored.
    """

    def __init__(
        self,
        *,
        on_crash: OnCrash = "fail",
        grace_seconds: float = 5.0,
        model: str = "policy",
        **common: Unpack[EnvironmentArguments],
    ) -> None:
        super().__init__(**common)
        if importlib.util.find_spec("aiohttp") is None:
            raise ImportError(f"environment {self.name!r}: harnesses need aiohttp; pip install 'hone[harness]'")
        if on_crash not in ("fail", "score"):
            raise ValueError(f"environment {self.name!r}: on_crash {on_crash!r} is neither 'fail' nor 'score'")
        self.on_crash = on_crash
        self.grace_seconds = grace_seconds
        self.model = model

    @abstractmethod
    async def drive(self, rollout: Rollout, endpoint: Endpoint) -> None:
        """Run the program to its end; `ProgramCrash` when that is an error. Cancelling ends the program."""

    async def run(self, rollout: Rollout) -> None:
        """Run the program until it ends, or until the rollout does."""
        from hone.envs.harness.proxy import proxy_of_this_loop  # aiohttp is of an extra, and slow to import

        proxy = proxy_of_this_loop()
        async with proxy.record(rollout) as recorder:
            try:
                await self._drive(rollout, Endpoint(proxy.address, recorder.api_key, self.model), recorder)
            finally:
                rollout.info["harness"] = _info(recorder)
                rollout.metrics["num_branches"] = recorder.graph.num_branches
        if rollout.stop_reason is None and rollout.failure is None and not rollout.num_turns:
            calls = f"none of its {recorder.num_calls} calls was answered" if recorder.num_calls else "it made no call"
            raise RolloutFailure(FailureClass.HARNESS, "program", f"the program took no turn: {calls}")

    async def _drive(self, rollout: Rollout, endpoint: Endpoint, recorder: "Recorder") -> None:
        program = asyncio.create_task(self._crash(rollout, endpoint))
        ended = asyncio.create_task(recorder.ended.wait())
        try:
            either = {program, ended}
            await asyncio.wait(either, timeout=rollout.seconds_left, return_when=asyncio.FIRST_COMPLETED)
            if ended.done() and rollout.failure is None:
                await asyncio.wait({program}, timeout=self.grace_seconds)
            is_over = program.done()
        finally:
            ended.cancel()
            program.cancel()
            await asyncio.gather(ended, program, return_exceptions=True)
        if rollout.stop_reason is not None or rollout.failure is not None:
            return  # what a program does that is refused its turns is nobody's mistake
        if not is_over:
            rollout.stop(StopReason.TIMEOUT)
        if (crash := program.result()) is not None:
            if self.on_crash == "fail":
                raise RolloutFailure(FailureClass.HARNESS, "program", crash)
            rollout.info["crash"] = crash

    async def _crash(self, rollout: Rollout, endpoint: Endpoint) -> str | None:
        """How the program crashed, if it did."""
        with failures_as(FailureClass.HARNESS, "program"):
            try:
                await self.drive(rollout, endpoint)
            except ProgramCrash as crash:
                return str(crash)
        return None


class SdkHarness(Harness):
    """The program is an async function of this process: `await agent(rollout, endpoint)`.

    It makes its client from `endpoint.base_url` and `endpoint.api_key`, reads `rollout.task`, and may keep what the
    rubric wants to know in `rollout.state`. It shares the event loop with all rollouts and must not block it.
    """

    def __init__(
        self,
        *,
        agent: Agent,
        **common: Unpack[HarnessArguments],
    ) -> None:
        super().__init__(**common)
        self._agent = agent

    async def drive(self, rollout: Rollout, endpoint: Endpoint) -> None:
        """Call the function."""
        try:
            await self._agent(rollout, endpoint)
        except RolloutFailure:
            raise
        except (Exception, SystemExit) as error:
            raise ProgramCrash(describe(error)) from error


def _info(recorder: "Recorder") -> dict[str, Any]:
    """What the trace remembers of the calls: how many, with which tools, and what in them could not be heeded."""
    info: dict[str, Any] = {"num_calls": recorder.num_calls}
    tools = {str(root): msgspec.to_builtins(shown) for root, shown in recorder.graph.tools_of_roots.items() if shown}
    if tools:
        info["tools_of_roots"] = tools
    if recorder.not_enforced:
        info["not_enforced"] = sorted(recorder.not_enforced)
    return info
