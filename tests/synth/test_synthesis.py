"""Rollouts of a teacher to training data: resumed, selected anew, described by a card."""

import asyncio
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tomli_w

from fakes import ScriptedSampler
from hone.config.load import ConfigError, load_synthesis
from hone.config.synthesis import SynthesisFile
from hone.envs import group_reward, load_environment
from hone.envs.attempts import assign
from hone.envs.environment import SingleTurn
from hone.envs.rubric import Rubric
from hone.schema.messages import Message
from hone.schema.sampling import FinishReason, SamplingParameters, Turn
from hone.schema.seeds import derive_seed
from hone.synth.card import histogram
from hone.synth.synthesis import synthesise, texts_in
from hone.synth.teach import TeacherError, finished_traces, teach, wanted_attempts
from hone.transport.traces import read_traces


def settings_of(tmp_path, *, name="arithmetic", target="http://nowhere", model="m", **sections):
    tree = {
        "synthesis": {"folder": str(tmp_path)},
        "teacher": {"target": target} | ({"model": model} if model else {}),
        "environments": [{"name": name}],
        "rollouts": {"num_tasks": 6, "num_attempts": 2, "max_concurrent": 4},
        "decontamination": {"held_out_tasks": 50},
    }
    for section, values in sections.items():
        tree[section] = tree.get(section, {}) | values
    return SynthesisFile.model_validate(tree)


def solve(branch):
    first, symbol, second = branch[0].message.content.split()[2:5]
    left, right = int(first), int(second.rstrip("?"))
    return str({"+": left + right, "-": left - right, "*": left * right}[symbol])


def rows_in(made):
    (path,) = (path for path in made.files if path.suffix == ".jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


async def test_kept_conversations_are_written_once_a_task(tmp_path):
    sampler = ScriptedSampler(solve)
    made = await synthesise(settings_of(tmp_path), sampler)
    rows = rows_in(made)
    assert len(sampler.calls) == 12
    assert made.num_kept == len(rows) == 6
    assert {row["teacher"] for row in rows} == {"m"}
    for row in rows:
        question, answer = row["messages"]
        assert question["content"].startswith("What is")
        assert row["reward"] == 1
        assert answer["content"]
    assert [path.name for path in made.files] == ["train.parquet", "train.jsonl"]


async def test_wrong_answers_failures_and_truncations_are_left_out_and_told(tmp_path):
    def script(branch):
        question = branch[0].message.content
        kind = derive_seed(0, "kind", question) % 4
        if kind == 0:
            return ConnectionError("gone")
        if kind == 1 and len(branch) < 3:
            return "0.5"
        return solve(branch)

    made = await synthesise(settings_of(tmp_path, rollouts={"num_tasks": 40}), ScriptedSampler(script))
    dropped = {stage.name: stage.num_dropped for stage in made.stages}
    assert made.failures["model"] > 0
    assert dropped["reward"] > 0
    assert sum(made.failures.values()) + sum(dropped.values()) + made.num_kept == 80
    card = (made.folder / "README.md").read_text()
    assert f"failed rollouts: {made.failures['model']} model" in card
    assert "Dropped by *reward*, for example:" in card


async def test_the_card_tells_sources_counts_and_hashes(tmp_path):
    made = await synthesise(settings_of(tmp_path), ScriptedSampler(solve))
    card = (made.folder / "README.md").read_text()
    for path in made.files:
        assert hashlib.sha256(path.read_bytes()).hexdigest() in card
    assert "6 conversations" in card
    assert "`m` at http://nowhere" in card
    assert "| equal to another | 6 | 6 |" in card
    assert load_synthesis(made.folder / "synth.toml").rollouts.num_tasks == 6


async def test_the_same_settings_give_the_same_files(tmp_path):
    first = await synthesise(settings_of(tmp_path / "a"), ScriptedSampler(solve))
    second = await synthesise(settings_of(tmp_path / "b", rollouts={"max_concurrent": 1}), ScriptedSampler(solve))
    assert rows_in(first) == rows_in(second)


async def test_a_finished_synthesis_is_selected_anew_without_a_rollout(tmp_path):
    await synthesise(settings_of(tmp_path), ScriptedSampler(solve))
    sampler = ScriptedSampler(solve)
    made = await synthesise(settings_of(tmp_path, keep={"max_characters": 2}, output={"formats": ["jsonl"]}), sampler)
    assert sampler.calls == []
    assert 0 < made.num_kept < 6
    assert not (made.folder / "data" / "train.parquet").exists()


async def test_more_attempts_add_to_what_is_there_and_fewer_tasks_leave_the_others_out(tmp_path):
    await synthesise(settings_of(tmp_path), ScriptedSampler(solve))
    sampler = ScriptedSampler(solve)
    await synthesise(settings_of(tmp_path, rollouts={"num_attempts": 3}), sampler)
    assert len(sampler.calls) == 6
    made = await synthesise(settings_of(tmp_path, rollouts={"num_tasks": 2}), sampler)
    assert len(sampler.calls) == 6
    assert made.num_kept == 2


async def test_failed_rollouts_are_tried_again(tmp_path):
    script = iter([ConnectionError("gone")] * 3)
    made = await synthesise(settings_of(tmp_path), ScriptedSampler(lambda branch: next(script, None) or solve(branch)))
    assert made.failures == {"model": 3}
    again = ScriptedSampler(solve)
    made = await synthesise(settings_of(tmp_path), again)
    assert len(again.calls) == 3
    assert made.failures == {}


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"synthesis": {"seed": 7}}, "seed"),
        ({"teacher": {"model": "other"}}, "teacher"),
        ({"rollouts": {"sampling": {"temperature": 0.5}}}, "sampling"),
        ({"environments": [{"name": "arithmetic", "arguments": {"max_operand": 9}}]}, "environments"),
    ],
)
async def test_a_folder_of_another_synthesis_is_refused(tmp_path, change, name):
    await synthesise(settings_of(tmp_path), ScriptedSampler(solve))
    tree = settings_of(tmp_path).model_dump(mode="json")
    other = SynthesisFile.model_validate(
        {
            key: value | change.get(key, {}) if isinstance(value, dict) else change.get(key, value)
            for key, value in tree.items()
        }
    )
    with pytest.raises(ValueError, match=f"holds a synthesis with {name} = "):
        await synthesise(other, ScriptedSampler(solve))


async def test_a_folder_is_worked_in_by_one_process_at_a_time(tmp_path):
    slow = asyncio.create_task(synthesise(settings_of(tmp_path), ScriptedSampler(solve, seconds=0.2)))
    while not (tmp_path / "synthesis" / "settings.json").exists():
        await asyncio.sleep(0.01)
    with pytest.raises(ValueError, match="another process works in"):
        await synthesise(settings_of(tmp_path), ScriptedSampler(solve))
    await slow


async def test_a_teacher_that_never_answers_ends_it_early(tmp_path):
    sampler = ScriptedSampler([ConnectionError("no route to host")])
    with pytest.raises(TeacherError, match=r"answered none of 32 rollouts: .*no route to host"):
        await synthesise(settings_of(tmp_path, rollouts={"num_tasks": 500}), sampler)
    assert len(sampler.calls) < 50


async def test_nothing_left_is_told_with_the_counts(tmp_path):
    with pytest.raises(ValueError, match=r"no conversation is left of 12 .* reward 12"):
        await synthesise(settings_of(tmp_path), ScriptedSampler(["no"]))


async def test_held_out_tasks_and_files_are_kept_out(tmp_path):
    traces = tmp_path / "first"
    made = await synthesise(settings_of(traces), ScriptedSampler(solve))
    asked = [row["messages"][0]["content"] for row in rows_in(made)]
    (tmp_path / "eval.txt").write_text("\n".join(asked[:2]))
    (tmp_path / "eval.jsonl").write_text(json.dumps({"nested": [{"question": asked[2]}]}) + "\n")
    files = [str(tmp_path / "eval.txt"), str(tmp_path / "eval.jsonl")]
    made = await synthesise(settings_of(traces, decontamination={"files": files}), ScriptedSampler(solve))
    assert sorted(row["messages"][0]["content"] for row in rows_in(made)) == sorted(asked[3:])
    contaminated = next(stage for stage in made.stages if stage.name == "contaminated")
    assert str(tmp_path / "eval") in contaminated.examples[0].reason
    with pytest.raises(ValueError, match="cannot read"):
        list(texts_in(tmp_path / "absent.jsonl"))


async def test_gold_answers_are_a_teacher_too(tmp_path):
    made = await synthesise(settings_of(tmp_path, target="gold", model=None, rollouts={"num_attempts": 1}), None)
    assert made.num_kept == 6
    assert {row["teacher"] for row in rows_in(made)} == {"gold"}


async def test_rollouts_of_a_group_are_made_together_and_again_together(tmp_path):
    @group_reward
    def share(answers):
        return [answers.count(answer) / len(answers) for answer in answers]

    tasks = [load_environment("arithmetic").train_task(index) for index in range(2)]
    environment = SingleTurn(name="voted", rubric=Rubric([share]), train=tasks)
    wanted = wanted_attempts({"voted": environment}, {"voted": 2}, 3)
    assert [assignment.attempts for assignment in wanted] == [(0, 1, 2), (0, 1, 2)]
    script = iter(["4", "4", "5", "1", ConnectionError("gone"), "1"])
    arguments = {"sampling": SamplingParameters(), "seed": 0, "max_concurrent": 2, "traces": tmp_path}
    first = ScriptedSampler(lambda branch: next(script))
    await teach(wanted, lambda assignment: first, **arguments)
    rewards = [trace.reward for _, trace in finished_traces(tmp_path, wanted[:1])]
    assert rewards == pytest.approx([2 / 3, 2 / 3, 1 / 3])
    again = ScriptedSampler(["1"])
    await teach(wanted, lambda assignment: again, **arguments)
    assert len(again.calls) == 3
    assert [trace.reward for _, trace in finished_traces(tmp_path, wanted[1:])] == [1, 1, 1]
    assert len(assign(environment, environment.train_task(0), range(2))) == 1


TEACHER = """
import asyncio, sys
from fakes import ScriptedSampler
from test_synthesis import settings_of, solve
from hone.synth.synthesis import synthesise
from pathlib import Path
asyncio.run(synthesise(settings_of(Path(sys.argv[1]), rollouts={"num_tasks": 40}), ScriptedSampler(solve, seconds=0.05)))
"""


@pytest.mark.slow
def test_a_killed_synthesis_goes_on_where_it_stopped(tmp_path):
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen([sys.executable, "-c", TEACHER, str(tmp_path)], env=os.environ | {"PYTHONPATH": path})
    traces = tmp_path / "synthesis" / "traces"
    deadline = time.monotonic() + 60
    while len(list(read_traces(traces))) < 10:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    num_kept = len(list(read_traces(traces)))
    assert 10 <= num_kept < 80
    sampler = ScriptedSampler(solve)
    made = asyncio.run(synthesise(settings_of(tmp_path, rollouts={"num_tasks": 40}), sampler))
    assert len(sampler.calls) == 80 - num_kept
    identities = [(r.trace.task.key, r.trace.attempt) for _, r in read_traces(traces)]
    assert len(identities) == len(set(identities)) == 80
    assert made.num_kept == 40


class Reasons:
    """A teacher that thinks."""

    async def sample(self, branch, tools, sampling):
        message = Message("assistant", solve(branch), reasoning="first the one, then the other")
        return Turn(message, FinishReason.STOP)


async def test_reasoning_is_written(tmp_path):
    made = await synthesise(settings_of(tmp_path), Reasons())
    assert {row["messages"][1]["reasoning_content"] for row in rows_in(made)} == {"first the one, then the other"}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"teacher": {"target": "http://x", "model": None}}, "teacher.model is missing"),
        ({"teacher": {"target": "gold"}}, "have an effect with an http address only"),
        ({"rollouts": {"num_tasks": 0}}, "rollouts.num_tasks = 0"),
        ({"keep": {"max_per_task": 3}}, "keep.max_per_task 3 is more than rollouts.num_attempts 2"),
        ({"keep": {"near_duplicate": 0.5}}, "did you mean near_duplicates"),
        ({"output": {"formats": []}}, "output.formats is empty"),
        ({"output": {"formats": ["csv"]}}, "output.formats.0"),
        ({"decontamination": {"words": 2}}, "decontamination.words"),
    ],
)
def test_settings_without_meaning_are_refused(tmp_path, change, complaint):
    tree = settings_of(tmp_path).model_dump(mode="json", exclude_none=True)
    for section, values in change.items():
        tree[section] = {k: v for k, v in (tree[section] | values).items() if v is not None}
    path = tmp_path / "wrong.toml"
    path.write_text(tomli_w.dumps(tree))
    with pytest.raises(ConfigError, match=complaint):
        load_synthesis(path)


def test_the_histogram_has_a_bar_for_each_power_of_two():
    assert histogram([0, 1, 3, 3, 9]).splitlines() == [
        "        0 to         0         1 ████████████████████",
        "        1 to         1         1 ████████████████████",
        "        2 to         3         2 ████████████████████████████████████████",
        "        4 to         7         0",
        "        8 to        15         1 ████████████████████",
    ]
    assert histogram([]) == "nothing"
