"""Code tests: right programs pass, wrong ones do not, and a program that knows how it is tested gains nothing."""

import asyncio
import os
import shutil
import signal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hone.envs.failures import RolloutFailure
from hone.envs.guests.candidate import Candidate
from hone.envs.guests.channel import decode, encode
from hone.envs.local_processes import LocalProcesses
from hone.envs.verifiers.assertions import prepare
from hone.envs.verifiers.code import Assertions, Call, Calls, CodeVerifier, InputsOutputs
from hone.sandbox.languages import LANGUAGES, find_language
from hone.schema.traces import FailureClass

DOUBLE = "def double(x):\n    return 2 * x"
ASSERTIONS = Assertions(["assert double(1) == 2", "assert double(2) == 4\nassert double('a') == 'aa'"])
CALLS = Calls("double", [Call([1], 2), Call([2.5], 5.0), Call(["a"], "aa"), Call([[1, 2]], [1, 2, 1, 2])])


async def verify(program, tests, **settings):
    return await CodeVerifier(**{"timeout_seconds": 5.0, **settings}).verify(program, tests)


# --- right and wrong -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tests", [ASSERTIONS, CALLS], ids=["assertions", "calls"])
async def test_a_right_program_passes_all_tests(tests):
    verdict = await verify(DOUBLE, tests)
    assert verdict.is_right, verdict.problem
    assert verdict.share == 1.0
    assert verdict.problem == ""


async def test_a_wrong_program_passes_a_share():
    verdict = await verify("def double(x):\n    return x + 2 if x == 2 else x + 1", ASSERTIONS)
    assert (verdict.num_passed, verdict.num_tests) == (2, 3)
    assert not verdict.is_right
    assert verdict.problem == "assert double('a') == 'aa': TypeError: can only concatenate str (not \"int\") to str"
    verdict = await verify("def double(x):\n    return 2 * x if x != 'a' else 'a'", CALLS)
    assert (verdict.num_passed, verdict.num_tests) == (3, 4)
    assert verdict.problem == "call 2: a wrong answer"


@pytest.mark.parametrize(
    ("program", "problem"),
    [
        ("", "an empty program"),
        ("  \n", "an empty program"),
        ("def double(x):", "the program does not load: IndentationError"),
        ("import no_such_module", "the program does not load: ModuleNotFoundError"),
        ("x = 1", "double"),
        ("def double(x): pass", "double(1) == 2"),
        ("def double(x): raise RuntimeError('no')", "RuntimeError: no"),
        ("def double(x, y): return x", "TypeError"),
        ("double = 4", "TypeError"),
        ("def double(x): return double(x)", "RecursionError"),
        ("def double(x): return 'x' * 10_000_000", "at most"),
        ("def double(x): return bytearray(1 << 40)", "MemoryError"),
    ],
)
async def test_a_program_that_fails_passes_nothing(program, problem):
    verdict = await verify(program, ASSERTIONS)
    assert verdict.num_passed == 0
    assert problem in verdict.problem


async def test_time_is_limited():
    verdict = await verify("def double(x):\n    while True: pass", ASSERTIONS, timeout_seconds=0.3)
    assert verdict.num_passed == 0
    assert verdict.problem == "the program took longer than 0.3 s"
    verdict = await verify(f"{DOUBLE} if x == 1 else time.sleep(60)\nimport time", ASSERTIONS, timeout_seconds=0.3)
    assert verdict.num_passed == 1


async def test_what_a_program_prints_is_nobodys_business():
    assert (await verify(f"print('x' * 1_000_000)\n{DOUBLE}", ASSERTIONS)).is_right


async def test_the_main_block_of_a_program_does_not_run():
    assert (await verify(f"{DOUBLE}\nif __name__ == '__main__': double(input())", ASSERTIONS)).is_right


CLASSES = """
from dataclasses import dataclass

@dataclass
class Node:
    value: int
    left: "Node | None" = None

    def deepest(self):
        return self if self.left is None else self.left.deepest()

    def __len__(self):
        return 7

def count():
    n = 0
    while True:
        yield n
        n += 1

def total(node):
    return node.value + (total(node.left) if node.left else 0)

class TooDeep(KeyError):
    pass

def fail():
    raise TooDeep("deep")
"""


async def test_tests_can_work_with_the_objects_of_a_program():
    tests = [
        "root = Node(1)\nroot.left = Node(2)\nassert total(root) == 3",
        "assert root.left.value == 2 and root.deepest() == root.left and len(root) == 7",
        "numbers = count()\nassert [next(numbers), next(numbers)] == [0, 1]",
        "assert [n for n, _ in zip(count(), range(3))] == [0, 1, 2]",
        "assert str(Node(1)) == 'Node(value=1, left=None)'",
        "try:\n    fail()\n    assert False\nexcept KeyError as error:\n    assert 'deep' in str(error)",
    ]
    verdict = await verify(CLASSES, Assertions(tests))
    assert verdict.is_right, verdict.problem


async def test_setup_is_trusted_and_an_entry_point_is_the_programs():
    setup = "def helper(x):\n    return x + 1\ndef sum(x):\n    raise NotImplementedError"
    program = "def helper(x):\n    return 0\ndef sum(x):\n    return 6\ndef abs(x):\n    return 0"
    tests = ["assert helper(1) == 2", "assert sum([1, 2, 3]) == 6", "assert abs(-3) == 3"]
    verdict = await verify(program, Assertions(tests, setup=setup, entry_point="sum"))
    assert verdict.is_right, verdict.problem
    verdict = await verify("x = 1", Assertions(["assert sum([1, 2, 3]) == 6"], entry_point="sum"))
    assert verdict.problem.endswith("NameError: the program does not define sum")


async def test_code_without_assertions_is_one_test():
    tests = Assertions(["double(1)", "if double(2) != 4:\n    raise ValueError('wrong')"])
    assert (await verify(DOUBLE, tests)).num_passed == 2
    verdict = await verify("def double(x): return 1", tests)
    assert (verdict.num_passed, verdict.num_tests, verdict.problem) == (1, 2, "test 1: ValueError: wrong")


async def test_an_assertion_in_a_loop_must_hold_every_time():
    tests = Assertions(["for x in range(10):\n    assert double(x) == 2 * x\nassert double(1) == 2"])
    verdict = await verify("def double(x): return 2 * x if x < 9 else 0", tests)
    assert (verdict.num_passed, verdict.num_tests) == (1, 2)


async def test_calls_compare_as_json_does():
    program = "def f(x):\n    return [(1, 2), {'a': 0.1 + 0.2}, True][x]"
    calls = [Call([0], [1, 2]), Call([1], {"a": 0.3}), Call([2], True)]
    assert (await verify(program, Calls("f", calls))).is_right
    wrong = [Call([0], [1, 2, 3]), Call([1], {"a": 0.31}), Call([2], 1)]
    assert (await verify(program, Calls("f", wrong))).num_passed == 0
    assert (await verify("def f(*, x): return x", Calls("f", [Call([], 1, named={"x": 1})]))).is_right


async def test_inputs_are_read_and_outputs_compared():
    cases = InputsOutputs([("1\n2\n", "3\n"), ("4 5\n", "9"), ("", "none")])
    program = "import sys\nnumbers = sys.stdin.read().split()\nprint(sum(map(int, numbers)) or 'none', end=' \\n\\n')"
    assert (await verify(program, cases)).is_right
    verdict = await verify(program.replace("or 'none'", ""), cases)
    assert (verdict.num_passed, verdict.problem) == (2, "case 2: a wrong output")
    verdict = await verify("print(3); raise SystemExit(1)", cases)
    assert (verdict.num_passed, verdict.problem) == (0, "case 0: exited with code 1")
    verdict = await verify("while True: pass", cases, timeout_seconds=0.3)
    assert (verdict.num_passed, verdict.problem) == (0, "case 0: timeout with code -9")


async def test_long_outputs_are_compared_whole():
    expected = "\n".join(map(str, range(50_000)))
    program = "for n in range(50_000): print(n if n != 25_000 else 'x')"
    assert not (await verify(program, InputsOutputs([("", expected)]))).is_right
    assert (await verify(program.replace("'x'", "n"), InputsOutputs([("", expected)]))).is_right


ADDING = {
    "c": """
        #include <stdio.h>
        int main() { int a, b; while (scanf("%d %d", &a, &b) == 2) printf("%d\\n", a + b); }""",
    "bash": 'while read a b; do echo "$((a + b))"; done',
}


@pytest.mark.parametrize("where", ["here", "processes"])
@pytest.mark.parametrize("language", sorted(ADDING))
async def test_programs_of_other_languages_are_judged_alike(language, where):
    tool = find_language(language).tool
    if shutil.which(tool) is None:
        pytest.skip(f"this machine has no {tool}")
    cases = InputsOutputs([("1 2\n", "3\n"), ("3 4\n5 6\n", "7\n11\n")], language)
    right = await verify(ADDING[language], cases, sandboxes=where, timeout_seconds=30.0)
    assert right.is_right, right.problem
    wrong = await verify(ADDING[language].replace("+ b", "- b"), cases, sandboxes=where, timeout_seconds=30.0)
    assert (wrong.num_passed, wrong.problem) == (0, "case 0: a wrong output")


async def test_what_does_not_compile_passes_nothing_and_says_why():
    if shutil.which("gcc") is None:
        pytest.skip("this machine has no gcc")
    verdict = await verify("int main() { return x; }", InputsOutputs([("", "")], "c"))
    assert verdict.num_passed == 0
    assert verdict.problem.startswith("it does not compile: main.c")


async def test_a_missing_compiler_is_a_failure_and_no_verdict():
    missing = [one.name for one in LANGUAGES if shutil.which(one.tool) is None]
    if not missing:
        pytest.skip("this machine has the toolchains of all languages")
    with pytest.raises(RolloutFailure, match="needs the program") as failure:
        await verify("x", InputsOutputs([("", "")], missing[0]))
    assert failure.value.failure.kind is FailureClass.SANDBOX


# --- tests that cannot be run, sandboxes that do not come ----------------------------------------------------------


@pytest.mark.parametrize(
    ("tests", "complaint"),
    [
        (Assertions([]), "no tests"),
        (Assertions(["assert ="]), "not Python"),
        (Assertions(["assert double(lambda: 1) == 2"]), "a function cannot be given to the program"),
        (Calls("double", [Call([object()], 1)]), "JSON-like data"),
    ],
)
async def test_tests_that_cannot_be_run_are_the_authors_mistake(tests, complaint):
    with pytest.raises(ValueError, match=complaint):
        await verify(DOUBLE, tests)


async def test_no_sandbox_is_a_failure_and_no_verdict():
    class Full:
        async def create(self, spec):
            raise OSError("no room")

    for tests in (ASSERTIONS, InputsOutputs([("", "")])):
        with pytest.raises(RolloutFailure, match="no room") as failure:
            await verify(DOUBLE, tests, sandboxes=Full())
        assert failure.value.failure.kind is FailureClass.SANDBOX


async def test_a_sandbox_that_dies_in_the_middle_is_a_failure_and_no_verdict():
    class Dying(LocalProcesses):
        async def create(self, spec):
            sandbox = await super().create(spec)
            asyncio.get_running_loop().call_later(0.5, os.kill, sandbox._guardian, signal.SIGKILL)
            return sandbox

    with pytest.raises(RolloutFailure) as failure:
        await verify("import time\ndef double(x): time.sleep(60)", ASSERTIONS, sandboxes=Dying())
    assert failure.value.failure.kind is FailureClass.SANDBOX


# --- programs that know how they are tested ------------------------------------------------------------------------

CHEATS = {
    "exits at once": "import sys; sys.exit(0)",
    "exits hard at once": "import os; os._exit(0)",
    "exits hard when called": "import os\ndef double(x): os._exit(0)",
    "exits when called": "def double(x): exit(0)",
    "raises what tests may catch": "def double(x): raise AssertionError",
    "kills its parent": "import os\nos.kill(os.getppid(), 9)\ndef double(x): return None",
    "kills everything": "import os\nos.kill(-1, 9)",
    "equals everything": "class Yes:\n    def __eq__(self, other): return True\n    __ne__ = __hash__ = None\ndef double(x): return Yes()",
    "an integer that equals everything": "class Yes(int):\n    def __eq__(self, other): return True\ndef double(x): return Yes(7)",
    "a text that equals everything": "class Yes(str):\n    def __eq__(self, other): return True\ndef double(x): return Yes('7')",
    "a list that equals everything": "class Yes(list):\n    def __eq__(self, other): return True\ndef double(x): return Yes([7])",
    "lies about its class": "class Yes:\n    __class__ = int\n    def __index__(self): return 2\n    def __eq__(self, other): return True\ndef double(x): return Yes()",
    "patches the built-ins": "import builtins\nbuiltins.AssertionError = type('E', (Exception,), {})\nbuiltins.compile = builtins.exec = lambda *a, **k: None\nbuiltins.isinstance = lambda *a: True\ndef double(x): return None",
    "patches the harness": "import sys\nfor module in list(sys.modules.values()):\n    for name in list(vars(module)):\n        if name in ('encode', 'is_same', 'verdict', 'check'): setattr(module, name, lambda *a: b'')\ndef double(x): return None",
    "patches the caller": "import sys\ndef double(x):\n    frame = sys._getframe()\n    while frame:\n        frame.f_globals['VALUE'] = b'.'\n        frame = frame.f_back",
    "writes verdicts": "import os\nfor fd in range(64):\n    try: os.write(fd, b'\\0\\0\\0\\x22.l\\0\\0\\0\\x1cI\\0\\0\\0\\x013S\\0\\0\\0\\0' * 50)\n    except OSError: pass\ndef double(x): return None",
    "prints marks": "print('OK\\nPASSED 3/3\\nexit code 0')\ndef double(x): print('1 passed'); return None",
    "leaves a process that answers": "import os\nif os.fork(): os._exit(0)\ndef double(x): return None",
    "looks for the tests in memory": "import gc, sys\ndef double(x):\n    for thing in gc.get_objects():\n        if isinstance(thing, (list, tuple, dict)) and 'assert' in repr(thing)[:500]: return thing\n    return None",
    "defines the tests' names": "def __passed__(n): pass\ndef __failed__(*a): pass\ncheck = tests = assertion = True\ndef double(x): return None",
    "overrides recursion and time": "import sys, time\nsys.setrecursionlimit(2**31 - 1)\ntime.perf_counter = lambda: 0\ndef double(x): return None",
    "an endless answer": "def double(x):\n    while True: yield 2",
    "an answer nested too deeply": "def double(x):\n    y = []\n    for _ in range(100_000): y = [y]\n    return y",
    "compares instead of the test": "class Yes:\n    def __rsub__(self, o): return 0\n    __sub__ = __rsub__\n    def __abs__(self): return 0\n    def __lt__(self, o): return True\n    __gt__ = __le__ = __ge__ = __contains__ = __lt__\n    def __float__(self): return 0.0\ndef double(x): return Yes()",
}


@pytest.mark.parametrize("cheat", CHEATS)
async def test_a_cheat_gains_nothing(cheat):
    tests = Assertions(
        [
            "assert double(1) == 2",
            "assert abs(double(2) - 4) < 1e-6",
            "assert double(2) > 3.9 and 4 in [double(2)]",
            "import math\nassert math.isclose(double(2), 4)",
        ]
    )
    verdict = await verify(CHEATS[cheat], tests, timeout_seconds=2.0)
    assert verdict.num_passed == 0, verdict


@pytest.mark.parametrize("cheat", ["exits hard at once", "exits at once", "prints marks", "kills everything"])
async def test_a_cheat_gains_nothing_where_output_is_compared(cheat):
    assert (await verify(CHEATS[cheat], InputsOutputs([("", "42")]))).num_passed == 0


class Listening(LocalProcesses):
    """A provider that remembers what was written to the processes of its sandboxes, by the text of their program."""

    def __init__(self):
        super().__init__()
        self.heard = {}

    async def create(self, spec):
        sandbox = await super().create(spec)
        start = sandbox.start

        async def start_listening(argv, **settings):
            process = await start(argv, **settings)
            write = process.write
            heard = self.heard.setdefault(
                "candidate" if "The candidate of a code test" in argv[-1] else "checker", bytearray()
            )

            async def write_listening(data):
                heard.extend(data)
                await write(data)

            process.write = write_listening
            return process

        sandbox.start = start_listening
        return sandbox


@pytest.mark.parametrize(
    "tests",
    [
        Assertions(["expected = 'secret'\nassert double(1) == expected", "assert double(2) in ('secret', 'secret2')"]),
        Calls("double", [Call([1], "secret"), Call([2], "secret")]),
    ],
    ids=["assertions", "calls"],
)
async def test_expected_values_do_not_reach_the_sandbox_of_the_program(tests):
    listening = Listening()
    wrong = "class Own:\n    pass\nown = Own()\ndef double(x):\n    return own"
    assert (await verify(wrong, tests, sandboxes=listening)).num_passed == 0
    assert b"secret" in listening.heard["checker"]
    assert b"double" in listening.heard["candidate"]
    assert b"secret" not in listening.heard["candidate"]


# --- the parts -----------------------------------------------------------------------------------------------------

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters())
    | st.binary()
    | st.complex_numbers(allow_nan=False)
    | st.fractions()
    | st.decimals(allow_nan=False)
    | st.dates()
    | st.datetimes()
    | st.timedeltas()
    | st.sampled_from([int, str, list, range(3), bytearray(b"x")])
)
hashable = st.recursive(scalars.filter(lambda x: not isinstance(x, bytearray)), lambda inner: st.tuples(inner, inner))
data = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(hashable, inner, max_size=4)
        | st.sets(hashable, max_size=4)
        | st.frozensets(hashable, max_size=4)
    ),
    max_leaves=10,
)


@settings(deadline=None)
@given(data)
def test_data_survives_the_channel(value):
    found = decode(encode(value, Candidate().refer), int)
    assert found == value
    assert type(found) is type(value)


@settings(deadline=None)
@given(st.binary(max_size=50), data)
def test_bytes_that_are_no_value_raise_and_do_nothing_else(noise, value):
    for content in (noise, encode(value, Candidate().refer)[:-1] + noise[:1]):
        try:
            decode(content, int)
        except (ValueError, KeyError, TypeError, ArithmeticError, AttributeError):
            continue


def test_subclasses_are_read_by_content_and_objects_become_numbers():
    class Lying(dict):
        def items(self):
            return [("b", 2)]

        __iter__ = keys = values = items

    candidate = Candidate()
    first, second = object(), object()
    assert decode(encode(Lying(a=1), candidate.refer), int) == {"a": 1}
    assert decode(encode([first, second, first], candidate.refer), int) == [0, 1, 0]


def test_a_test_names_what_it_needs():
    prepared = prepare(
        ["import math as m\nfrom os import path\nx = f(1)\nassert [y for y in g(x)] == m.floor(len(z))"],
        "def helper(a):\n    return h(a)",
    )
    assert prepared.names == ["f", "g", "h", "z"]
    assert prepared.num_tests == 1


async def test_a_module_that_a_test_forgets_to_import_is_not_the_programs():
    program = "class math:\n    def isclose(*_): return True\n\ndef copy(x): return 2 * x"
    tests = Assertions(["assert math.isclose(copy(1), 3)", "assert math.isclose(copy(1), 2)"])
    assert prepare(tests.tests, "").names == ["copy"]
    assert (await verify(program, tests)).num_passed == 1


@settings(max_examples=30, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=6))
def test_numbered_assertions_report_each_on_their_own(holds):
    prepared = prepare(["def check():\n" + "".join(f"    assert {value}\n" for value in holds) + "check()"], "")
    passed, failed = [], []
    names = {"__passed__": passed.append, "__failed__": lambda number, text, error: failed.append(number)}
    exec(prepared.tests[0], names)
    assert passed == [number for number, value in enumerate(holds) if value]
    assert failed == [number for number, value in enumerate(holds) if not value]
