"""Conversations for SFT from the gold answers that environments know to their train tasks."""

import os
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from hone.envs.environment import Environment
from hone.schema.messages import Message
from hone.schema.seeds import derive_seed
from hone.schema.tasks import Task


def write_gold_conversations(
    environments: Mapping[str, Environment], weights: Mapping[str, float], count: int, seed: int, path: Path
) -> None:
    """Write `count` conversations as JSONL, `{"messages": [...], "tools": [...]}`, in an order drawn from the seed.

    Each environment has its weight's share, and only train tasks are used, each of them once at most. An endless
    environment may give a task twice. The file is complete or not there.
    """
    shares = shares_of(weights, count)
    lines = [line for name, share in shares.items() for line in _lines(name, environments[name], share, seed)]
    random.Random(derive_seed(seed, "order of gold conversations")).shuffle(lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def shares_of(weights: Mapping[str, float], count: int) -> dict[str, int]:
    """`count` split in proportion to the weights; what rounding leaves over goes to the largest remainders."""
    if count < 1 or not weights or any(weight <= 0 for weight in weights.values()):
        raise ValueError(f"cannot split {count} conversations by the weights {dict(weights)}; both must be positive")
    total = sum(weights.values())
    exact = {name: count * weight / total for name, weight in weights.items()}
    shares = {name: int(share) for name, share in exact.items()}
    by_remainder = sorted(exact, key=lambda name: shares[name] - exact[name])
    for name in by_remainder[: count - sum(shares.values())]:
        shares[name] += 1
    return shares


def _lines(name: str, environment: Environment, count: int, seed: int) -> Iterator[bytes]:
    if not environment.tools_are_known:
        raise ValueError(
            f"environment {name!r} opens tools for each rollout (an MCP server, say), so a gold conversation cannot"
            ' tell them without one; run `hone synth` with teacher.target = "gold", and give its file to sft.data'
        )
    for index in _indices(name, environment.num_train_tasks, count, seed):
        task = environment.train_task(index)
        gold = environment.gold(task)
        if gold is None:
            raise ValueError(f"environment {name!r} knows no gold answer for train task {index}; give sft.data a file")
        yield msgspec.json.encode(_conversation(environment, task, gold)) + b"\n"


def _indices(name: str, available: int | None, count: int, seed: int) -> list[int]:
    """Different train tasks: drawn from all there are, or from a far-off stretch of an endless source."""
    if available is None:
        start = derive_seed(seed, "gold", name) % 2**40
        return list(range(start, start + count))
    if count > available:
        raise ValueError(
            f"environment {name!r} has {available} train tasks, {count} gold conversations are asked of it;"
            f" lower sft.num_conversations or its weight and raise sft.epochs"
        )
    return random.Random(derive_seed(seed, "gold", name)).sample(range(available), count)


def _conversation(environment: Environment, task: Task, gold: list[Message]) -> dict[str, Any]:
    messages = [{"content": "", **msgspec.to_builtins(message)} for message in [*task.prompt, *gold]]
    tools = {"tools": msgspec.to_builtins(environment.tools)} if environment.tools else {}
    return {"messages": messages, **tools}
