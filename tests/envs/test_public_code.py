"""The code verifier on HumanEval and MBPP: canonical solutions pass; empty answers, stubs and changed numbers do not."""

import ast
import asyncio
import gzip
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from hone.envs.verifiers.code import Assertions, CodeVerdict, CodeVerifier
from public_data import ABSENT, DATA

HUMANEVAL = DATA / "humaneval" / "HumanEval.jsonl.gz"
MBPP = DATA / "mbpp" / "mbpp.jsonl"

pytestmark = [
    pytest.mark.skipif(not (HUMANEVAL.exists() and MBPP.exists()), reason=ABSENT),
    pytest.mark.filterwarnings("ignore:invalid escape sequence"),  # of some solutions in MBPP, when they are parsed
]


@dataclass(frozen=True)
class Solved:
    """A programming task with its canonical solution."""

    name: str
    solution: str
    tests: Assertions


def humaneval() -> Iterator[Solved]:
    with gzip.open(HUMANEVAL, "rt") as lines:
        for row in map(json.loads, lines):
            yield Solved(
                row["task_id"],
                row["prompt"] + row["canonical_solution"],
                Assertions(
                    [f"{row['test']}\ncheck({row['entry_point']})"],
                    setup=f"{row['prompt']}\n    pass",
                    entry_point=row["entry_point"],
                ),
            )


def mbpp() -> Iterator[Solved]:
    with MBPP.open() as lines:
        for row in map(json.loads, lines):
            tests = [*row["test_list"], *row["challenge_test_list"]]
            entry_point = "sum" if row["task_id"] == 126 else ""  # the only one that is called like a built-in
            tests = Assertions(tests, setup=row["test_setup_code"], entry_point=entry_point)
            yield Solved(f"MBPP/{row['task_id']}", row["code"], tests)


def stub(program: str, body: str) -> str:
    """The program with nothing but this statement in its functions."""
    tree = ast.parse(program)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            node.body = ast.parse(f"def f():\n    {body}").body[0].body
    return ast.unparse(tree)


def changed(program: str) -> Iterator[str]:
    """The program with one of its numbers changed, for each number and several changes."""
    count = sum(is_number(node) for node in ast.walk(ast.parse(program)))
    for by in (1, -1, 1000):
        for index in range(count):
            tree = ast.parse(program)
            [node for node in ast.walk(tree) if is_number(node)][index].value += by
            yield ast.unparse(tree)


def is_number(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and type(node.value) in (int, float)


async def verdicts(programs: list[tuple[str, Assertions]], timeout_seconds: float = 30.0) -> list[CodeVerdict]:
    verifier, free = CodeVerifier(timeout_seconds=timeout_seconds), asyncio.Semaphore(4)

    async def verdict(program: str, tests: Assertions) -> CodeVerdict:
        async with free:
            return await verifier.verify(program, tests)

    return await asyncio.gather(*(verdict(*given) for given in programs))


async def passed(programs: dict[str, tuple[str, Assertions]], **settings) -> set[str]:
    """The names of the programs that passed all their tests."""
    found = await verdicts(list(programs.values()), **settings)
    return {name for name, verdict in zip(programs, found, strict=True) if verdict.is_right}


async def test_a_sample_of_canonical_solutions_passes():
    chosen = [*humaneval()][::40] + [*mbpp()][::200]
    assert await passed({one.name: (one.solution, one.tests) for one in chosen}) == {one.name for one in chosen}


async def test_stubs_of_a_sample_do_not_pass():
    chosen = [*humaneval()][20::60] + [*mbpp()][100::400]
    assert await passed({one.name: (stub(one.solution, "pass"), one.tests) for one in chosen}) == set()


@pytest.mark.slow
async def test_all_canonical_solutions_pass():
    solved = [*humaneval(), *mbpp()]
    assert len(solved) == 164 + 974
    found = await passed({one.name: (one.solution, one.tests) for one in solved})
    assert {one.name for one in solved} - found == set()


@pytest.mark.slow
async def test_no_empty_answer_and_no_stub_passes():
    solved = [*humaneval(), *mbpp()]
    for program in ("", "pass", "# no idea"):
        assert await passed({one.name: (program, one.tests) for one in solved[::10]}) == set()
    assert await passed({one.name: (stub(one.solution, "return None"), one.tests) for one in solved}) == set()


STILL_RIGHT = {
    *("HumanEval/95", "HumanEval/154"),
    *("MBPP/159", "MBPP/217", "MBPP/225", "MBPP/380", "MBPP/660", "MBPP/799"),
}
"""Tasks in which no change of a single number makes the canonical solution fail its tests."""

PLAIN_PYTHON = """
import json, os, resource, signal, sys

def run(program, setup, entry_point, tests):
    signal.alarm(5)
    resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
    os.dup2(os.open(os.devnull, os.O_RDWR), 1)
    of_program = {"__name__": "plain"}
    exec(program, of_program)
    names = dict(of_program)
    exec(setup, names)
    if entry_point:
        names[entry_point] = of_program[entry_point]
    for test in tests:
        exec(test, names)

for line in sys.stdin:
    child = os.fork()
    if not child:
        try:
            run(*json.loads(line))
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    print({0: "right", 256: "wrong"}.get(status, "undecided"), flush=True)
"""


@pytest.mark.slow
async def test_a_changed_number_does_not_pass_unless_plain_python_says_that_it_is_still_right():
    """Each change is judged by running it without any sandbox; the first that is wrong must not pass."""
    wrong: dict[str, tuple[str, Assertions]] = {}
    right: dict[str, tuple[str, Assertions]] = {}
    harmless = set()
    with subprocess.Popen(
        [sys.executable, "-c", PLAIN_PYTHON], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as plain:

        def judged(program: str, tests: Assertions) -> str:
            plain.stdin.write(json.dumps([program, tests.setup, tests.entry_point, tests.tests]).encode() + b"\n")
            plain.stdin.flush()
            return plain.stdout.readline().decode().strip()

        for one in [*humaneval(), *mbpp()]:
            outcome = ""
            for number, program in enumerate(changed(one.solution)):
                outcome = judged(program, one.tests)
                if outcome == "wrong":
                    wrong[one.name] = (program, one.tests)
                    break
                if outcome == "right" and number < 3:
                    right[f"{one.name} #{number}"] = (program, one.tests)
            else:
                if outcome:
                    harmless.add(one.name)
    assert harmless == STILL_RIGHT
    assert len(wrong) > 700
    assert await passed(wrong, timeout_seconds=10.0) == set()
    assert await passed(right) == set(right)
