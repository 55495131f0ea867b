"""What `hone env validate` proves of an environment, task after task and without a model."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from hone.envs.attacks import NAMES, Attack, attacks_on, gold_turns
from hone.envs.environment import Environment
from hone.envs.failures import describe
from hone.envs.fingerprint import PlacedTask, fingerprint, first_tasks
from hone.envs.leftovers import growth_since, holdings, private_temporary_folder
from hone.envs.messages import assistant
from hone.envs.validation import Answers, GoldError, check_gold, play_answers
from hone.schema.tasks import Task
from hone.schema.traces import FailureClass, Trace

NUM_SPLIT_TASKS = 2000
"""So many tasks of each split are compared with one another: making tasks is cheap, playing them is not."""
TOLERANCE = 1e-9


@dataclass(slots=True)
class Check:
    """One claim about an environment: how many times it was tried, and where it does not hold.

    problems: one sentence each, with the place. not_tried: why it could not be tried at all; nothing is proven then.
    """

    name: str
    num_tried: int = 0
    problems: list[str] = field(default_factory=list)
    not_tried: str = ""

    @property
    def has_passed(self) -> bool:
        """Whether no problem was found; also true of what could not be tried."""
        return not self.problems

    def note(self, place: str, *complaints: str) -> None:
        """Count one try, with what was wrong in it."""
        self.num_tried += 1
        self.problems += [f"{place}: {complaint}" for complaint in complaints]


async def validate(
    environment: Environment, *, num_tasks: int = 20, progress: Callable[[str], None] | None = None
) -> list[Check]:
    """All checks that need no second process, on the first `num_tasks` tasks of each split.

    Gold answers must score full marks, wrong ones must not, and none may make a rollout fail; tasks must be the same
    whenever they are asked for, the splits disjoint. progress: told what is under way.
    """
    if num_tasks < 1:
        raise ValueError(f"num_tasks {num_tasks} is not positive")
    tasks = first_tasks(environment, num_tasks)
    if not tasks:
        raise ValueError(f"environment {environment.name!r} has no tasks, neither train nor held-out ones")
    tell = progress or (lambda name: None)
    tell("tasks")
    checks = [_same_again(environment, num_tasks), *_splits(environment), _renders(environment, tasks)]
    gold, rewards = await _gold(environment, tasks, tell)
    return [*checks, *gold, *await _wrong(environment, tasks, rewards, tell), await _leaves_nothing(environment, tasks)]


def compare_fingerprints(name: str, here: Mapping[str, str], there: Mapping[str, str]) -> Check:
    """Whether two ways to make the tasks agree on each of them."""
    check = Check(name)
    for place in here.keys() | there.keys():
        same = here.get(place) == there.get(place)
        check.note(place, *([] if same else ["is another task, or has another gold answer; derive it from its index"]))
    check.problems.sort()
    return check


def _same_again(environment: Environment, num_tasks: int) -> Check:
    name = "the same index gives the same task and gold answer"
    return compare_fingerprints(name, fingerprint(environment, num_tasks), fingerprint(environment, num_tasks))


def _splits(environment: Environment) -> list[Check]:
    disjoint = Check("train and held-out tasks are disjoint")
    unique = Check("no task comes twice")
    trained: set[str] = set()
    seen: set[str] = set()
    for placed in first_tasks(environment, NUM_SPLIT_TASKS):
        task, question = placed.task, _question(placed.task)
        if placed.is_held_out:
            disjoint.note(placed.place, *(["is also a train task"] if question in trained else []))
        else:
            trained.add(question)
        count = environment.num_held_out_tasks if placed.is_held_out else environment.num_train_tasks
        if count is not None:
            unique.note(placed.place, *([f"has the key {task.key} of an earlier task"] if task.key in seen else []))
        seen.add(task.key)
    if not trained or not disjoint.num_tried:
        disjoint.not_tried = "only one of the two splits has tasks"
    if not unique.num_tried:
        unique.not_tried = "the tasks are endless, so they may repeat"
    return [disjoint, unique]


def _question(task: Task) -> str:
    """Equal for tasks that ask the same, whatever else they remember; without a reference the whole task counts."""
    if task.reference is None:
        return task.key
    asked = msgspec.json.encode([task.prompt, task.reference])
    return hashlib.blake2b(asked, digest_size=8).hexdigest()


def _renders(environment: Environment, tasks: Sequence[PlacedTask]) -> Check:
    check = Check("prompts and gold conversations render in every chat template")
    try:
        from hone.text.template import FAMILIES, ChatTemplate, built_in  # Jinja2 is of an extra
    except ImportError:
        check.not_tried = "chat templates need: pip install 'hone[text]'"
        return check
    templates = [(family, ChatTemplate(built_in(family).source)) for family in FAMILIES]
    for placed in tasks:
        task, complaints = placed.task, []
        for family, template in templates:
            try:
                template.render(task.prompt, environment.tools, add_generation_prompt=True)
                template.render([*task.prompt, *(environment.gold(task) or ())], environment.tools)
            except ValueError as error:
                complaints.append(f"{family}: {error}")
        check.note(placed.place, *complaints)
    return check


Tell = Callable[[str], None]


async def _gold(
    environment: Environment, tasks: Sequence[PlacedTask], tell: Tell
) -> tuple[list[Check], dict[str, float]]:
    """The checks on gold answers, and the reward of each by the key of its task."""
    full = Check("gold answers score full marks")
    again = Check("gold answers score the same again")
    rewards: dict[str, float] = {}
    for placed in tasks:
        place, task = placed.place, placed.task
        tell(f"gold answers: {place}")
        if environment.gold(task) is None:
            continue
        try:
            trace = await check_gold(environment, task)
        except GoldError as error:
            full.note(place, str(error))
            continue
        full.note(place, *_blemishes(trace))
        rewards[task.key] = trace.reward
        second = await check_gold(environment, task)
        same = second.rewards == trace.rewards
        again.note(place, *([] if same else [f"{_rewards(trace)}, then {_rewards(second)}"]))
    for check in (full, again):
        if not check.num_tried:
            check.not_tried = "no gold answer is known, or none scores"
    return [full, again], rewards


async def _wrong(
    environment: Environment, tasks: Sequence[PlacedTask], rewards: Mapping[str, float], tell: Tell
) -> list[Check]:
    """One check for each attack: it must score less than full marks, and must not make the rollout fail."""
    checks = {name: Check(_claim(name)) for name in NAMES}
    for index, placed in enumerate(tasks):
        place, task = placed.place, placed.task
        others = [other.task for other in [*tasks[index + 1 :], *tasks[:index]]]
        for attack in attacks_on(environment, task, others):
            tell(f"{attack.name}: {place}")
            trace = await play_answers(environment, task, Answers(attack.messages, attack.repeats, attack.truncated))
            check = checks.setdefault(attack.name, Check(_claim(attack.name)))
            check.note(place, *_complaints(environment, attack, trace, rewards.get(task.key)))
    for check in checks.values():
        if not check.num_tried:
            check.not_tried = "it cannot be made here, or would be right"
    return list(checks.values())


def _claim(name: str) -> str:
    return f"no full marks: {name}"


def _complaints(environment: Environment, attack: Attack, trace: Trace, full_marks: float | None) -> list[str]:
    if trace.failure is not None:
        # An environment may choose that a tool call which cannot be carried out ends the rollout.
        if trace.failure.kind is FailureClass.TOOL and attack.messages[-1].tool_calls:
            return []
        return [f"the rollout fails ({trace.failure.kind}, {trace.failure.where}: {trace.failure.message})"]
    try:
        is_solved = environment.is_solved(trace)
    except Exception as error:  # the author's code may raise anything
        return [f"is_solved raises {describe(error)}"]
    if is_solved:
        return [f"counts as solved, with reward {trace.reward:g}"]
    if full_marks is not None and trace.reward >= full_marks - TOLERANCE:
        return [f"has the reward of the gold answer, {trace.reward:g}"]
    return _blemishes(trace)


async def _leaves_nothing(environment: Environment, tasks: Sequence[PlacedTask]) -> Check:
    """Rollouts after the first, which may open what is kept for all of them, must leave nothing open."""
    check = Check("rollouts leave nothing behind")
    task = tasks[0].task
    gold = gold_turns(environment, task) or [assistant("")]
    with private_temporary_folder():
        await play_answers(environment, task, Answers(gold, repeats=True))
        before = holdings()
        for answers in (gold, [assistant("")]):
            await play_answers(environment, task, Answers(answers, repeats=True))
        check.note("two rollouts", *(f"left {thing}" for thing in await growth_since(before)))
    return check


def _blemishes(trace: Trace) -> list[str]:
    """What a trace with a reward remembers as having gone wrong all the same."""
    failed = [f"metric {name} fails ({reason})" for name, reason in trace.info.get("failed_metrics", {}).items()]
    teardown = trace.info.get("teardown_failure")
    return failed + ([f"teardown fails ({teardown})"] if teardown else [])


def _rewards(trace: Trace) -> dict[str, float]:
    return {name: reward.value for name, reward in trace.rewards.items()}
