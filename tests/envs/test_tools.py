import asyncio
import dataclasses
import enum
import functools
import json
import threading
from typing import Annotated, Any, Literal, TypedDict

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes import ScriptedSampler
from hone.envs import (
    FailureClass,
    Limits,
    Rollout,
    RolloutFailure,
    Rubric,
    StopReason,
    Task,
    Tool,
    ToolArgumentsError,
    ToolUse,
    assistant,
    check_gold,
    metric,
    play,
    reward,
    run_rollout,
    tool,
    tool_call,
    tool_result,
    user,
)
from hone.envs.tools import shortened
from hone.schema.messages import ToolCall, ToolSpec
from hone.schema.sampling import FinishReason, SamplingParameters, Turn

TASK = Task(prompt=(user("use the tools"),), reference="done")


@reward
def exact(answer, reference):
    return answer == reference


def tool_use(*tools, **settings):
    return ToolUse(name="tool_use", rubric=Rubric([exact]), train=[TASK], tools=tools, **settings)


def calls(*given):
    """A turn that calls these tools: (name, arguments as JSON text or as a mapping)."""
    return assistant(
        "",
        *(
            ToolCall(f"call_{index}", name, arguments if isinstance(arguments, str) else json.dumps(arguments))
            for index, (name, arguments) in enumerate(given)
        ),
    )


async def results(environment, *given):
    """What the tools answer to one turn with these calls, after which the policy says that it is done."""
    trace = await play(environment, TASK, calls(*given), "done")
    assert trace.failure is None, trace.failure
    messages = [message for message in trace.messages if message.role == "tool"]
    assert [message.tool_call_id for message in messages] == [f"call_{index}" for index in range(len(given))]
    return [message.content for message in messages]


async def failure(environment, *given):
    trace = await play(environment, TASK, calls(*given), "done")
    assert trace.failure is not None
    return trace.failure


@tool
def add(left: int, right: int = 1) -> int:
    """The sum of two numbers.

    left: the first. right: the second,
    which may be left out.
    """
    return left + right


@tool
async def wait(seconds: float) -> str:
    """Wait."""
    await asyncio.sleep(seconds)
    return f"waited {seconds}"


@tool
def break_down(kind: str = "ValueError") -> str:
    """Raise an error."""
    raise {"ValueError": ValueError, "KeyError": KeyError, "exit": SystemExit}[kind]("it broke")


# --- the schema ----------------------------------------------------------------------------------------------------


def test_a_function_is_described_by_its_annotations_and_docstring():
    assert add.spec == ToolSpec(
        "add",
        "The sum of two numbers.",
        {
            "type": "object",
            "properties": {
                "left": {"type": "integer", "description": "the first."},
                "right": {"type": "integer", "description": "the second, which may be left out.", "default": 1},
            },
            "required": ["left"],
            "additionalProperties": False,
        },
    )
    assert add(2, right=3) == 5


def test_a_docstring_with_sections_describes_each_parameter():
    @tool
    def find(query: str, limits: list[int], deep: bool = False) -> str:
        """Find pages.

        The newest come first.

        Args:
            query: what they are about,
                in words.
            limits (list[int]): how many.

            deep: whether to look further.
        Returns:
            Their titles.

        Raises:
            ValueError: never.
        """
        return query

    properties = find.spec.parameters["properties"]
    assert find.spec.description == "Find pages.\n\nThe newest come first.\n\nReturns:\n    Their titles."
    assert [properties[name]["description"] for name in ("query", "limits", "deep")] == [
        "what they are about, in words.",
        "how many.",
        "whether to look further.",
    ]


def test_parameters_named_together_share_their_description():
    @tool
    def span(start: int, end: int, unit: str) -> int:
        """A span.

        start, end: both are counted; unit: of the two
        """
        return end - start

    described = {name: schema["description"] for name, schema in span.spec.parameters["properties"].items()}
    assert described == {"start": "both are counted", "end": "both are counted", "unit": "of the two"}


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


@dataclasses.dataclass
class Point:
    x: int
    y: float = 0.0


class Shape(msgspec.Struct):
    points: list[Point]
    colour: Colour = Colour.RED


class Style(TypedDict):
    width: int


@tool
def draw(
    shape: Shape,
    mode: Literal["line", "fill"] = "line",
    title: str | None = None,
    style: Style | None = None,
    scale: Annotated[int, msgspec.Meta(ge=1)] = 1,
    tags: dict[str, bool] = {},  # noqa: B006
    extra: Any = None,
) -> Any:
    """Draw a shape."""
    assert isinstance(shape, Shape)
    assert all(isinstance(point, Point) for point in shape.points)
    return [shape, mode, title, style, scale, tags, extra]


async def test_nested_types_reach_the_function_as_what_they_are_and_come_back_as_json():
    arguments = {"shape": {"points": [{"x": 1, "y": 2}], "colour": "blue"}, "mode": "fill", "title": None, "scale": 2}
    [text] = await results(tool_use(draw), ("draw", arguments))
    assert json.loads(text) == [
        {"points": [{"x": 1, "y": 2.0}], "colour": "blue"}, "fill", None, None, 2, {}, None,
    ]  # fmt: skip
    schema = draw.spec.parameters
    assert schema["required"] == ["shape"]
    assert schema["$defs"].keys() == {"Shape", "Point", "Colour", "Style"}
    assert schema["properties"]["scale"] == {"type": "integer", "minimum": 1, "default": 1}


# A whole number written as 1.0 is an integer to a schema, not to a Python function: fractions only.
FRACTIONS = st.floats(-2.5, 2.5).filter(lambda number: not number.is_integer())
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), FRACTIONS, st.sampled_from(["red", "line", "fill", "x"])
)
JSON = st.recursive(
    VALUES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["x", "y", "points", "colour", "width", "z"]), inner, max_size=4),
    ),
    max_leaves=8,
)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "shape": st.one_of(st.just({"points": [{"x": 1}]}), JSON),
            **dict.fromkeys(["mode", "title", "style", "scale", "tags", "extra", "strange"], JSON),
        },
    )
)
def test_arguments_are_taken_exactly_when_the_schema_that_the_policy_sees_allows_them(arguments):
    jsonschema = pytest.importorskip("jsonschema", reason="comes with the extra mcp")
    validator = jsonschema.Draft202012Validator(draw.spec.parameters)
    jsonschema.Draft202012Validator.check_schema(draw.spec.parameters)
    try:
        asyncio.run(draw.execute(json.dumps(arguments), None))
        taken = True
    except ToolArgumentsError:
        taken = False
    assert taken == validator.is_valid(arguments), arguments


def bare(x):
    """A tool."""


def starred(*x: int):
    """A tool."""


def named(**x: int):
    """A tool."""


def positional(x: int, /):
    """A tool."""


def complicated(x: complex):
    """A tool."""


def two_structs(x: Point | Shape):
    """A tool."""


def unreadable(x: "Nowhere"):  # noqa: F821
    """A tool."""


def silent(x: int):
    pass


def strange_default(x: Any = object()):
    """A tool."""


def misspelled(x: int):
    """A tool.

    Args:
        y: not there.
    """


@pytest.mark.parametrize(
    ("function", "settings", "complaint"),
    [
        (bare, {}, "no annotation"),
        (starred, {}, "name each"),
        (named, {}, "name each"),
        (positional, {}, "name each"),
        (complicated, {}, "cannot be given as JSON"),
        (two_structs, {}, "cannot be given as JSON"),
        (unreadable, {}, "cannot be read"),
        (silent, {}, "no description"),
        (strange_default, {}, "default of parameter 'x'"),
        (misspelled, {}, "describes 'y'"),
        (add.function, {"hidden": {"z": lambda rollout: 1}}, "hides 'z'"),
        (add.function, {"timeout_seconds": 1}, "add blocking=True"),
        (wait.function, {"timeout_seconds": 0}, "not positive"),
        (wait.function, {"blocking": True}, "async and blocking"),
        (add.function, {"name": "add numbers"}, "cannot be called"),
        (add.function, {"max_characters": 5}, "no room"),
        (lambda: 1, {}, "cannot be called"),
        (add.function, {"on_error": "hide"}, "use 'show' or 'fail'"),
        (add.function, {"on_error": {"ValueError": "show"}}, "no type of exception"),
        (add.function, {"on_error": {ValueError: "hide"}}, "use 'show' or 'fail'"),
    ],
)
def test_what_cannot_be_a_tool_is_refused_at_its_definition(function, settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        tool(**settings)(function)


def test_two_tools_of_one_name_are_refused():
    with pytest.raises(ValueError, match="two tools 'add'"):
        tool_use(add, add)


# --- calls ---------------------------------------------------------------------------------------------------------


async def test_the_policy_calls_reads_and_answers():
    trace = await play(tool_use(add), TASK, calls(("add", {"left": 2, "right": 3})), "done")
    assert [message.role for message in trace.messages] == ["user", "assistant", "tool", "assistant"]
    assert trace.messages[2] == tool_result("5")
    assert trace.reward == 1
    assert trace.stop_reason is StopReason.COMPLETED
    assert (trace.metrics["num_tool_calls"], trace.metrics["num_tool_errors"]) == (1, 0)
    assert trace.metrics["tool_seconds"] >= 0


async def test_gold_with_tool_calls_is_checked():
    gold = [assistant("", tool_call("add", {"left": 2})), tool_result("3"), assistant("done")]
    assert (await check_gold(tool_use(add, gold=lambda task: gold), TASK)).reward == 1


async def test_calls_of_one_turn_run_at_once_and_their_results_keep_the_order():
    both = asyncio.Barrier(2)

    @tool
    async def meet(name: str) -> str:
        """Wait for the other."""
        async with asyncio.timeout(10):
            await both.wait()
        await asyncio.sleep(0.02 if name == "first" else 0)
        return name

    assert await results(tool_use(meet), ("meet", {"name": "first"}), ("meet", {"name": "second"})) == [
        "first",
        "second",
    ]


async def test_a_function_becomes_a_tool_where_tools_are_given():
    def shout(text: str) -> str:
        """Louder."""
        return text.upper()

    class Counter:
        """Counts."""

        def __init__(self):
            self.count = 0

        def step(self, by: int = 1) -> int:
            """Count on."""
            self.count += by
            return self.count

    environment = tool_use(shout, Counter().step)
    assert await results(environment, ("shout", {"text": "a"}), ("step", {}), ("step", "")) == ["A", "1", "2"]


async def test_a_text_goes_to_the_policy_as_it_is_and_anything_else_as_json():
    @tool
    def give(what: str) -> Any:
        """Give something."""
        return {"text": "plain", "none": None, "point": Point(1), "surrogate": "\udcff", "list": ["é"]}[what]

    asked = [("give", {"what": what}) for what in ("text", "none", "point", "surrogate", "list")]
    assert await results(tool_use(give), *asked) == ["plain", "null", '{"x":1,"y":0.0}', "?", '["é"]']


async def test_a_result_that_is_no_json_is_a_failure_whatever_the_policy_on_errors():
    @tool
    def give() -> Any:
        """Give something."""
        return object()

    assert (await failure(tool_use(give), ("give", {}))).kind is FailureClass.TOOL


async def test_a_huge_result_is_cut_in_the_middle():
    @tool(max_characters=200)
    def recite() -> str:
        """Recite."""
        return "a" * 5000 + "z" * 5000

    [text] = await results(tool_use(recite), ("recite", {}))
    assert len(text) == 200
    assert text.startswith("aaa")
    assert text.endswith("zzz")
    assert "10000 characters" in text


@given(st.text(max_size=300), st.integers(40, 320))
def test_a_cut_text_is_within_the_limit_and_keeps_both_ends(text, limit):
    cut = shortened(text, limit)
    assert len(cut) <= max(limit, 45)
    assert (cut == text) == (len(text) <= limit)
    assert cut[:1] == text[:1] or limit < 50


async def test_a_blocking_tool_runs_off_the_event_loop():
    @tool(blocking=True)
    def thread() -> bool:
        """Where it runs."""
        return threading.current_thread() is threading.main_thread()

    assert await results(tool_use(thread), ("thread", {})) == ["false"]


# --- hidden arguments ----------------------------------------------------------------------------------------------


async def test_hidden_arguments_are_injected_for_each_rollout_and_not_shown():
    @tool(hidden={"notes": lambda rollout: rollout.state})
    def note(text: str, notes: list[str], rollout: Rollout) -> str:
        """Note something."""
        notes.append(text)
        return f"{rollout.attempt}: {', '.join(notes)}"

    class Stateful(ToolUse):
        async def setup(self, rollout):
            rollout.state = []

    assert note.spec.parameters["properties"].keys() == {"text"}
    environment = Stateful(name="notes", rubric=Rubric([exact]), train=[TASK], tools=[note])
    for attempt in (0, 1):
        turns = [calls(("note", {"text": "a"})), calls(("note", {"text": "b"})), assistant("done")]
        sampler = ScriptedSampler([Turn(turn, FinishReason.STOP) for turn in turns])
        trace = await run_rollout(environment, TASK, attempt, sampler, SamplingParameters(), 0)
        assert [m.content for m in trace.messages if m.role == "tool"] == [f"{attempt}: a", f"{attempt}: a, b"]


async def test_the_policy_cannot_give_a_hidden_argument():
    @tool(hidden={"secret": lambda rollout: 1})
    def peek(secret: int) -> int:
        """Peek."""
        return secret

    [text] = await results(tool_use(peek), ("peek", {"secret": 2}))
    assert "unknown field `secret`" in text


async def test_a_hidden_argument_that_cannot_be_made_is_a_failure_of_the_environment():
    peek = tool(hidden={"left": lambda rollout: rollout.state["db"]})(add.function)
    found = await failure(tool_use(peek), ("add", {}))
    assert (found.kind, found.where) == (FailureClass.ENVIRONMENT, "hidden arguments")


# --- errors --------------------------------------------------------------------------------------------------------

BAD_CALLS = [
    (("add", "{"), "truncated"),
    (("add", "[1]"), "Expected `object`"),
    (("add", '"x"'), "Expected `object`"),
    (("add", {}), "missing required field `left`"),
    (("add", {"left": "2"}), "Expected `int`, got `str` - at `$.left`"),
    (("add", {"left": 2, "middle": 1}), "unknown field `middle`"),
    (("add", '{"left": NaN}'), "malformed"),
    (("add", '{"left": "\\ud800"}'), "arguments do not fit"),
    (("add", '{"left": ' + "[" * 100_000), "arguments do not fit"),
    (("subtract", {}), "no tool 'subtract'; there are add, break_down, wait"),
    (("break_down", {}), "Error: ValueError: it broke"),
    (("break_down", {"kind": "exit"}), "Error: SystemExit: it broke"),
]


@pytest.mark.parametrize(("call", "text"), BAD_CALLS)
async def test_the_policy_reads_what_went_wrong(call, text):
    environment = tool_use(add, break_down, wait)
    trace = await play(environment, TASK, calls(call), calls(("add", {"left": 1})), "done")
    assert trace.reward == 1
    assert trace.messages[2].content.startswith("Error: ")
    assert text in trace.messages[2].content
    assert trace.messages[4].content == "2"
    assert (trace.metrics["num_tool_calls"], trace.metrics["num_tool_errors"]) == (2, 1)


@pytest.mark.parametrize(("call", "text"), BAD_CALLS)
async def test_an_environment_may_take_errors_for_failures(call, text):
    found = await failure(tool_use(add, break_down, wait, on_error="fail"), call)
    assert found.kind is FailureClass.TOOL
    assert found.where == f"tool {call[0]}"


async def test_a_tool_that_is_late_is_shown_as_an_error_or_fails_the_rollout():
    late = functools.partial(tool, timeout_seconds=0.01)
    assert await results(tool_use(late()(wait.function)), ("wait", {"seconds": 60})) == [
        "Error: took longer than 0.01 s"
    ]
    found = await failure(tool_use(late(on_error="fail")(wait.function)), ("wait", {"seconds": 60}))
    assert found.kind is FailureClass.TOOL
    assert "took longer than 0.01 s" in found.message


async def test_each_call_has_its_own_deadline():
    environment = tool_use(tool(timeout_seconds=0.1)(wait.function))
    late, early = await results(environment, ("wait", {"seconds": 60}), ("wait", {"seconds": 0}))
    assert late.startswith("Error: ")
    assert early == "waited 0.0"


async def test_a_blocking_tool_that_is_late_is_left_behind():
    release = threading.Event()

    @tool(blocking=True, timeout_seconds=0.05)
    def hang() -> None:
        """Hang."""
        release.wait(30)

    try:
        assert await results(tool_use(hang), ("hang", {})) == ["Error: took longer than 0.05 s"]
    finally:
        release.set()


async def test_the_policy_on_errors_is_the_tools_before_the_environments_and_the_nearest_types_before_others():
    by_type = {LookupError: "fail", Exception: "show"}
    shown = tool(on_error=by_type)(break_down.function)
    environment = tool_use(shown, add, on_error={ToolArgumentsError: "fail"})
    assert (await failure(environment, ("break_down", {"kind": "KeyError"}))).kind is FailureClass.TOOL
    assert await results(environment, ("break_down", {"kind": "ValueError"})) == ["Error: ValueError: it broke"]
    assert (await failure(environment, ("add", {"left": ""}))).kind is FailureClass.TOOL
    assert "Error" in (await results(environment, ("break_down", {"kind": 1})))[0]


@pytest.mark.parametrize("kind", list(FailureClass))
async def test_a_typed_failure_always_fails_the_rollout(kind):
    @tool(on_error="show")
    async def run() -> str:
        """Run in a sandbox."""
        try:
            raise ConnectionError
        except ConnectionError as error:
            raise RolloutFailure(kind, "sandbox", "it died") from error

    found = await failure(tool_use(run, add), ("add", {"left": 1}), ("run", {}))
    assert (found.kind, found.where, found.message) == (kind, "sandbox", "it died")


async def test_a_cancellation_that_nobody_asked_for_is_an_error_of_the_tool():
    @tool
    async def give_up() -> str:
        """Give up."""
        raise asyncio.CancelledError

    environment = tool_use(give_up, add)
    assert await results(environment, ("give_up", {})) == ["Error: CancelledError"]
    assert await results(environment, ("give_up", {}), ("add", {"left": 1})) == ["Error: CancelledError", "2"]


async def test_a_cancelled_rollout_stops_its_tools():
    stopped = []

    @tool
    async def work(name: str) -> str:
        """Work."""
        started.set()
        try:
            await asyncio.sleep(60)
        finally:
            stopped.append(name)
        return name

    started = asyncio.Event()
    environment = tool_use(work)
    rollout = asyncio.create_task(
        play(environment, TASK, calls(("work", {"name": "a"}), ("work", {"name": "b"})), "done")
    )
    await started.wait()
    rollout.cancel()
    with pytest.raises(asyncio.CancelledError):
        await rollout
    assert sorted(stopped) == ["a", "b"]


# --- the course ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("own", "limit", "executed"), [(None, 3, 3), (3, None, 3), (2, 5, 2), (5, 2, 2), (0, None, 0), (None, None, 4)]
)
async def test_the_budget_of_tool_calls_truncates_and_the_lower_one_holds(own, limit, executed):
    turn = Turn(calls(("add", {"left": 1})), FinishReason.STOP)
    sampler = ScriptedSampler([turn] * 4 + ["done"])
    environment = tool_use(add, max_tool_calls=own)
    trace = await run_rollout(environment, TASK, 0, sampler, SamplingParameters(), 0, Limits(max_tool_calls=limit))
    assert trace.metrics["num_tool_calls"] == executed
    assert trace.stop_reason is (StopReason.COMPLETED if executed == 4 else StopReason.MAX_TOOL_CALLS)
    assert trace.is_truncated == (executed < 4)
    assert trace.failure is None


async def test_no_call_of_a_turn_that_passes_the_budget_is_executed():
    trace = await play(tool_use(add, max_tool_calls=1), TASK, calls(("add", {"left": 1}), ("add", {"left": 2})))
    assert trace.stop_reason is StopReason.MAX_TOOL_CALLS
    assert trace.messages[-1].role == "assistant"
    assert trace.metrics["num_tool_calls"] == 0


async def test_calls_of_a_turn_that_was_cut_off_are_not_executed():
    trace = await play(tool_use(add), TASK, calls(("add", {"left": 1})), truncated=True)
    assert trace.stop_reason is StopReason.MAX_TOKENS
    assert trace.messages[-1].role == "assistant"


async def test_an_environment_may_answer_a_turn_without_calls():
    class Insisting(ToolUse):
        async def reply(self, rollout):
            return None if rollout.num_tool_calls else [user("Use the tool.")]

    environment = Insisting(name="insisting", rubric=Rubric([exact]), train=[TASK], tools=[add])
    trace = await play(environment, TASK, "done", calls(("add", {"left": 1})), "done")
    assert [message.role for message in trace.messages[1:]] == ["assistant", "user", "assistant", "tool", "assistant"]


async def test_rewards_and_metrics_see_what_tools_cost():
    @metric
    def calls_seen(trace):
        return trace.metrics["num_tool_calls"]

    environment = ToolUse(name="watched", rubric=Rubric([exact, calls_seen]), train=[TASK], tools=[add])
    trace = await play(environment, TASK, calls(("add", {"left": 1})), "done")
    assert trace.metrics["calls_seen"] == 1


async def test_a_tool_can_be_made_by_hand():
    async def echo(arguments, rollout):
        return arguments

    by_hand = Tool(ToolSpec("echo", "Echo.", {"type": "object"}), echo)
    assert await results(tool_use(by_hand), ("echo", '{"a": 1}')) == ['{"a": 1}']
    with pytest.raises(TypeError, match="not a Python function"):
        by_hand("a")


class Doubling:
    """A toolset that makes a tool for each rollout."""

    def __init__(self, error=None, close_error=None):
        self.error = error
        self.close_error = close_error
        self.log = []

    def open(self, rollout):
        return _Opened(self, rollout)


class _Opened:
    def __init__(self, owner, rollout):
        self.owner, self.rollout = owner, rollout

    async def __aenter__(self):
        if self.owner.error is not None:
            raise self.owner.error
        self.owner.log.append("open")

        @tool
        def double(number: int) -> int:
            """Twice a number."""
            return 2 * number

        return [double]

    async def __aexit__(self, *error):
        self.owner.log.append("close")
        if self.owner.close_error is not None:
            raise self.owner.close_error


async def test_a_toolset_is_open_while_its_rollout_runs_and_its_tools_are_shown():
    toolset = Doubling()
    environment = tool_use(add, toolset)
    sampler = ScriptedSampler([Turn(calls(("double", {"number": 4})), FinishReason.STOP), "done"])
    shown = []

    class Watching:
        async def sample(self, branch, tools, sampling):
            shown.append([spec.name for spec in tools])
            assert toolset.log == ["open"]
            return await sampler.sample(branch, tools, sampling)

    trace = await run_rollout(environment, TASK, 0, Watching(), SamplingParameters(), 0)
    assert trace.messages[2].content == "8"
    assert shown == [["add", "double"]] * 2
    assert toolset.log == ["open", "close"]


async def test_a_toolset_that_does_not_open_is_a_failure_of_class_tool():
    first, second = Doubling(), Doubling(OSError("no server"))
    found = await failure(tool_use(first, second), ("double", {"number": 1}))
    assert (found.kind, found.where) == (FailureClass.TOOL, "open tools")
    assert first.log == ["open", "close"]


async def test_trouble_in_closing_a_toolset_costs_no_reward():
    toolset = Doubling(close_error=OSError("the server is gone"))
    trace = await play(tool_use(toolset), TASK, calls(("double", {"number": 4})), "done")
    assert trace.reward == 1
    assert "the server is gone" in trace.info["close_tools_failure"]


async def test_a_toolset_is_closed_when_the_rollout_fails_or_is_truncated():
    toolset = Doubling()
    await failure(tool_use(toolset, on_error="fail"), ("double", {}))
    assert (await play(tool_use(toolset), TASK, "cut", truncated=True)).is_truncated
    assert toolset.log == ["open", "close"] * 2


def test_an_environment_refuses_a_policy_on_errors_that_is_none():
    with pytest.raises(ValueError, match="on_error of environment 'tool_use' is 'hide'"):
        tool_use(add, on_error="hide")
