"""Environments in other Pythons: two real virtual environments with packages that cannot be in one."""

import asyncio
import contextlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fakes import ScriptedSampler
from hone.config.load import recipe_from
from hone.config.recipe import EnvironmentSection
from hone.envs import (
    EnvironmentLoadError,
    FailureClass,
    Limits,
    Task,
    ToolSpec,
    assistant,
    load_environment,
    run_group,
    run_rollout,
    user,
)
from hone.envs.remote import RemoteEnvironment, environment_of, interpreter
from hone.evals.evaluate import Cell, Plan, complete, evaluate
from hone.evals.storage import read_traces
from hone.launch.plan import plan_rl
from hone.schema import wire
from hone.schema.sampling import SamplingParameters
from hone.schema.traces import Reward, Trace

ENVIRONMENT = '''
"""An environment whose reward is what the installed version of `shade` says."""
import os, shade
from hone.envs import Rubric, SingleTurn, Task, assistant, reward, user

@reward
def as_dark_as_the_package(answer):
    return float(answer == shade.shade())

def load_environment(crash_at=None):
    def give(index):
        if index == crash_at:
            os._exit(3)
        print("environments may print")
        return Task(prompt=(user(f"{shade.shade()} {index}"),), reference=shade.shade())
    from hone.envs import Tasks, ToolSpec
    return SingleTurn(
        name="NAME", rubric=Rubric([as_dark_as_the_package]), train=Tasks(give, 5), held_out=[give(99)],
        tools=[ToolSpec("mix", "Mix.", {})],
        gold=lambda task: [assistant(task.reference)], difficulty=lambda task: 1.0,
    )
'''


def write_wheel(folder, name, version, code, requires=None, entry=None):
    """A wheel of one module, written by hand: no build tool is needed."""
    module, info = name.replace("-", "_"), f"{name.replace('-', '_')}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    files = {
        f"{module}.py": code,
        f"{info}/METADATA": metadata + (f"Requires-Dist: {requires}\n" if requires else ""),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    if entry is not None:
        files[f"{info}/entry_points.txt"] = f"[hone.environments]\n{entry} = {module}:load_environment\n"
    files[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    wheel = folder / f"{module}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, content in files.items():
            archive.writestr(path, content)
    return str(wheel)


def make_venv(folder, *packages, with_hone=True):
    """A virtual environment that sees what the tests see, and has these packages of its own."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    if packages:
        install = [python, "-m", "pip", "install", "--quiet", "--no-index", *packages]
        subprocess.run(install, check=True)
    if with_hone:
        (site,) = folder.glob("lib/python*/site-packages")
        (site / "tests.pth").write_text("\n".join(path for path in sys.path if path and Path(path).is_dir()))
    return folder


@pytest.fixture(scope="module")
def venvs(tmp_path_factory):
    root = tmp_path_factory.mktemp("venvs")
    made = {}
    for color, version in (("light", "1.0"), ("dark", "2.0")):
        shade = write_wheel(root, "shade", version, f"def shade():\n    return {color!r}\n")
        code = ENVIRONMENT.replace("NAME", color)
        environment = write_wheel(root, f"hone-{color}", "0.1", code, f"shade=={version}", entry=color)
        made[color] = make_venv(root / f"venv-{color}", shade, environment)
    return made


@pytest.fixture
def environments(venvs):
    with contextlib.ExitStack() as stack:

        def load(name, **arguments):
            environment = environment_of(EnvironmentSection(name=name, python=str(venvs[name]), arguments=arguments))
            assert isinstance(environment, RemoteEnvironment)
            stack.callback(environment.close)
            return environment

        yield load


@pytest.mark.slow
def test_two_environments_need_versions_of_a_package_that_exclude_each_other(environments):
    for color in ("light", "dark"):
        environment = environments(color)
        assert (environment.name, environment.version) == (color, "0.1")
        assert (environment.num_train_tasks, environment.num_held_out_tasks) == (5, 1)
        task = environment.train_task(3)
        assert task.prompt == (user(f"{color} 3"),)
        assert environment.held_out_task(0).prompt == (user(f"{color} 99"),)
        assert environment.gold(task) == [assistant(color)]
        assert environment.difficulty(task) == 1.0
        assert not environment.scores_groups
        assert environment.tools == (ToolSpec("mix", "Mix.", {}),)
        assert environment.tools_are_known
        for value in (1.0, 0.0):
            trace = Trace(color, task, 0, rewards={"r": Reward(value)})
            assert environment.is_solved(trace) is (value == 1.0)
        with pytest.raises(IndexError):
            environment.train_task(5)
    with pytest.raises(EnvironmentLoadError, match=r"not installed"):
        load_environment("light")


@pytest.mark.slow
def test_a_process_that_dies_over_a_question_is_started_again_and_named_when_it_dies_again(environments):
    environment = environments("light", crash_at=2)
    with pytest.raises(EnvironmentLoadError, match=r"'light' in .* ended with 3"):
        environment.train_task(2)
    assert environment.train_task(1).reference == "light"
    environment._remote._process.kill()
    assert environment.train_task(1).reference == "light"


@pytest.mark.slow
async def test_rollouts_run_there_and_are_sampled_here(environments):
    light, dark = environments("light"), environments("dark")
    sampler = ScriptedSampler(["light"], seconds=0.01, version=3)
    for environment, rewards in ((light, [1.0] * 4), (dark, [0.0] * 4)):
        task = environment.train_task(0)
        traces = await run_group(environment, task, range(4), sampler, SamplingParameters(max_tokens=9), 7, group="g")
        assert [trace.reward for trace in traces] == rewards
        assert [(trace.environment, trace.group, trace.min_version) for trace in traces] == [
            (environment.name, "g", 3)
        ] * 4
    result = await evaluate(light, sampler, num_tasks=1, attempts=3, sampling=SamplingParameters(max_tokens=9))
    assert (result.num_rollouts, result.reward.mean) == (3, 1.0)
    limits = Limits(max_turns=1, max_tool_calls=2, max_tokens=3, budget_seconds=60, deadline_seconds=30)
    waiting = run_rollout(light, light.train_task(0), 0, sampler, SamplingParameters(), 0, limits)
    cut = await asyncio.wait_for(waiting, 10)
    assert (cut.failure, cut.num_completion_tokens, cut.is_truncated) == (None, 3, True)
    refused = await run_rollout(
        light, light.train_task(0), 0, ScriptedSampler([ConnectionError("no route")]), SamplingParameters(), 0
    )
    assert refused.failure.kind is FailureClass.MODEL
    assert "no route" in refused.failure.message
    await light.aclose()
    await dark.aclose()


@pytest.mark.slow
async def test_rollouts_of_a_process_that_dies_are_failures_of_a_worker_and_the_next_ones_run(environments):
    environment = environments("light")
    task = environment.train_task(0)
    slow = ScriptedSampler(["light"], seconds=60)
    waiting = asyncio.create_task(run_rollout(environment, task, 0, slow, SamplingParameters(), 0))
    while not slow.num_waiting:
        await asyncio.sleep(0.01)
    environment._relay._channel._process.kill()
    trace = await asyncio.wait_for(waiting, 10)
    assert (trace.failure.kind, trace.task) == (FailureClass.WORKER, task)
    trace = await run_rollout(environment, task, 0, ScriptedSampler(["light"]), SamplingParameters(), 0)
    assert trace.reward == 1.0
    await environment.aclose()


@pytest.mark.slow
async def test_a_rollout_that_is_given_up_in_the_moment_of_its_result_leaves_the_others_theirs(environments):
    environment = environments("light")
    task = environment.train_task(0)
    slow = ScriptedSampler(["light"], seconds=0.2)
    attempts = [
        asyncio.create_task(run_rollout(environment, task, attempt, slow, SamplingParameters(), 0))
        for attempt in range(2)
    ]
    while slow.num_waiting < 2:
        await asyncio.sleep(0.01)
    channel = environment._relay._channel
    given_up = channel._results[0]
    while not given_up.done():  # as a cancellation does whose task has not run yet
        given_up.cancel()
    traces = await asyncio.wait_for(asyncio.gather(*attempts, return_exceptions=True), 10)
    assert isinstance(traces[0], asyncio.CancelledError)
    assert traces[1].reward == 1.0
    await environment.aclose()


@pytest.mark.slow
async def test_a_turn_that_cannot_be_sent_is_a_failure_of_the_model_at_once(environments):
    environment = environments("light")
    sampler = ScriptedSampler(["\udc80"])
    waiting = run_rollout(environment, environment.train_task(0), 0, sampler, SamplingParameters(), 0)
    trace = await asyncio.wait_for(waiting, 10)
    assert trace.failure.kind is FailureClass.MODEL
    await environment.aclose()


@pytest.mark.slow
async def test_an_answer_that_cannot_be_read_fails_the_rollouts_at_once_and_the_next_ones_run(environments):
    environment = environments("light")
    task = environment.train_task(0)
    slow = ScriptedSampler(["light"], seconds=0.2)
    waiting = asyncio.create_task(run_rollout(environment, task, 0, slow, SamplingParameters(), 0))
    while not slow.num_waiting:
        await asyncio.sleep(0.01)
    environment._relay._channel._in = wire.Wire(Task)  # which knows none of the messages that come
    trace = await asyncio.wait_for(waiting, 10)
    assert trace.failure.kind is FailureClass.WORKER
    assert "cannot be read" in trace.failure.message
    trace = await run_rollout(environment, task, 0, ScriptedSampler(["light"]), SamplingParameters(), 0)
    assert trace.reward == 1.0
    await environment.aclose()


@pytest.mark.slow
async def test_workers_killed_during_an_evaluation_lose_and_double_nothing(environments, tmp_path):
    environment = environments("light")
    plan = Plan(environment, num_tasks=1, attempts=12, folder=tmp_path)
    sampler = ScriptedSampler(["light"], seconds=0.05)
    for kills in (2, 0):
        with Cell(plan) as cell:
            running = asyncio.create_task(complete([cell], sampler, max_concurrent=4))
            for _ in range(kills):
                while not sampler.num_waiting:
                    await asyncio.sleep(0.01)
                environment._relay._channel._process.kill()
                await environment._relay._channel.gone()
            await running
            result = cell.conclude()
        assert result.num_rollouts == 12
        assert set(result.failures) == ({FailureClass.WORKER} if kills else set())
    assert result.reward.mean == 1.0
    valid = [trace.attempt for trace in read_traces(tmp_path / "traces.jsonl") if trace.failure is None]
    assert sorted(valid) == list(range(12))
    await environment.aclose()


@pytest.mark.slow
def test_what_is_missing_in_the_other_python_is_said_at_the_start(venvs, environments, tmp_path):
    with pytest.raises(EnvironmentLoadError, match=r"'dark' is not installed \(installed: .*light"):
        RemoteEnvironment("dark", {}, interpreter(str(venvs["light"])))
    with pytest.raises(EnvironmentLoadError, match=r"nonsense.*its arguments are crash_at"):
        environments("light", nonsense=1)
    bare = make_venv(tmp_path / "bare", with_hone=False)
    # The tests' own PYTHONPATH would give it hone.
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\nPYTHONPATH= exec {bare}/bin/python "$@"\n')
    script.chmod(0o755)
    with pytest.raises(EnvironmentLoadError, match=r"pip install 'hone\[text\]'"):
        RemoteEnvironment("dark", {}, script)


@pytest.mark.slow
def test_another_protocol_version_is_said_at_the_start(venvs, monkeypatch):
    monkeypatch.setattr(wire, "PROTOCOL", wire.PROTOCOL + 1)
    with pytest.raises(EnvironmentLoadError, match=r"run the same version of hone everywhere"):
        RemoteEnvironment("light", {}, interpreter(str(venvs["light"])))


def test_a_path_that_is_no_python_is_said_at_the_start(tmp_path):
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(EnvironmentLoadError, match=f"there is no Python at {path}"):
            interpreter(str(path))
    assert interpreter(sys.executable) == Path(sys.executable)


def recipe_with(*environments, num_workers=2):
    tree = {"model": {"path": "unused"}, "rl": {}, "environments": list(environments)}
    return recipe_from(tree | {"workers": {"num_workers": num_workers}}, "test")


def test_each_python_has_workers_of_its_own(tmp_path):
    other = tmp_path / "bin" / "python"
    other.parent.mkdir()
    other.symlink_to(sys.executable)
    recipe = recipe_with({"name": "a"}, {"name": "b", "python": str(tmp_path)}, {"name": "c"})
    workers = {plan.name: plan.command for plan in plan_rl(recipe, tmp_path) if plan.name.startswith("worker")}
    run = str(tmp_path)
    assert workers == {
        f"worker-{i}": (sys.executable, "-m", "hone.envs.worker", run, f"worker-{i}", "a", "c") for i in range(2)
    } | {f"worker-b-{i}": (str(other), "-m", "hone.envs.worker", run, f"worker-b-{i}", "b") for i in range(2)}


def test_an_environment_with_a_python_of_its_own_needs_worker_processes():
    with pytest.raises(ValueError, match=r"set workers.num_workers to 1 or more"):
        recipe_with({"name": "a", "python": "somewhere"}, num_workers=0)
