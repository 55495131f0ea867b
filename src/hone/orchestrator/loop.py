"""The orchestrator process: `python -m hone.orchestrator.loop RUN_FOLDER`.

A thin shell around `decide`. One tick takes everything that has arrived from env workers, trainer and engine, appends
finished traces to their segment, lets `decide` say what follows, records that in the ledger in one transaction, and
only then tells the others. So whatever anybody was told survives this process.
"""

import asyncio
import errno
import gc
import json
import logging
import math
import os
import sqlite3
import sys
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Mapping
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import zmq

from hone.config.load import ConfigError, load_recipe
from hone.config.recipe import Recipe, RlSection
from hone.envs.environment import Environment
from hone.envs.remote import environment_of
from hone.envs.retries import Retries, total
from hone.envs.worker import Worker, limits_from
from hone.inference.client import AdminClient, TokenChannel, TokenSampler
from hone.observability import logs
from hone.observability.logs import fields
from hone.observability.metrics import Metrics
from hone.observability.spans import Spans
from hone.orchestrator import decide as d
from hone.orchestrator.audit import group_name
from hone.orchestrator.batching import Tally, make_batch
from hone.orchestrator.curriculum import Outcome, curriculum_of, solve_rate
from hone.orchestrator.dispatch import Dispatch, Key, Lost
from hone.orchestrator.engine import EngineDriver
from hone.orchestrator.evaluation import PREFIX, Evaluation
from hone.orchestrator.ledger import Ledger, LedgerError
from hone.orchestrator.mixture import Draw, Mixture
from hone.orchestrator.recovery import read_group_traces, recover, restore_mixture
from hone.orchestrator.samples import UntrainableTraceError, check_trainable
from hone.orchestrator.sockets import RouterSocket
from hone.schema.batches import (
    TRAINER_CHANNEL,
    Acknowledged,
    BatchPending,
    BatchReady,
    BatchWanted,
    CheckpointSaved,
    NoMoreBatches,
    StepDone,
)
from hone.schema.rollouts import (
    FRAMES_PER_MESSAGE,
    WORKER_CHANNEL,
    Farewell,
    Heartbeat,
    RolloutCancel,
    RolloutRequest,
    RolloutResult,
    Shutdown,
    WorkerHello,
)
from hone.schema.sampling import SamplingParameters
from hone.schema.seeds import derive_seed
from hone.schema.tasks import Task
from hone.schema.traces import Failure, FailureClass, Trace
from hone.schema.wire import ProtocolError, Wire, WireError
from hone.text.rendering import Renderer
from hone.text.tokenizer import Tokenizer
from hone.transport.addresses import Addresses, PortInUseError, load_addresses
from hone.transport.batches import write_batch
from hone.transport.folders import RunFolder
from hone.transport.traces import Location, TraceWriter

logger = logging.getLogger("hone.orchestrator.loop")

WILL_NEVER_WORK = 2
SILENT_BEATS = 10
STALLS_OF_SILENCE = 1.5
"""So many of the longest stalls are waited for before silence is death: after one, a worker goes on or says farewell."""
PAUSE_SECONDS = 0.005
"""What arrives within this time shares a tick, and so a transaction."""
SHORT_PAUSE_SECONDS = 0.001
"""The same while the trainer waits for a batch."""
TIMER_SECONDS = 0.2
REMIND_SECONDS = 30.0
GRACE_SECONDS = 120.0
"""A rollout is given up this long after its worker should have ended it."""
RETRY_SECONDS = 0.25
LONGEST_RETRY_SECONDS = 10.0


class NothingToTrainError(RuntimeError):
    """Rollouts end, but none of them can be trained."""


class HopelessError(ValueError):
    """The run cannot succeed as it is; the message says what to change."""


HOPELESS = (ConfigError, HopelessError, LedgerError, PortInUseError, d.TrainerMismatchError)
OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def main(arguments: list[str]) -> int:
    """Run the orchestrator of a run's folder; the result is the process's exit code."""
    if len(arguments) != 1:
        print("usage: python -m hone.orchestrator.loop RUN_FOLDER", file=sys.stderr)
        return WILL_NEVER_WORK
    folder = RunFolder(Path(arguments[0]))
    logs.configure("orchestrator", folder.path)
    try:
        recipe = load_recipe(folder.config)
        environments = {section.name: environment_of(section) for section in recipe.environments}
        addresses = load_addresses(folder.addresses)
    except ValueError as error:
        return _complain(error)
    try:
        asyncio.run(orchestrate(folder, recipe, environments, addresses))
    except HOPELESS as error:
        return _complain(error)
    except (OSError, sqlite3.OperationalError) as error:
        if not is_out_of_space(error):
            raise
        return _complain(error)
    return 0


def is_out_of_space(error: OSError | sqlite3.OperationalError) -> bool:
    """Whether nothing more can be written, which the same again after a restart does not change."""
    if isinstance(error, OSError):
        return error.errno in OUT_OF_SPACE
    return error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY)


def _complain(error: Exception) -> int:
    logger.error("%s", error)
    return WILL_NEVER_WORK


async def orchestrate(
    folder: RunFolder, recipe: Recipe, environments: Mapping[str, Environment], addresses: Addresses
) -> None:
    """Run until everything is trained, evaluated and exported."""
    if recipe.rl is None:
        raise ConfigError("the recipe has no [rl] section; add one to reinforce")
    held_out = [environment.num_held_out_tasks for environment in environments.values()]
    if recipe.evaluation.every is not None and not any(count != 0 for count in held_out):
        raise ConfigError(
            "evaluation.every is set, but no environment has held-out tasks; remove it, or add such tasks"
        )
    orchestrator = Orchestrator(folder, recipe, recipe.rl, environments, addresses)
    await orchestrator.run()


def limits_of(recipe: Recipe, section: RlSection) -> d.Limits:
    """The numbers of a recipe that decisions depend on."""
    all_in_time = (section.max_staleness + 1) * section.batch_size
    return d.Limits(
        groups_per_batch=section.groups_per_batch,
        group_size=section.group_size,
        max_staleness=section.max_staleness,
        num_steps=section.num_steps,
        max_concurrent=section.max_concurrent or all_in_time,
        in_flight_updates=section.in_flight_updates,
        filter_without_signal=section.filter_without_signal,
        evaluate_every=recipe.evaluation.every,
        stop_at_reward=section.stop_at_reward,
        retries=retries_of(recipe),
    )


def retries_of(recipe: Recipe) -> Retries:
    """The retry policy of a recipe."""
    return Retries({FailureClass(kind): count for kind, count in recipe.retries.model_dump().items()})


def identity_of(recipe: Recipe, section: RlSection) -> dict[str, Any]:
    """What a ledger must not change under: task order, groups and the bound."""
    return {
        "seed": recipe.run.seed,
        "environments": [environment.model_dump(mode="json") for environment in recipe.environments],
        "batch_size": section.batch_size,
        "group_size": section.group_size,
        "max_staleness": section.max_staleness,
    }


def mixture_of(recipe: Recipe, environments: Mapping[str, Environment]) -> Mixture:
    """The mixture of a recipe's environments, with the curricula that it wants."""
    seed = recipe.run.seed
    wanted = {e.name: curriculum_of(e, environments[e.name], seed) for e in recipe.environments}
    curricula = {name: curriculum for name, curriculum in wanted.items() if curriculum is not None}
    return Mixture({e.name: e.weight for e in recipe.environments}, environments, seed, curricula)


class Orchestrator:
    """Owns the sockets, the ledger, the traces and the state of one run."""

    def __init__(
        self,
        folder: RunFolder,
        recipe: Recipe,
        section: RlSection,
        environments: Mapping[str, Environment],
        addresses: Addresses,
    ) -> None:
        self._folder = folder
        self._recipe = recipe
        self._section = section
        self._environments = environments
        self._addresses = addresses
        self._longest_rollout_seconds = section.rollout_timeout_seconds + max(
            (environment.rubric.group_seconds for environment in environments.values()), default=0.0
        )
        self._sampling = SamplingParameters(
            temperature=section.sampling.temperature, max_tokens=section.sampling.max_tokens
        )
        self._mixture = mixture_of(recipe, environments)
        self._worker_wire = Wire(*WORKER_CHANNEL)
        self._trainer_wire = Wire(*TRAINER_CHANNEL)
        self._state = d.State(limits_of(recipe, section))
        self._dispatch = Dispatch(recipe.workers.max_rollouts_per_worker)
        self._scored_together = {name for name, environment in environments.items() if environment.scores_groups}
        self._held_back: dict[str, dict[int, tuple[bytes, RolloutResult]]] = {}
        self._gathered: dict[str, tuple[RolloutRequest, int]] = {}
        self._events: deque[d.Event] = deque()
        self._reward_of_solved = {e.name: e.reward_of_solved for e in recipe.environments}
        self._draws: dict[int, Draw] = {}
        self._tasks: dict[int, tuple[str, Task | None]] = {}
        self._traces: dict[int, dict[int, Trace]] = {}
        self._evaluation: Evaluation | None = None
        self._evaluation_began = 0.0
        self._askers: dict[int, bytes] = {}
        self._after_commit: list[Callable[[], None]] = []
        self._tally = Tally()
        self._last_failure = ""
        self._moved_at = time.monotonic()
        self._timer_at = time.monotonic()
        self._batch_wanted_at: float | None = None
        self._wake = asyncio.Event()
        self._over = False

    async def run(self) -> None:
        """Until everything is trained, evaluated and exported."""
        async with AsyncExitStack() as stack:
            context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
            stack.callback(context.term)
            self._workers = await stack.enter_async_context(
                RouterSocket(context, self._addresses.workers, self._wake.set)
            )
            self._trainer = await stack.enter_async_context(
                RouterSocket(context, self._addresses.trainer, self._wake.set)
            )
            self._spans = Spans(self._folder.spans, "orchestrator")
            stack.callback(self._spans.close)
            self._metrics = stack.enter_context(Metrics(self._folder.metrics, "orchestrator", port=self._port()))
            self._ledger = stack.enter_context(Ledger(self._folder.ledger, identity_of(self._recipe, self._section)))
            self._writer = stack.enter_context(TraceWriter(self._folder.traces))
            admin = await stack.enter_async_context(AdminClient(self._addresses.admin, self._recipe_token()))
            self._engine = EngineDriver(admin, self._folder, self._post, self._spans)
            self._resume()
            helpers = await stack.enter_async_context(_Background())
            helpers.start(self._engine.run())
            if self._recipe.workers.num_workers == 0:
                helpers.start(await self._own_worker(stack))
            await self._serve(helpers)
            self._say_goodbye()

    async def _serve(self, helpers: "_Background") -> None:
        """Waits for messages and events, at most until the next look at the clock; the watchdog says what for."""
        while not self._over:
            helpers.check()
            self._wake.clear()
            self._tick()
            try:
                async with asyncio.timeout(TIMER_SECONDS):
                    await self._wake.wait()
            except TimeoutError:
                pass
            else:
                await asyncio.sleep(PAUSE_SECONDS if self._state.wanted is None else SHORT_PAUSE_SECONDS)
            self._look_at_the_clock()

    # One tick.

    def _tick(self) -> None:
        self._take_from_workers()
        self._take_from_trainer()
        while self._events:
            events = list(self._events)
            self._events.clear()
            self._decide(*events)
        self._send_requests()
        self._commit()

    def _post(self, event: d.Event) -> None:
        self._events.append(event)
        self._wake.set()

    def _decide(self, *events: d.Event) -> None:
        self._state, commands = d.decide(self._state, *events)
        if commands:
            self._moved_at = time.monotonic()
        for command in commands:
            self._perform(command)

    def _commit(self) -> None:
        self._ledger.commit()
        for tell in self._after_commit:
            tell()
        self._after_commit.clear()

    # From env workers.

    def _take_from_workers(self) -> None:
        now = time.monotonic()
        arrived: list[tuple[bytes, RolloutResult]] = []
        farewells: list[Farewell] = []
        seen: set[Key] = set()
        for identity, messages in self._workers.take():
            for frame in messages:
                message = self._decode(self._worker_wire, frame)
                if isinstance(message, RolloutResult):
                    key = message.group, message.attempt
                    if key not in seen and self._is_welcome(identity, message):
                        seen.add(key)
                        arrived += self._hold_back(frame, message) if self._is_whole(key) else [(frame, message)]
                elif isinstance(message, WorkerHello):
                    self._greet(message, identity, now)
                elif isinstance(message, Heartbeat):
                    self._tally.note_stall(message)
                    if not self._dispatch.hear(identity, now):
                        self._take_back(message, identity, now)
                elif isinstance(message, Farewell):
                    farewells.append(message)
            self._dispatch.hear(identity, now)
        if arrived:
            location = self._writer.append([frame for frame, _ in arrived])
            self._ledger.note_traces(self._writer.end)
            for _, result in arrived:
                self._take_result(result, location)
        for farewell in farewells:  # after the result that tells whose fault it is
            logger.warning("an env worker ends itself", extra=fields(worker=farewell.worker, reason=farewell.reason))
            self._lose(self._dispatch.dismiss(farewell.worker))

    def _is_welcome(self, identity: bytes, result: RolloutResult) -> bool:
        """Whether the result is waited for.

        A failure, and a part of a group that is scored as a whole, count only from the worker that has it now.
        """
        key = result.group, result.attempt
        if not self._waits_for(key):
            return False
        is_any_workers = result.trace.failure is None and not self._is_whole(key)
        return is_any_workers or self._dispatch.is_owner(identity, key)

    # Groups that are scored together: one request, one outcome.

    def _is_whole(self, key: Key) -> bool:
        """Whether this attempt, which is waited for, is scored together with the others of its group."""
        if not self._scored_together:
            return False
        name, _ = key
        if not name.startswith(PREFIX):
            return self._tasks[int(name)][0] in self._scored_together
        return self._evaluation is not None and self._evaluation.environment_of(key) in self._scored_together

    def _hold_back(self, frame: bytes, result: RolloutResult) -> list[tuple[bytes, RolloutResult]]:
        """The results of a group once all are there. One with too few valid rollouts runs again as a whole."""
        held = self._held_back.setdefault(result.group, {})
        held[result.attempt] = frame, result
        if len(held) < self._size_of(result.group):
            return []
        del self._held_back[result.group]
        arrived = [held[attempt] for attempt in sorted(held)]
        is_evaluated = result.group.startswith(PREFIX)
        failures = [found for _, other in arrived if (found := _failure_of(other.trace, is_evaluated)) is not None]
        if len(arrived) - len(failures) >= (1 if is_evaluated else 2):
            return arrived
        self._writer.append([frame for frame, other in arrived if other.trace.failure is not None])
        self._ledger.note_traces(self._writer.end)
        kind, self._last_failure = failures[0]
        for _, other in arrived:
            key = other.group, other.attempt
            self._dispatch.done(key)
            self._fail(key, kind)
        return []

    def _size_of(self, group: str) -> int:
        return self._recipe.evaluation.attempts if group.startswith(PREFIX) else self._section.group_size

    def _waits_for(self, key: Key) -> bool:
        name, attempt = key
        if name.startswith(PREFIX):
            return self._evaluation is not None and self._evaluation.waits_for(key)
        group = self._state.groups.get(int(name))
        return group is not None and attempt in group.pending

    def _take_result(self, result: RolloutResult, location: Location) -> None:
        key, trace = (result.group, result.attempt), result.trace
        self._moved_at = time.monotonic()
        self._dispatch.done(key)
        if trace.failure is not None:
            self._last_failure = _complaint_of(trace.failure)
            self._fail(key, trace.failure.kind, is_final=self._is_whole(key))
        elif result.group.startswith(PREFIX):
            self._finish_evaluated(key, trace)
        else:
            self._finish(int(result.group), result.attempt, trace, location)

    def _finish(self, number: int, attempt: int, trace: Trace, location: Location) -> None:
        try:
            reward, version, agent_rewards = check_trainable(trace)
        except UntrainableTraceError as error:
            self._last_failure = str(error)
            key = group_name(number), attempt
            self._fail(key, error.kind, is_final=self._is_whole(key))
            return
        self._traces.setdefault(number, {})[attempt] = trace
        self._tally.add(self._tasks[number][0], trace, reward)
        self._ledger.finish(number, attempt, reward, version, location)
        self._events.append(d.RolloutFinished(number, attempt, reward, version, agent_rewards))

    def _fail(self, key: Key, kind: FailureClass, *, is_final: bool = False) -> None:
        group, attempt = key
        self._held_back.pop(group, None)
        if not group.startswith(PREFIX):
            self._tally.failures[kind] += 1
            self._events.append(d.RolloutFailed(int(group), attempt, kind, is_final))
        elif self._evaluation is not None and self._evaluation.waits_for(key):
            request = self._evaluation.fail(key, kind, is_final=is_final)
            if request is not None:
                self._submit_later(request, self._evaluation.num_failures(key))
            self._continue_evaluation()

    def _greet(self, hello: WorkerHello, identity: bytes, now: float) -> None:
        logger.info("env worker is here", extra=fields(worker=hello.worker, pid=hello.pid))
        self._lose(self._dispatch.greet(hello.worker, hello.pid, identity, frozenset(hello.environments), now))

    def _take_back(self, beat: Heartbeat, identity: bytes, now: float) -> None:
        """A worker that stood still for so long that it was taken for dead has gone on: its rollouts run anew."""
        groups = self._dispatch.take_back(identity, now)
        if groups is not None:
            logger.warning(
                "an env worker is back", extra=fields(worker=beat.worker, stall_seconds=beat.max_stall_seconds)
            )
            frames = [self._worker_wire.encode(RolloutCancel(group)) for group in groups]
            self._after_commit.append(partial(self._tell_worker, identity, frames))

    def _lose(self, lost: Lost | None) -> None:
        if lost is None or not lost.keys:
            return
        kind = FailureClass.WORKER if lost.has_died else FailureClass.CANCELLED
        logger.warning("rollouts of a lost worker are issued again", extra=fields(worker=lost.worker, n=len(lost.keys)))
        self._last_failure = f"env worker {lost.worker} died"
        for key in lost.keys:
            self._fail(key, kind)

    # From the trainer.

    def _take_from_trainer(self) -> None:
        for identity, messages in self._trainer.take():
            for frame in messages:
                message = self._decode(self._trainer_wire, frame)
                if isinstance(message, BatchWanted):
                    is_repeated = message.step in self._askers
                    self._askers[message.step] = identity
                    self._batch_wanted_at = self._batch_wanted_at or time.time()
                    self._decide(message)
                    if is_repeated and self._state.wanted == message.step:
                        self._tell_trainer(identity, BatchPending(message.step, self._waiting_for()))
                elif isinstance(message, StepDone | CheckpointSaved):
                    self._decide(message)
                    self._tell_trainer(identity, Acknowledged.of(message))

    def _tell_trainer(self, identity: bytes, message: BatchReady | BatchPending | NoMoreBatches | Acknowledged) -> None:
        data = self._trainer_wire.encode(message)
        self._after_commit.append(partial(self._trainer.send, identity, [data]))

    def _decode(self, wire: Wire, frame: bytes) -> Any:
        try:
            return wire.decode(frame)
        except ProtocolError as error:
            raise HopelessError(f"a process of this run has another version of hone: {error}") from error
        except WireError as error:
            logger.error("a message is passed over: %s", error)
            return None

    # What was decided.

    def _perform(self, command: d.Command) -> None:
        match command:
            case d.StartGroup(number, version):
                self._start_group(number, version)
            case d.RunAgain(number, attempt, failures):
                if failures:
                    self._ledger.retry(number, attempt, failures)
                self._tally.num_again += 1
                self._run_attempts(number, [attempt], total(failures))
            case d.GiveUpAttempt(number, attempt, kind):
                self._tally.given_up[kind] += 1
                self._ledger.fail(number, attempt, kind)
            case d.FinishGroup(number):
                self._tell_curriculum(number, has_outcome=True)
                self._ledger.finish_group(number)
            case d.FilterGroup(number):
                self._tally.num_filtered += 1
                self._tell_curriculum(number, has_outcome=True)
                self._ledger.filter_group(number)
                self._forget(number)
            case d.DropGroup(number, kind):
                self._drop(number, str(kind))
            case d.DropStaleGroup(number):
                self._tally.num_stale += 1
                self._drop(number, "stale")
            case d.CancelGroup(number):
                self._cancel(number)
            case d.FormBatch(step, groups):
                self._form_batch(step, groups)
            case d.OfferBatch(step):
                self._offer_batch(step)
            case d.MarkTrained(step):
                self._ledger.train(step)
            case d.ForgetBatches(step):
                self._ledger.checkpoint(step)
                self._after_commit.append(partial(self._delete_batches, step))
            case d.LoadWeights(version):
                self._after_commit.append(partial(self._engine.want, version))
            case d.StartEvaluation(version):
                self._start_evaluation(version)
            case d.EndEarly(last_step, reason):
                logger.warning("training ends early", extra=fields(last_step=last_step, reason=reason))
                self._ledger.end_early(last_step)
            case d.EndTraining(last_step):
                self._tell_trainer(self._askers[last_step + 1], NoMoreBatches(last_step))
            case d.GiveUpRun(num_filtered, num_failed, kind):
                raise self._hopeless(num_filtered, num_failed, kind)
            case d.GiveUpCollapsed(num_filtered, reward, trained_reward):
                raise HopelessError(
                    f"policy collapsed: the last {num_filtered} groups had equal rewards of {reward:.4g} on average, below"
                    f" the {trained_reward:.4g} of the last batch; the checkpoints are kept: lower the learning rate, raise"
                    f" rl.loss.reference_kl or rl.group_size, and start a new run"
                )
            case d.EndRun():
                logger.info("all is trained and evaluated", extra=fields(step=self._state.last_step))

    def _start_group(self, number: int, version: int) -> None:
        draw = self._mixture.draw()
        attempts = list(range(self._section.group_size))
        task = self._task_of(draw)
        self._draws[number] = draw
        self._tasks[number] = draw.environment, task
        self._ledger.admit(number, draw, "" if task is None else task.key, version, len(attempts))
        self._run_attempts(number, attempts, num_failures=0)

    def _tell_curriculum(self, number: int, has_outcome: bool) -> None:
        """A group has ended; the ledger, which is told at the same time, says the same after a restart."""
        draw = self._draws[number]
        curriculum = self._mixture.curricula.get(draw.environment)
        if curriculum is None:
            return
        if not has_outcome:
            curriculum.leave_out(draw.index)
            return
        rewards = [trace.reward for trace in self._traces[number].values()]
        rate = solve_rate(rewards, self._reward_of_solved[draw.environment])
        curriculum.record(Outcome(draw.index, rate))

    def _task_of(self, draw: Draw) -> Task | None:
        """None when the environment does not give it: the group fails, the run goes on."""
        try:
            task = self._mixture.task(draw)
            assert task.key, "a task has a key"
        except Exception as error:  # code of an environment may raise anything
            self._last_failure = f"environment {draw.environment!r} gives no task {draw.number}: {error!r}"
            logger.warning("%s", self._last_failure)
            return None
        return task

    def _run_attempts(self, number: int, attempts: list[int], num_failures: int) -> None:
        environment, task = self._tasks[number]
        if task is None:
            for attempt in attempts:
                self._fail((group_name(number), attempt), FailureClass.ENVIRONMENT)
        else:
            self._submit_later(self._request(number, environment, task, attempts), num_failures)

    def _request(self, number: int, environment: str, task: Task, attempts: list[int]) -> RolloutRequest:
        name = group_name(number)
        # A task that comes again in another epoch gets other random numbers, a repeated attempt gets the same.
        seed = derive_seed(self._recipe.run.seed, "rollouts", name)
        return RolloutRequest(name, environment, task, attempts, self._sampling, seed)

    def _submit_later(self, request: RolloutRequest, num_failures: int) -> None:
        """At once after an interruption; ever later after failures, so that a broken world is not hammered.

        What one tick asks for of a group that is scored together becomes one request.
        """
        if request.environment in self._scored_together:
            before, _ = self._gathered.get(request.group, (None, 0))
            attempts = request.attempts if before is None else [*before.attempts, *request.attempts]
            self._gathered[request.group] = msgspec.structs.replace(request, attempts=attempts), num_failures
        else:
            self._submit_after(request, num_failures)

    def _submit_gathered(self) -> None:
        for request, num_failures in self._gathered.values():
            assert len(request.attempts) == self._size_of(request.group), f"{request.attempts} are not the whole group"
            self._submit_after(request, num_failures)
        self._gathered.clear()

    def _submit_after(self, request: RolloutRequest, num_failures: int) -> None:
        if num_failures == 0:
            self._dispatch.submit(request)
            return
        delay = min(RETRY_SECONDS * 2 ** (num_failures - 1), LONGEST_RETRY_SECONDS)
        asyncio.get_running_loop().call_later(delay, self._submit_now, request)

    def _submit_now(self, request: RolloutRequest) -> None:
        """What the delay has left of a request: a late answer may have come in the meantime."""
        attempts = [attempt for attempt in request.attempts if self._waits_for((request.group, attempt))]
        if attempts:
            self._dispatch.submit(msgspec.structs.replace(request, attempts=attempts))
            self._wake.set()

    def _send_requests(self) -> None:
        self._submit_gathered()
        outgoing: dict[bytes, list[bytes]] = {}
        for identity, request in self._dispatch.assign(time.monotonic()):
            if not request.group.startswith(PREFIX):
                self._ledger.run(int(request.group), request.attempts)
            outgoing.setdefault(identity, []).append(self._worker_wire.encode(request))
        for identity, frames in outgoing.items():
            self._after_commit.append(partial(self._tell_worker, identity, frames))

    def _tell_worker(self, identity: bytes, frames: list[bytes]) -> None:
        for start in range(0, len(frames), FRAMES_PER_MESSAGE):
            self._workers.send(identity, frames[start : start + FRAMES_PER_MESSAGE])

    def _forget(self, number: int) -> None:
        self._draws.pop(number, None)
        self._tasks.pop(number, None)
        self._traces.pop(number, None)

    def _drop(self, number: int, reason: str) -> None:
        self._tally.num_dropped += 1
        self._tell_curriculum(number, has_outcome=False)
        self._ledger.fail_group(number, reason)
        self._forget(number)

    def _cancel(self, number: int) -> None:
        name = group_name(number)
        self._held_back.pop(name, None)
        self._gathered.pop(name, None)
        message = self._worker_wire.encode(RolloutCancel(name))
        for identity in self._dispatch.withdraw(name):
            self._after_commit.append(partial(self._tell_worker, identity, [message]))
        self._tell_curriculum(number, has_outcome=False)
        self._ledger.fail_group(number, FailureClass.CANCELLED)
        self._forget(number)

    def _hopeless(self, num_filtered: int, num_failed: int, kind: FailureClass | None) -> Exception:
        if num_failed > num_filtered:
            text = f"{num_failed} groups in a row failed, the last rollout with: {self._last_failure}"
            return HopelessError(text) if kind is FailureClass.ENVIRONMENT else NothingToTrainError(text)
        return HopelessError(
            f"{num_filtered} groups in a row had equal rewards, so there is nothing to learn from: give easier or harder"
            f" tasks, train longer by SFT first, or set rl.filter_without_signal = false"
        )

    # Batches.

    def _form_batch(self, step: int, groups: Iterable[int]) -> None:
        numbers = list(groups)
        traces = [[trace for _, trace in sorted(self._traces.pop(number).items())] for number in numbers]
        made = make_batch(step, traces, self._section)
        write_batch(self._folder.batch_of(step), made.batch)
        self._ledger.batch(step, numbers, made.batch.num_samples)
        for number in numbers:
            self._forget(number)
        self._measure(step, made.metrics)

    def _measure(self, step: int, metrics: dict[str, float]) -> None:
        tally, self._tally = self._tally, Tally()
        state = self._state
        queues = {
            "rollout/running_count": state.num_running,
            "rollout/queued_count": self._dispatch.num_queued,
            "batch/ready_groups_count": state.num_ready,
            "batch/ahead_count": state.num_batches - state.trained,
        }
        pools = {
            f"rollout/{name}/pool_{pool}_count": float(count)
            for name, curriculum in self._mixture.curricula.items()
            for pool, count in curriculum.sizes().items()
        }
        self._metrics.write(metrics | tally.metrics() | queues | pools, step)
        times = tally.timing()
        for name, busy in (("generate", times.generate_seconds), ("score", times.score_seconds)):
            self._spans.record(name, times.started_at, times.total_seconds, step=step, busy_seconds=busy)

    def _offer_batch(self, step: int) -> None:
        self._ledger.offer(step)
        path = self._folder.relative(self._folder.batch_of(step))
        self._tell_trainer(self._askers[step], BatchReady(step, path))
        self._askers = {asked: identity for asked, identity in self._askers.items() if asked > step}
        if self._batch_wanted_at is not None:
            waited = time.time() - self._batch_wanted_at
            self._spans.record("wait", self._batch_wanted_at, waited, step=step)
            self._metrics.write({"batch/wait_seconds": waited}, step)
            self._batch_wanted_at = None

    def _delete_batches(self, through: int) -> None:
        for path in sorted(self._folder.batches.glob("step_*.batch")):
            if int(path.stem.removeprefix("step_")) <= through:
                path.unlink(missing_ok=True)

    # Evaluations.

    def _start_evaluation(self, version: int) -> None:
        self._evaluation = Evaluation(
            version,
            dict(self._environments),
            self._recipe.evaluation,
            run_seed=self._recipe.run.seed,
            retries=self._state.limits.retries,
        )
        self._evaluation_began = time.time()
        self._continue_evaluation()

    def _finish_evaluated(self, key: Key, trace: Trace) -> None:
        assert self._evaluation is not None, "results of no evaluation are not welcome"
        self._evaluation.finish(key, trace)
        self._continue_evaluation()

    def _continue_evaluation(self) -> None:
        evaluation = self._evaluation
        if evaluation is None:
            return
        for request in evaluation.start():
            self._submit_later(request, num_failures=0)
        if evaluation.is_complete:
            self._evaluation = None
            self._end_evaluation(evaluation)

    def _end_evaluation(self, evaluation: Evaluation) -> None:
        seconds = time.time() - self._evaluation_began
        path = self._folder.eval_of(evaluation.version)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(evaluation.report() | {"seconds": seconds}, indent=2))
        temporary.replace(path)
        self._metrics.write(evaluation.metrics() | {"eval/duration_seconds": seconds}, evaluation.version)
        self._spans.record("evaluate", self._evaluation_began, seconds, version=evaluation.version)
        logger.info("evaluated", extra=fields(version=evaluation.version, reward=evaluation.reward))
        self._events.append(d.EvaluationFinished(evaluation.version, evaluation.reward))

    # Beginning and end.

    def _resume(self) -> None:
        """Take up the run where its ledger has it; the first tick sends what follows."""
        limits = limits_of(self._recipe, self._section)
        found = recover(self._ledger, self._folder, limits, self._scored_together)
        self._ledger.note_steps(self._section.num_steps)
        self._state = found.state
        self._traces = found.traces
        restore_mixture(self._mixture, self._ledger, self._reward_of_solved)
        for number, drawn in found.drawn.items():
            self._draws[number] = drawn.draw
            self._tasks[number] = drawn.draw.environment, self._same_task(drawn.draw, drawn.task_key)
        for step in found.broken:
            self._make_again(step)
        self._restore_evaluations()
        self._decide(d.Resumed())
        for location, result in found.orphans:
            self._take_result(result, location)
        self._ledger.note_traces(self._writer.end)
        if found.state.next_group:
            logger.info(
                "the run goes on",
                extra=fields(step=found.state.trained, groups=len(found.state.groups), adopted=len(found.orphans)),
            )
        # What is loaded by now stays: spare the garbage collector from visiting it.
        gc.collect()
        gc.freeze()

    def _same_task(self, draw: Draw, task_key: str) -> Task | None:
        task = self._task_of(draw)
        if task is not None and task.key != task_key:
            raise LedgerError(
                f"task {draw.number} of environment {draw.environment!r} is not the one that this run began with;"
                f" install the environment's former version, or start a new run with another run.name"
            )
        return task

    def _make_again(self, step: int) -> None:
        """A batch whose file a power cut or a person has damaged, from the traces that it was made of."""
        logger.warning("a batch file is missing or damaged and is made again", extra=fields(step=step))
        [row] = [row for row in self._ledger.batches() if row.step == step]
        traces = read_group_traces(self._ledger, self._folder, row.groups)
        missing = [number for number in row.groups if number not in traces]
        if missing:
            raise LedgerError(
                f"the batch of step {step} and traces of its group {missing[0]} are gone from {self._folder.path};"
                f" restore them, or start a new run"
            )
        groups = [[trace for _, trace in sorted(traces[number].items())] for number in row.groups]
        write_batch(self._folder.batch_of(step), make_batch(step, groups, self._section).batch)

    def _restore_evaluations(self) -> None:
        for path in sorted(self._folder.evals.glob("v*.json")):
            report = json.loads(path.read_text())
            reward = report["reward_mean"]
            self._events.append(d.EvaluationFinished(report["version"], -math.inf if reward is None else reward))
            self._state.evaluated = max(self._state.evaluated, report["version"])

    def _recipe_token(self) -> str | None:
        variable = self._recipe.server.admin_token_variable
        if variable is None:
            return None
        token = os.environ.get(variable)
        if token is None:
            raise ConfigError(f"environment variable {variable} (server.admin_token_variable) is not set; set it")
        return token

    def _port(self) -> int | None:
        # The first port of the range is the trainer's.
        first = self._recipe.run.metrics_port
        return None if first is None else first + 1

    async def _own_worker(self, stack: AsyncExitStack) -> Coroutine[Any, Any, None]:
        """The env worker of a run without worker processes: the same code over the same sockets, in this loop."""
        channel = await stack.enter_async_context(TokenChannel(self._addresses.tokens))
        worker = Worker(
            "worker-0",
            self._addresses.workers,
            self._environments,
            TokenSampler(
                channel,
                Renderer(Tokenizer.load(self._folder.model)),
                deadline_seconds=self._section.rollout_timeout_seconds,
            ),
            limits=limits_from(self._recipe),
            heartbeat_seconds=self._recipe.workers.heartbeat_seconds,
            max_stall_seconds=self._recipe.workers.max_stall_seconds,
        )
        await stack.enter_async_context(worker)
        return worker.run()

    def _say_goodbye(self) -> None:
        message = self._worker_wire.encode(Shutdown("the run is over"))
        for identity in self._dispatch.identities:
            self._workers.send(identity, [message])

    # The clock.

    def _look_at_the_clock(self) -> None:
        now = time.monotonic()
        late = now - self._timer_at
        if late < TIMER_SECONDS:
            return
        self._timer_at = now
        heartbeat = self._recipe.workers.heartbeat_seconds
        if late > heartbeat + 2 * TIMER_SECONDS:  # a message may come just before the timer, which then starts anew
            self._dispatch.forgive(now)
        silence = max(SILENT_BEATS * heartbeat, STALLS_OF_SILENCE * self._recipe.workers.max_stall_seconds)
        for lost in self._dispatch.silent(now, silence):
            self._lose(lost)
        for key in self._dispatch.overdue(now, self._longest_rollout_seconds + GRACE_SECONDS):
            self._last_failure = "the worker did not end the rollout in time"
            self._fail(key, FailureClass.TIMEOUT)
        if self._state.ended and self._folder.is_exported():
            self._over = True
        if now - self._moved_at > REMIND_SECONDS:
            self._moved_at = now
            logger.warning("nothing happens; waiting for %s", self._waiting_for())

    def _waiting_for(self) -> str:
        if unserved := self._dispatch.unserved:
            return f"an env worker with environment {unserved[0]!r} ({self._dispatch.num_queued} requests are queued)"
        return d.waiting_for(self._state)


def _failure_of(trace: Trace, is_evaluated: bool) -> tuple[FailureClass, str] | None:
    """Why a rollout cannot be used: its class and what is said of it."""
    if trace.failure is not None:
        return trace.failure.kind, _complaint_of(trace.failure)
    try:
        if not is_evaluated:
            check_trainable(trace)
    except UntrainableTraceError as error:
        return error.kind, str(error)
    return None


def _complaint_of(failure: Failure) -> str:
    return f"{failure.kind} at {failure.where}: {failure.message}"


class _Background:
    """Tasks that run until the body ends; an error in one of them surfaces in `check`."""

    def __init__(self) -> None:
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> "_Background":
        return self

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.append(asyncio.create_task(work))

    def check(self) -> None:
        for task in self._tasks:
            if task.done():
                task.result()
                raise AssertionError(f"{task.get_name()} ended by itself")

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
