"""The orchestrator process: `python -m hone.orchestrator.loop RUN_FOLDER`.

A thin shell around `decide`. One tick takes everything that has arrived from env workers, trainer and engine, appends
finished traces to their segment, lets `decide` say what follows, records that in the ledger in one transaction, and
only then tells the others. So whatever anybody was told survives this process.
"""

import asyncio
import errno
import gc
import logging
import sqlite3
import sys
import time
from collections import deque
from collections.abc import Callable, Coroutine, Mapping
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

import zmq

from hone.config.load import ConfigError, load_recipe
from hone.config.recipe import Recipe, RlSection
from hone.envs.environment import Environment
from hone.envs.remote import environment_of
from hone.envs.worker import Worker, limits_from
from hone.inference.client import AdminClient, TokenChannel, TokenSampler
from hone.observability import logs
from hone.observability.logs import fields
from hone.observability.metrics import Metrics
from hone.observability.spans import Spans
from hone.orchestrator import events as e
from hone.orchestrator.audit import group_name
from hone.orchestrator.background import Background
from hone.orchestrator.batching import make_batch
from hone.orchestrator.decide import State, TrainerMismatchError, decide, waiting_for
from hone.orchestrator.dispatch import Dispatch
from hone.orchestrator.engine import EngineDriver
from hone.orchestrator.errors import HopelessError, NothingToTrainError
from hone.orchestrator.evaluation import PREFIX
from hone.orchestrator.evaluator import Evaluator, read_evaluated
from hone.orchestrator.groups import TrainingGroups
from hone.orchestrator.ledger import Ledger, LedgerError
from hone.orchestrator.purposes import Purpose
from hone.orchestrator.recovery import make_batch_again, recover, restore_mixture
from hone.orchestrator.requests import Requests
from hone.orchestrator.results import Results
from hone.orchestrator.settings import (
    admin_token_of,
    identity_of,
    limits_of,
    longest_rollout_seconds,
    metrics_port_of,
    mixture_of,
)
from hone.orchestrator.sockets import RouterSocket
from hone.orchestrator.trainer import TrainerSide
from hone.orchestrator.workers import WorkerSide
from hone.schema.sampling import SamplingParameters
from hone.schema.traces import FailureClass
from hone.text.rendering import Renderer
from hone.text.tokenizer import Tokenizer
from hone.transport.addresses import Addresses, PortInUseError, load_addresses
from hone.transport.batches import write_batch
from hone.transport.folders import RunFolder
from hone.transport.traces import TraceWriter

logger = logging.getLogger("hone.orchestrator.loop")

WILL_NEVER_WORK = 2
PAUSE_SECONDS = 0.005
"""What arrives within this time shares a tick, and so a transaction."""
SHORT_PAUSE_SECONDS = 0.001
"""The same while the trainer waits for a batch."""
TIMER_SECONDS = 0.2
REMIND_SECONDS = 30.0

HOPELESS = (ConfigError, HopelessError, LedgerError, PortInUseError, TrainerMismatchError)
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


class Orchestrator:
    """The tick of one run: takes what arrived, decides, performs what is decided, commits, and tells."""

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
        self._mixture = mixture_of(recipe, environments)
        self._limits = limits_of(recipe, section)
        self._scored_together = {name for name, environment in environments.items() if environment.scores_groups}
        self._reward_of_solved = {wanted.name: wanted.reward_of_solved for wanted in recipe.environments}
        self._state = State(self._limits)
        self._events: deque[e.Event] = deque()
        self._after_commit: list[Callable[[], None]] = []
        self._moved_at = time.monotonic()
        self._timer_at = time.monotonic()
        self._wake = asyncio.Event()
        self._over = False

    async def run(self) -> None:
        """Until everything is trained, evaluated and exported."""
        async with AsyncExitStack() as stack:
            await self._open(stack)
            self._resume()
            helpers = await stack.enter_async_context(Background())
            helpers.start(self._engine.run())
            if self._recipe.workers.num_workers == 0:
                helpers.start(await self._own_worker(stack))
            await self._serve(helpers)
            self._workers.say_goodbye()

    async def _serve(self, helpers: Background) -> None:
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

    # What a run consists of.

    async def _open(self, stack: AsyncExitStack) -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        stack.callback(context.term)
        workers = await stack.enter_async_context(RouterSocket(context, self._addresses.workers, self._wake.set))
        trainer = await stack.enter_async_context(RouterSocket(context, self._addresses.trainer, self._wake.set))
        self._spans = Spans(self._folder.spans, "orchestrator")
        stack.callback(self._spans.close)
        port = metrics_port_of(self._recipe)
        self._metrics = stack.enter_context(Metrics(self._folder.metrics, "orchestrator", port=port))
        self._ledger = stack.enter_context(Ledger(self._folder.ledger, identity_of(self._recipe, self._section)))
        self._writer = stack.enter_context(TraceWriter(self._folder.traces))
        client = AdminClient(self._addresses.admin, admin_token_of(self._recipe))
        admin = await stack.enter_async_context(client)
        self._engine = EngineDriver(admin, self._folder, self._post, self._spans)
        self._trainer = TrainerSide(
            trainer,
            decide=self._decide,
            obstacle_of=self._obstacle_of,
            after_commit=self._after_commit.append,
            spans=self._spans,
            metrics=self._metrics,
        )
        self._connect_rollouts(workers)

    def _connect_rollouts(self, socket: RouterSocket) -> None:
        """Requests go from a purpose by the queues of `Dispatch` to the env workers, results come back by `Results`."""
        self._dispatch = Dispatch(self._recipe.workers.max_rollouts_per_worker)
        requests = Requests(self._dispatch, self._scored_together, self._purpose_of, self._wake.set)
        self._results = Results(self._dispatch, self._scored_together, self._purpose_of, self._writer, self._ledger)
        self._groups = TrainingGroups(
            self._mixture,
            self._ledger,
            group_size=self._section.group_size,
            sampling=SamplingParameters(
                temperature=self._section.sampling.temperature, max_tokens=self._section.sampling.max_tokens
            ),
            run_seed=self._recipe.run.seed,
            reward_of_solved=self._reward_of_solved,
            is_pending=self._is_pending,
            submit=requests.submit,
            post=self._events.append,
        )
        self._evaluator = Evaluator(
            self._folder,
            self._environments,
            self._recipe.evaluation,
            run_seed=self._recipe.run.seed,
            retries=self._limits.retries,
            submit=requests.submit,
            post=self._events.append,
            spans=self._spans,
            metrics=self._metrics,
        )
        self._workers = WorkerSide(
            socket,
            self._dispatch,
            requests,
            self._results,
            after_commit=self._after_commit.append,
            note_stall=lambda beat: self._groups.tally.note_stall(beat),
            section=self._recipe.workers,
            rollout_seconds=longest_rollout_seconds(self._section, self._environments),
        )

    def _purpose_of(self, group: str) -> Purpose:
        return self._evaluator if group.startswith(PREFIX) else self._groups

    def _is_pending(self, number: int, attempt: int) -> bool:
        group = self._state.groups.get(number)
        return group is not None and attempt in group.pending

    def _resume(self) -> None:
        """Take up the run where its ledger has it; the first tick sends what follows."""
        found = recover(self._ledger, self._folder, self._limits, self._scored_together)
        self._ledger.note_steps(self._section.num_steps)
        self._state = found.state
        restore_mixture(self._mixture, self._ledger, self._reward_of_solved)
        self._groups.restore(found.drawn, found.traces)
        for step in found.broken:
            make_batch_again(self._ledger, self._folder, step, self._section)
        for evaluated in read_evaluated(self._folder):
            self._events.append(evaluated)
            self._state.evaluated = max(self._state.evaluated, evaluated.version)
        self._decide(e.Resumed())
        for location, result in found.orphans:
            self._results.take(result, location)
        self._ledger.note_traces(self._writer.end)
        if found.state.next_group:
            logger.info(
                "the run goes on",
                extra=fields(step=found.state.trained, groups=len(found.state.groups), adopted=len(found.orphans)),
            )
        # What is loaded by now stays: spare the garbage collector from visiting it.
        gc.collect()
        gc.freeze()

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

    # One tick.

    def _tick(self) -> None:
        if self._workers.take():
            self._moved_at = time.monotonic()
        self._trainer.take()
        while self._events:
            events = list(self._events)
            self._events.clear()
            self._decide(*events)
        self._workers.send_requests()
        self._commit()

    def _post(self, event: e.Event) -> None:
        self._events.append(event)
        self._wake.set()

    def _decide(self, *events: e.Event) -> None:
        self._state, commands = decide(self._state, *events)
        if commands:
            self._moved_at = time.monotonic()
        for command in commands:
            self._perform(command)

    def _commit(self) -> None:
        self._ledger.commit()
        for tell in self._after_commit:
            tell()
        self._after_commit.clear()

    # What was decided.

    def _perform(self, command: e.Command) -> None:
        match command:
            case e.StartGroup(number, version):
                self._groups.start(number, version)
            case e.RunAgain(number, attempt, failures):
                self._groups.run_again(number, attempt, failures)
            case e.GiveUpAttempt(number, attempt, kind):
                self._groups.give_up_attempt(number, attempt, kind)
            case e.FinishGroup(number):
                self._groups.finish_group(number)
            case e.FilterGroup(number):
                self._groups.filter(number)
            case e.DropGroup(number, kind):
                self._groups.drop(number, kind)
            case e.DropStaleGroup(number):
                self._groups.drop_stale(number)
            case e.CancelGroup(number):
                self._workers.cancel(group_name(number))
                self._groups.cancel(number)
            case e.FormBatch(step, groups):
                self._form_batch(step, groups)
            case e.OfferBatch(step):
                self._ledger.offer(step)
                self._trainer.offer(step, self._folder.relative(self._folder.batch_of(step)))
            case e.MarkTrained(step):
                self._ledger.train(step)
            case e.ForgetBatches(step):
                self._ledger.checkpoint(step)
                self._after_commit.append(partial(self._delete_batches, step))
            case e.LoadWeights(version):
                self._after_commit.append(partial(self._engine.want, version))
            case e.StartEvaluation(version):
                self._evaluator.start(version)
            case e.EndEarly(last_step, reason):
                logger.warning("training ends early", extra=fields(last_step=last_step, reason=reason))
                self._ledger.end_early(last_step)
            case e.EndTraining(last_step):
                self._trainer.end(last_step)
            case e.GiveUpRun(num_filtered, num_failed, kind):
                raise self._hopeless(num_filtered, num_failed, kind)
            case e.GiveUpCollapsed(num_filtered, reward, trained_reward):
                raise HopelessError(
                    f"policy collapsed: the last {num_filtered} groups had equal rewards of {reward:.4g} on average, below"
                    f" the {trained_reward:.4g} of the last batch; the checkpoints are kept: lower the learning rate, raise"
                    f" rl.loss.reference_kl or rl.group_size, and start a new run"
                )
            case e.EndRun():
                logger.info("all is trained and evaluated", extra=fields(step=self._state.last_step))

    def _hopeless(self, num_filtered: int, num_failed: int, kind: FailureClass | None) -> Exception:
        if num_failed > num_filtered:
            complaint = self._groups.last_complaint
            text = f"{num_failed} groups in a row failed, the last rollout with: {complaint}"
            return HopelessError(text) if kind is FailureClass.ENVIRONMENT else NothingToTrainError(text)
        return HopelessError(
            f"{num_filtered} groups in a row had equal rewards, so there is nothing to learn from: give easier or harder"
            f" tasks, train longer by SFT first, or set rl.filter_without_signal = false"
        )

    def _form_batch(self, step: int, groups: tuple[int, ...]) -> None:
        made = make_batch(step, self._groups.traces_of(groups), self._section)
        write_batch(self._folder.batch_of(step), made.batch)
        self._ledger.batch(step, groups, made.batch.num_samples)
        self._groups.hand_over(groups)
        self._measure(step, made.metrics)

    def _delete_batches(self, through: int) -> None:
        for path in sorted(self._folder.batches.glob("step_*.batch")):
            if int(path.stem.removeprefix("step_")) <= through:
                path.unlink(missing_ok=True)

    def _measure(self, step: int, metrics: dict[str, float]) -> None:
        tally = self._groups.end_tally()
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
        phases = [("generate", times.generate_seconds), ("score", times.score_seconds)]
        if times.sandbox_seconds:
            phases.append(("sandbox", times.sandbox_seconds))
        for name, busy in phases:
            self._spans.record(name, times.started_at, times.total_seconds, step=step, busy_seconds=busy)

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
        self._workers.give_up_silent(now)
        self._workers.give_up_overdue(now)
        if self._state.ended and self._folder.is_exported():
            self._over = True
        if now - self._moved_at > REMIND_SECONDS:
            self._moved_at = now
            logger.warning("nothing happens; waiting for %s", self._waiting_for())

    def _obstacle_of(self, step: int) -> str | None:
        """What a batch that the trainer has asked for waits for; None when nothing is owed."""
        return self._waiting_for() if self._state.wanted == step else None

    def _waiting_for(self) -> str:
        if unserved := self._dispatch.unserved:
            return f"an env worker with environment {unserved[0]!r} ({self._dispatch.num_queued} requests are queued)"
        return waiting_for(self._state)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
