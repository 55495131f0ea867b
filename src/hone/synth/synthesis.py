"""From a file of `hone synth` to training data: rollouts of the teacher, filters, data files, the card."""

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from hone.config.synthesis import SynthesisFile
from hone.envs.agents import MultiAgent
from hone.envs.attacks import gold_turns
from hone.envs.attempts import Assignment
from hone.envs.environment import Environment
from hone.envs.registry import load_environment
from hone.envs.rollout import Limits
from hone.envs.sampler import Sampler
from hone.envs.validation import Answers
from hone.schema.messages import ToolSpec
from hone.schema.sampling import SamplingParameters
from hone.schema.seeds import derive_seed
from hone.synth.card import card_text, data_file
from hone.synth.contamination import EvaluationTexts
from hone.synth.conversations import Conversation, conversations_of, write_jsonl, write_parquet
from hone.synth.filters import Stage, select
from hone.synth.gold import shares_of
from hone.synth.teach import Progress, Settings, claim, finished_traces, teach, wanted_attempts

WRITERS = {"parquet": write_parquet, "jsonl": write_jsonl}


@dataclass(frozen=True, slots=True)
class Synthesis:
    """What came out. failures: rollouts without a reward, by class. files: of the data. num_kept: conversations."""

    folder: Path
    files: tuple[Path, ...]
    num_kept: int
    failures: dict[str, int]
    stages: tuple[Stage, ...]


async def synthesise(
    settings: SynthesisFile,
    sampler: Sampler | None,
    *,
    source: str = "",
    progress: Callable[[Progress], None] | None = None,
) -> Synthesis:
    """Let the teacher attempt what is missing, select, and write data/, README.md and synth.toml into the folder.

    sampler: the teacher; None for `gold`. source: what answers behind its name (a fingerprint of weights). The same settings go on where an interrupted synthesis stopped; with other
    [keep], [decontamination] or [output] the traces that are there are selected anew. Raises `ValueError` when nothing
    is left.
    """
    environments = {
        section.name: load_environment(section.name, **section.arguments) for section in settings.environments
    }
    folder = settings.folder.absolute()
    with claim(folder, _settings(settings, environments, source)):
        rollouts = settings.rollouts
        wanted = wanted_attempts(environments, _num_tasks(settings), rollouts.num_attempts)
        await teach(
            wanted,
            _teacher(sampler),
            sampling=_sampling(settings),
            seed=settings.synthesis.seed,
            max_concurrent=rollouts.max_concurrent,
            traces=folder / "traces",
            limits=Limits(max_turns=rollouts.max_turns, deadline_seconds=rollouts.deadline_seconds),
            progress=progress,
        )
        return _write(settings, environments, wanted, folder)


def _write(
    settings: SynthesisFile, environments: Mapping[str, Environment], wanted: Sequence[Assignment], folder: Path
) -> Synthesis:
    conversations, failures = _conversations(wanted, folder / "traces")
    evaluation_texts = _evaluation_texts(settings, environments)
    kept, stages = select(conversations, settings.keep, evaluation_texts)
    if not kept:
        told = ", ".join(f"{stage.name} {stage.num_dropped}" for stage in stages if stage.num_dropped)
        raise ValueError(
            f"no conversation is left of {len(conversations)} with a reward; dropped: {told or 'none'};"
            f" failed: {dict(failures) or 'none'}. The traces are in {folder / 'traces'}: change [keep] and try again"
        )
    files = _write_data(settings, kept, folder / "data")
    summaries = [data_file(path, folder) for path in files]
    card = card_text(settings, environments, failures, stages, kept, evaluation_texts, summaries)
    (folder / "README.md").write_text(card, encoding="utf-8")
    (folder / "synth.toml").write_text(tomli_w.dumps(settings.model_dump(mode="json", exclude_none=True)))
    return Synthesis(folder, tuple(files), len(kept), dict(failures), tuple(stages))


def _write_data(settings: SynthesisFile, kept: Sequence[Conversation], folder: Path) -> list[Path]:
    """The data in each format, in a mixed order; files of formats that are no longer wanted go."""
    folder.mkdir(parents=True, exist_ok=True)
    mixed = list(kept)
    random.Random(derive_seed(settings.synthesis.seed, "order of conversations")).shuffle(mixed)
    teacher = settings.teacher.model or settings.teacher.target
    for name in WRITERS.keys() - set(settings.output.formats):
        (folder / f"train.{name}").unlink(missing_ok=True)
    paths = []
    for name in settings.output.formats:
        paths.append(folder / f"train.{name}")
        WRITERS[name]((one.row(teacher) for one in mixed), paths[-1])
    return paths


def _conversations(wanted: Sequence[Assignment], traces: Path) -> tuple[list[Conversation], Counter[str]]:
    """What the finished attempts say, in the order of `wanted`, and the classes of those that failed."""
    failures: Counter[str] = Counter()
    conversations: list[Conversation] = []
    for environment, trace in finished_traces(traces, wanted):
        if trace.failure is not None:
            failures[trace.failure.kind.value] += 1
        else:
            conversations += conversations_of(trace, environment.tools, _agent_tools(environment))
    return conversations, failures


def _agent_tools(environment: Environment) -> dict[str, Sequence[ToolSpec]]:
    agents = environment.agents if isinstance(environment, MultiAgent) else {}
    return {name: agent.tools for name, agent in agents.items()}


def _evaluation_texts(settings: SynthesisFile, environments: Mapping[str, Environment]) -> EvaluationTexts:
    section = settings.decontamination
    texts = EvaluationTexts(section.words)
    others = {name: load_environment(name) for name in section.environments if name not in environments}
    if section.held_out_tasks:
        for name, environment in {**environments, **others}.items():
            texts.add(f"held-out tasks of {name}", _held_out_texts(environment, section.held_out_tasks))
    for path in section.files:
        texts.add(str(path), texts_in(path))
    return texts


def texts_in(path: Path) -> Iterator[str]:
    """Every text in the rows of a JSONL or parquet file, every line of another one."""
    try:
        if path.suffix == ".parquet":
            yield from _texts(_parquet_rows(path))
            return
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if path.suffix != ".jsonl":
                yield line
            elif line.strip():
                try:
                    yield from _texts(json.loads(line))
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path}, line {number}: not valid JSON: {error}") from error
    except OSError as error:
        raise ValueError(f"decontamination.files: cannot read {path}: {error.strerror or error}") from error


def _parquet_rows(path: Path) -> list[Any]:
    from pyarrow import parquet  # of an extra, and heavy

    return list(parquet.read_table(path).to_pylist())


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)


def _held_out_texts(environment: Environment, num_tasks: int) -> Iterator[str]:
    """What the first held-out tasks ask, and their references."""
    available = environment.num_held_out_tasks
    for index in range(num_tasks if available is None else min(num_tasks, available)):
        task = environment.held_out_task(index)
        yield from (message.content for message in task.prompt if message.role != "system")
        if task.reference is not None:
            yield task.reference


def _teacher(sampler: Sampler | None) -> Callable[[Assignment], Sampler]:
    if sampler is not None:
        return lambda assignment: sampler
    return _gold_sampler


def _gold_sampler(assignment: Assignment) -> Sampler:
    gold = gold_turns(assignment.environment, assignment.task)
    if not gold:
        raise ValueError(
            f"environment {assignment.environment.name!r} knows no gold answer to task {assignment.task.key};"
            " name another teacher.target"
        )
    return Answers(gold)


def _num_tasks(settings: SynthesisFile) -> dict[str, int]:
    weights = {section.name: section.weight for section in settings.environments}
    return {name: count for name, count in shares_of(weights, settings.rollouts.num_tasks).items() if count}


def _sampling(settings: SynthesisFile) -> SamplingParameters:
    section = settings.rollouts.sampling
    return SamplingParameters(
        temperature=section.temperature,
        top_p=section.top_p,
        top_k=section.top_k,
        min_p=section.min_p,
        max_tokens=section.max_tokens,
    )


def _settings(settings: SynthesisFile, environments: Mapping[str, Environment], source: str) -> Settings:
    arguments = {section.name: section.arguments for section in settings.environments}
    teacher = settings.teacher
    return Settings(
        environments={name: (one.version, arguments[name]) for name, one in environments.items()},
        teacher=teacher.target if teacher.model is None else f"{teacher.model} at {teacher.target}",
        source=source,
        sampling=_sampling(settings),
        max_turns=settings.rollouts.max_turns,
        seed=settings.synthesis.seed,
    )
