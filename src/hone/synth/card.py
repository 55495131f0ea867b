"""The card of a data set: where it comes from, what was dropped and why, how long it is, which files it is."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import tomli_w

from hone.config.synthesis import GOLD, SynthesisFile
from hone.envs.environment import Environment
from hone.synth.contamination import EvaluationTexts
from hone.synth.conversations import Conversation
from hone.synth.filters import Dropped, Stage

BAR_CHARACTERS = 40
EXCERPT_CHARACTERS = 200


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file of the data: its name in the folder, size and SHA-256."""

    name: str
    num_bytes: int
    sha256: str


def data_file(path: Path, folder: Path) -> DataFile:
    """What the card says of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return DataFile(str(path.relative_to(folder)), path.stat().st_size, digest)


def card_text(
    settings: SynthesisFile,
    environments: Mapping[str, Environment],
    failures: Mapping[str, int],
    stages: Sequence[Stage],
    kept: Sequence[Conversation],
    evaluation_texts: EvaluationTexts,
    files: Sequence[DataFile],
) -> str:
    """The card in Markdown, with the front matter that data set hubs read."""
    return "\n".join(
        [
            _front_matter(files),
            f"# {settings.synthesis.name}\n",
            f"{len(kept):,} conversations, written by `hone synth` from scored rollouts of a teacher.\n",
            "| | |\n|---|---|",
            f"| teacher | {_teacher(settings)} |",
            *(f"| environment | {_source(name, one, kept)} |" for name, one in environments.items()),
            f"| compared with | {evaluation_texts.num_texts:,} evaluation texts, by runs of {evaluation_texts.words} words |",
            *(f"| `{file.name}` | {file.num_bytes:,} bytes, SHA-256 `{file.sha256}` |" for file in files),
            "\nColumns: `messages` and `tools` in the shape of the OpenAI API, `environment`, `task`, `attempt`, `reward`,"
            " `teacher`. For SFT: `sft.data` with the path of one of the files.\n",
            "## What was dropped\n",
            _stages(failures, stages),
            _examples(stages),
            "## Length\n",
            "Characters that the teacher wrote, reasoning and tool calls included.\n",
            f"```\n{histogram([len(one.written) for one in kept])}\n```\n",
            "## Settings\n",
            f"```toml\n{tomli_w.dumps(settings.model_dump(mode='json', exclude_none=True)).rstrip()}\n```\n",
        ]
    )


def histogram(lengths: Sequence[int]) -> str:
    """Counts by powers of two, as bars of text."""
    if not lengths:
        return "nothing"
    exponents = [max(0, length).bit_length() for length in lengths]
    counts = {exponent: exponents.count(exponent) for exponent in range(min(exponents), max(exponents) + 1)}
    longest = max(counts.values())
    rows = []
    for exponent, count in counts.items():
        low, high = (1 << exponent) >> 1, max(0, (1 << exponent) - 1)
        bar = "█" * -(-count * BAR_CHARACTERS // longest)
        rows.append(f"{low:>9,} to {high:>9,} {count:>9,} {bar}".rstrip())
    return "\n".join(rows)


def _front_matter(files: Sequence[DataFile]) -> str:
    named = files[0].name if files else "data/*"
    return f"---\nconfigs:\n- config_name: default\n  data_files: {named}\n---\n"


def _teacher(settings: SynthesisFile) -> str:
    teacher, sampling = settings.teacher, settings.rollouts.sampling
    if teacher.target == GOLD:
        return "the environments' gold answers"
    name = f"`{teacher.model}` at {teacher.target}" if teacher.model else f"`{teacher.target}`"
    return f"{name}, temperature {sampling.temperature:g}, {settings.rollouts.num_attempts} attempts a task"


def _source(name: str, environment: Environment, kept: Sequence[Conversation]) -> str:
    mine = [one for one in kept if one.environment == environment.name]
    tasks = len({one.task for one in mine})
    return f"`{name}` {environment.version}: {len(mine):,} conversations of {tasks:,} tasks"


def _stages(failures: Mapping[str, int], stages: Sequence[Stage]) -> str:
    rows = ["| filter | dropped | left |", "|---|---|---|"]
    left = stages[0].num_in
    if failures:
        told = ", ".join(f"{count:,} {kind}" for kind, count in failures.items())
        rows.append(f"| failed rollouts: {told} | {sum(failures.values()):,} | {left:,} |")
    rows += [f"| {stage.name} | {stage.num_dropped:,} | {stage.num_out:,} |" for stage in stages]
    return "\n".join(rows) + "\n"


def _examples(stages: Sequence[Stage]) -> str:
    parts = []
    for stage in stages:
        if stage.examples:
            parts.append(f"Dropped by *{stage.name}*, for example:\n")
            parts.append("\n".join(_example(dropped) for dropped in stage.examples) + "\n")
    return "\n".join(parts)


def _example(dropped: Dropped) -> str:
    """One line: everything that could break the page is inside a JSON text in code marks."""
    one = dropped.conversation
    asked = _excerpt(one.prompts[-1] if one.prompts else "")
    return f"- {_inline(_excerpt(dropped.reason))}: {_inline(asked)} → {_inline(_excerpt(one.written))}"


def _excerpt(text: str) -> str:
    return text if len(text) <= EXCERPT_CHARACTERS else f"{text[:EXCERPT_CHARACTERS]} …"


def _inline(text: str) -> str:
    return f"`{json.dumps(text, ensure_ascii=False)[1:-1].replace('`', 'ˋ')}`" if text else "(nothing)"
