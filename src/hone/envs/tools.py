"""Typed Python functions as tools, and the environment in which the policy calls them until it answers."""

import asyncio
import contextlib
import inspect
import re
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Protocol, Unpack, get_type_hints, overload, runtime_checkable

import msgspec

from hone.envs.blocking import call_blocking
from hone.envs.environment import Environment, EnvironmentArguments
from hone.envs.failures import RolloutFailure, deadline, failures_as
from hone.envs.rollout import Rollout
from hone.schema.messages import Message, ToolCall, ToolSpec
from hone.schema.traces import FailureClass

TIMEOUT_SECONDS = 60.0
CLOSE_SECONDS = 60.0
MAX_CHARACTERS = 20_000

Function = Callable[..., Any]
"""A function of the author's, sync or async."""
Hidden = Callable[[Rollout], Any]
"""Gives the value of a parameter that the policy does not see, for each call."""
ErrorPolicy = Literal["show", "fail"]
"""The policy reads the error, or it ends the rollout as a failure."""
OnError = ErrorPolicy | Mapping[type[BaseException], ErrorPolicy]
"""One word for all errors, or one by type of exception, of which the nearest decides."""


class ToolError(Exception):
    """What a tool has to complain of, in words for the policy."""


class ToolArgumentsError(ToolError):
    """What the policy gave as arguments does not fit the tool's schema."""


class UnknownToolError(ToolError):
    """The policy called a tool that there is not."""


@dataclass(frozen=True, slots=True)
class Tool:
    """What the policy can call; made by `@tool` from a function, or by hand around anything else.

    execute: the result for arguments, which are JSON text as the policy wrote it; it keeps its own deadline and raises
    `ToolArgumentsError` for arguments that do not fit. on_error: what becomes of its errors, over the environment's
    word. max_characters: longer results are cut in the middle. function: as written, to be called by code.
    """

    spec: ToolSpec
    execute: Callable[[str, Rollout], Awaitable[Any]]
    on_error: OnError = field(default_factory=dict)
    max_characters: int = MAX_CHARACTERS
    function: Function | None = None

    def __post_init__(self) -> None:
        check_policy(self.on_error, f"tool {self.name}")
        if self.max_characters < len(CUT_NOTE):
            raise ValueError(f"max_characters {self.max_characters} of tool {self.name} leaves no room for a result")

    @property
    def name(self) -> str:
        """As the policy calls it."""
        return self.spec.name

    def __call__(self, *positional: Any, **named: Any) -> Any:
        if self.function is None:
            raise TypeError(f"tool {self.name} is not a Python function; await its execute(arguments, rollout)")
        return self.function(*positional, **named)

    async def call(self, arguments: str, rollout: Rollout) -> str:
        """What the policy gets to read: a text as it is, anything else as JSON. Raises what went wrong."""
        result = await self.execute(arguments, rollout)
        with failures_as(FailureClass.TOOL, f"result of tool {self.name}"):
            return shortened(_sendable(result_text(result)), self.max_characters)


@overload
def tool(function: Function, /) -> Tool: ...
@overload
def tool(
    *,
    name: str | None = None,
    description: str | None = None,
    timeout_seconds: float | None = None,
    blocking: bool = False,
    hidden: Mapping[str, Hidden] | None = None,
    on_error: OnError | None = None,
    max_characters: int = MAX_CHARACTERS,
) -> Callable[[Function], Tool]: ...
def tool(
    function: Function | None = None,
    /,
    *,
    name: str | None = None,
    description: str | None = None,
    timeout_seconds: float | None = None,
    blocking: bool = False,
    hidden: Mapping[str, Hidden] | None = None,
    on_error: OnError | None = None,
    max_characters: int = MAX_CHARACTERS,
) -> Tool | Callable[[Function], Tool]:
    """Declare a function, sync or async, as a tool. Its annotations give the schema, its docstring the descriptions::

        @tool
        def search(query: str, limit: int = 10) -> list[str]:
            \"\"\"Titles of the pages about something.

            query: what they shall be about. limit: how many at most.
            \"\"\"

    Annotations may be whatever msgspec knows, structs, dataclasses and `Annotated[int, msgspec.Meta(ge=0)]` included.
    Arguments are checked strictly. A parameter annotated `Rollout` gets the rollout and is hidden from the policy, like
    those in `hidden`, which are computed for each call: hidden={"db": lambda rollout: rollout.state.db}.

    timeout_seconds: of each call, 60 by default. blocking: a synchronous function that may take long and runs in a
    thread; others run on the event loop of all rollouts and must be quick. on_error: "show" lets the policy read the
    error, "fail" ends the rollout as a failure of class tool; by type of exception with a mapping. Unset: the
    environment's word. A `RolloutFailure` always fails.
    """

    def declare(function: Function) -> Tool:
        own_name = name or str(getattr(function, "__name__", type(function).__name__))
        if not NAME.fullmatch(own_name):
            raise ValueError(f"a tool cannot be called {own_name!r}; give it a name of letters, digits, _ and -")
        seconds = _seconds(function, own_name, timeout_seconds, blocking)
        shown, injected = _parameters(function, own_name, hidden or {})
        texts = _described(function, own_name, shown)
        if description is not None:
            texts = Descriptions(description, texts.parameters)
        if not texts.function:
            raise ValueError(f"tool {own_name} has no description; give it a docstring: the policy knows nothing else")
        arguments_type = _arguments_type(own_name, shown, texts.parameters)
        return Tool(
            spec=ToolSpec(own_name, texts.function, _schema(arguments_type)),
            execute=_FunctionCall(function, arguments_type, injected, _is_async(function), blocking, seconds),
            on_error={} if on_error is None else on_error,
            max_characters=max_characters,
            function=function,
        )

    return declare if function is None else declare(function)


@runtime_checkable
class Toolset(Protocol):
    """Tools that are made for each rollout, or known only when it runs: of MCP servers, of sandboxes."""

    def open(self, rollout: Rollout) -> AbstractAsyncContextManager[Sequence[Tool]]:
        """The tools for one rollout, between its setup and its scoring. What is raised on entering is a failure."""
        ...


class ToolUse(Environment):
    """The policy calls tools, reads their results, and goes on until it calls none.

    All calls of one turn run at the same time; their results come in the order of the calls. tools: tools, plain
    functions to be made into tools, and `Toolset`s. on_error: what becomes of unknown tools, arguments that do not fit
    (`ToolArgumentsError`), what tools raise and their timeouts (`TimeoutError`), where a tool has no word of its own.
    max_tool_calls: a turn that would call more in all ends the rollout as truncated; none of its calls is executed.

    It measures num_tool_calls, num_tool_errors (those the policy was shown) and tool_seconds (time waited for tools).
    """

    def __init__(
        self,
        *,
        tools: Sequence[Tool | Toolset | Function],
        on_error: OnError = "show",
        **common: Unpack[EnvironmentArguments],
    ) -> None:
        self._toolsets = [given for given in tools if isinstance(given, Toolset)]
        self._tools = by_name(as_tool(given) for given in tools if not isinstance(given, Toolset))
        self._on_error = on_error
        super().__init__(tools=[one.spec for one in self._tools.values()], **common)
        check_policy(on_error, f"environment {self.name!r}")

    @property
    def tools_are_known(self) -> bool:
        """Whether no `Toolset` opens others for each rollout."""
        return not self._toolsets

    async def run(self, rollout: Rollout) -> None:
        """Alternate turns and tool results until the policy calls no tool and `reply` has nothing to say."""
        rollout.metrics |= {"num_tool_calls": 0, "num_tool_errors": 0, "tool_seconds": 0.0}
        async with contextlib.AsyncExitStack() as stack:
            tools = await self._open(rollout, stack)
            while True:
                turn = await rollout.turn()
                messages = await self._answer(rollout, turn.message.tool_calls, tools)
                if messages is None:
                    return
                rollout.append(*messages)

    async def reply(self, rollout: Rollout) -> Sequence[Message] | None:
        """What the environment says to a turn without tool calls; None, the default, ends the rollout."""
        return None

    async def _open(self, rollout: Rollout, stack: contextlib.AsyncExitStack) -> Mapping[str, Tool]:
        if not self._toolsets:
            return self._tools
        with failures_as(FailureClass.TOOL, "open tools"):
            opened = [await stack.enter_async_context(_opened(toolset, rollout)) for toolset in self._toolsets]
            tools = by_name([*self._tools.values(), *(one for toolset in opened for one in toolset)])
        rollout.tools = [one.spec for one in tools.values()]
        rollout.info["tools"] = msgspec.to_builtins(rollout.tools)  # what the policy saw, which nothing else records
        return tools

    async def _answer(
        self, rollout: Rollout, calls: Sequence[ToolCall], tools: Mapping[str, Tool]
    ) -> Sequence[Message] | None:
        if calls:
            return await self._results(rollout, calls, tools)
        with failures_as(FailureClass.ENVIRONMENT, "reply"):
            return await self.reply(rollout)

    async def _results(self, rollout: Rollout, calls: Sequence[ToolCall], tools: Mapping[str, Tool]) -> list[Message]:
        rollout.count_tool_calls(len(calls))
        started = time.perf_counter()
        outcomes = await _at_once([self._outcome(rollout, call, tools) for call in calls])
        rollout.metrics["num_tool_calls"] = rollout.num_tool_calls
        rollout.metrics["num_tool_errors"] += sum(isinstance(outcome, ShownError) for outcome in outcomes)
        rollout.metrics["tool_seconds"] += time.perf_counter() - started
        for outcome in outcomes:
            if isinstance(outcome, RolloutFailure):
                raise outcome
        return [
            Message("tool", str(outcome), tool_call_id=call.id) for call, outcome in zip(calls, outcomes, strict=True)
        ]

    async def _outcome(self, rollout: Rollout, call: ToolCall, tools: Mapping[str, Tool]) -> "Outcome":
        """One call carried out. A failure is returned, so that all calls of a turn end before the rollout does."""
        found = tools.get(call.name)
        try:
            with failures_as(FailureClass.TOOL, f"tool {call.name}"):
                try:
                    return await _found(call.name, tools).call(call.arguments, rollout)
                except RolloutFailure as failure:
                    return failure
        except RolloutFailure as failure:
            error = failure.__cause__
            assert error is not None
            own, limit = ({}, MAX_CHARACTERS) if found is None else (found.on_error, found.max_characters)
            if not is_shown(error, own, self._on_error):
                return failure
            return ShownError(shortened(_sendable(error_text(error)), limit))


class ShownError(str):
    """The text of an error that the policy gets to read in place of a result."""

    __slots__ = ()


Outcome = str | RolloutFailure


def check_policy(on_error: OnError, owner: str) -> None:
    """Refuse what is no policy on errors: a misspelled one would take effect as the opposite."""
    kinds, words = ([], [on_error]) if isinstance(on_error, str) else (list(on_error), list(on_error.values()))
    for kind in kinds:
        if not (isinstance(kind, type) and issubclass(kind, BaseException)):
            raise ValueError(f"on_error of {owner} names {kind!r}, which is no type of exception")
    for word in words:
        if word not in ("show", "fail"):
            raise ValueError(f"on_error of {owner} is {word!r}; use 'show' or 'fail'")


def is_shown(error: BaseException, *policies: OnError) -> bool:
    """Whether the policy is to read an error: the first policy with a word on it decides, the nearest type in that."""
    for policy in policies:
        if isinstance(policy, str):
            return policy == "show"
        for kind in type(error).__mro__:
            if kind in policy:
                return policy[kind] == "show"
    return True


def error_text(error: BaseException) -> str:
    """An error as the policy reads it."""
    parts = [type(error).__name__, str(error)] if not isinstance(error, ToolError | TimeoutError) else [str(error)]
    return ": ".join(["Error", *(part for part in parts if part)])


def result_text(result: Any) -> str:
    """A result as the policy reads it: a text as it is, anything else as JSON."""
    return result if isinstance(result, str) else msgspec.json.encode(result).decode()


def shortened(text: str, limit: int) -> str:
    """The text, or its beginning and end around a note, at most `limit` characters in all."""
    if len(text) <= limit:
        return text
    note = CUT_NOTE.format(len(text))
    kept = max(0, limit - len(note))
    tail = kept // 2
    return text[: kept - tail] + note + text[len(text) - tail :]


CUT_NOTE = "\n[... cut: {} characters in all ...]\n"
NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")


def as_tool(given: Tool | Function) -> Tool:
    """A tool as it is, a function as the tool that it declares."""
    return given if isinstance(given, Tool) else tool(given)


def by_name(tools: Iterable[Tool]) -> dict[str, Tool]:
    """Tools by their names, which must differ."""
    found: dict[str, Tool] = {}
    for one in tools:
        if one.name in found:
            raise ValueError(f"there are two tools {one.name!r}; give one of them another name")
        found[one.name] = one
    return found


def _found(name: str, tools: Mapping[str, Tool]) -> Tool:
    if name not in tools:
        raise UnknownToolError(f"there is no tool {name!r}; there are {', '.join(tools) or 'none'}")
    return tools[name]


@contextlib.asynccontextmanager
async def _opened(toolset: Toolset, rollout: Rollout) -> AsyncIterator[Sequence[Tool]]:
    """The tools of a toolset. Trouble in closing it costs no reward that was earned before; the trace remembers it."""
    context = toolset.open(rollout)
    tools = await context.__aenter__()
    try:
        yield tools
    finally:
        try:
            with failures_as(FailureClass.TOOL, "close tools"):
                async with deadline(CLOSE_SECONDS):
                    await context.__aexit__(*sys.exc_info())
        except RolloutFailure as failure:
            rollout.info["close_tools_failure"] = failure.failure.message


async def _at_once(calls: Sequence[Coroutine[Any, Any, Outcome]]) -> list[Outcome]:
    if len(calls) == 1:
        return [await calls[0]]
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(call) for call in calls]
    return [task.result() for task in running]


def _sendable(text: str) -> str:
    """Without the lone surrogates that no encoding takes: tools read file names and bytes of any kind."""
    return text.encode(errors="replace").decode()


# --- a function as a tool ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _FunctionCall:
    """Calls the function of a tool with decoded arguments and the hidden ones."""

    function: Function
    arguments_type: type[msgspec.Struct]
    hidden: Mapping[str, Hidden]
    is_async: bool
    blocking: bool
    timeout_seconds: float

    async def __call__(self, arguments: str, rollout: Rollout) -> Any:
        given = _decoded(arguments, self.arguments_type)
        with failures_as(FailureClass.ENVIRONMENT, "hidden arguments"):
            given |= {name: hidden(rollout) for name, hidden in self.hidden.items()}
        if self.blocking:
            return await call_blocking(self.function, given, self.timeout_seconds)
        if not self.is_async:
            return self.function(**given)
        async with deadline(self.timeout_seconds):
            return await self.function(**given)


def _decoded(arguments: str, arguments_type: type[msgspec.Struct]) -> dict[str, Any]:
    try:
        decoded = msgspec.json.decode(arguments.strip() or "{}", type=arguments_type)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise ToolArgumentsError(f"the arguments do not fit: {error}") from error
    given = {name: getattr(decoded, name) for name in arguments_type.__struct_fields__}
    return {name: value for name, value in given.items() if value is not msgspec.UNSET}


def _is_async(function: Function) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _seconds(function: Function, name: str, timeout_seconds: float | None, blocking: bool) -> float:
    is_async = _is_async(function)
    if is_async and blocking:
        raise ValueError(f"tool {name} is async and blocking; blocking=True is for synchronous functions")
    if timeout_seconds is not None and not timeout_seconds > 0:
        raise ValueError(f"timeout_seconds {timeout_seconds} of tool {name} is not positive")
    if timeout_seconds is not None and not (is_async or blocking):
        raise ValueError(f"tool {name} runs on the event loop, where no deadline can stop it; add blocking=True")
    return TIMEOUT_SECONDS if timeout_seconds is None else timeout_seconds


@dataclass(frozen=True, slots=True)
class _Parameter:
    name: str
    annotation: Any
    default: Any


def _parameters(
    function: Function, name: str, hidden: Mapping[str, Hidden]
) -> tuple[list[_Parameter], dict[str, Hidden]]:
    """Those that the policy gives, and those that it does not see."""
    try:
        annotations = get_type_hints(_annotated(function), include_extras=True)
    except (NameError, TypeError) as error:
        raise ValueError(f"the annotations of tool {name} cannot be read: {error}") from error
    shown: list[_Parameter] = []
    injected = dict(hidden)
    parameters = inspect.signature(function).parameters
    if strange := sorted(hidden.keys() - parameters.keys()):
        raise ValueError(f"tool {name} hides {strange[0]!r}, which is none of its parameters")
    for parameter in parameters.values():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ValueError(f"tool {name} takes {parameter}; a policy gives arguments by name, so name each")
        if parameter.name in hidden:
            continue
        if parameter.name not in annotations:
            raise ValueError(
                f"parameter {parameter.name!r} of tool {name} has no annotation; annotate it, hide it with"
                " hidden={...}, or declare a bound method: tool(self.method)"
            )
        if annotations[parameter.name] is Rollout:
            injected[parameter.name] = _the_rollout
        else:
            shown.append(_Parameter(parameter.name, annotations[parameter.name], parameter.default))
    return shown, injected


def _annotated(function: Function) -> Any:
    """What carries the annotations: the function, or the `__call__` of an object that is called like one."""
    return function if inspect.isroutine(function) else type(function).__call__


def _the_rollout(rollout: Rollout) -> Rollout:
    return rollout


def _arguments_type(name: str, shown: Sequence[_Parameter], descriptions: Mapping[str, str]) -> type[msgspec.Struct]:
    """A struct of what the policy gives; what it leaves out stays unset, so that the function's default holds."""
    fields: list[tuple[str, Any] | tuple[str, Any, Any]] = []
    for parameter in shown:
        described = _with_meta(name, parameter, descriptions.get(parameter.name))
        is_required = parameter.default is inspect.Parameter.empty
        fields.append((parameter.name, described) if is_required else (parameter.name, described, msgspec.UNSET))
    return msgspec.defstruct("Arguments", fields, kw_only=True, forbid_unknown_fields=True)


def _with_meta(name: str, parameter: _Parameter, description: str | None) -> Any:
    annotation = parameter.annotation
    extra: dict[str, Any] = {}
    if parameter.default is not inspect.Parameter.empty:
        extra["default"] = _default(name, parameter)
    try:
        if extra:
            annotation = annotation | msgspec.UnsetType
        annotation = Annotated[annotation, msgspec.Meta(description=description, extra_json_schema=extra or None)]
        msgspec.json.schema(annotation)
        msgspec.json.Decoder(annotation)
    except (TypeError, ValueError, NameError) as error:
        complaint = str(error).partition("\n")[0].removesuffix(" requires either:")
        raise ValueError(
            f"parameter {parameter.name!r} of tool {name} cannot be given as JSON: {complaint}; use str, int, float,"
            " bool, None, Literal, Enum, list, dict, unions of these, dataclasses, structs or TypedDict, or hide it"
        ) from error
    return annotation


def _default(name: str, parameter: _Parameter) -> Any:
    try:
        return msgspec.to_builtins(parameter.default)
    except TypeError as error:
        raise ValueError(
            f"the default of parameter {parameter.name!r} of tool {name} cannot be written as JSON: {error}"
        ) from error


def _schema(arguments_type: type[msgspec.Struct]) -> dict[str, Any]:
    (top,), definitions = msgspec.json.schema_components([arguments_type], ref_template="#/$defs/{name}")
    schema: dict[str, Any] = definitions.pop(top["$ref"].removeprefix("#/$defs/"))
    del schema["title"]
    return schema | ({"$defs": definitions} if definitions else {})


# --- what a docstring says -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Descriptions:
    """The function in words, and each parameter that the docstring describes."""

    function: str
    parameters: Mapping[str, str]


SECTION = re.compile(r"^(Args|Arguments|Parameters|Returns|Yields|Raises|Examples?|Notes?):[ \t]*$", re.MULTILINE)
ENTRY = re.compile(r"^[ \t]*(\*{0,2}\w+)(?:[ \t]*\([^)\n]*\))?:(?=\s|$)")


def _described(function: Function, name: str, shown: Sequence[_Parameter]) -> Descriptions:
    """Parameters are described in a section `Args:`, or in paragraphs that begin with `name: `, several in a row."""
    doc = inspect.getdoc(_annotated(function)) or ""
    known = inspect.signature(function).parameters
    said: list[str] = []
    found: dict[str, str] = {}
    section = ""
    for block in re.split(r"\n[ \t]*\n", SECTION.sub(r"\n\n\1:", doc)):
        heading = SECTION.match(block.strip("\n"))
        is_indented = block.startswith((" ", "\t")) and not heading
        section = heading[1] if heading else section if is_indented else ""
        if section in ("Args", "Arguments", "Parameters"):
            body = SECTION.sub("", block).strip("\n")
            _check_entries(body, name, known)
            found |= _entries(body, known)
        elif section in ("Raises", "Yields"):
            continue
        elif entries := _entries(block, known):
            found |= entries
        elif block.strip():
            said.append(block.strip("\n").rstrip())
    wanted = {parameter.name for parameter in shown}
    return Descriptions("\n\n".join(said), {key: text for key, text in found.items() if key in wanted})


def _check_entries(body: str, name: str, known: Mapping[str, Any]) -> None:
    """A section must not describe what is not there: a parameter was renamed, or is spelled wrongly."""
    lines = body.splitlines()
    least = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
    for line in lines:
        entry = ENTRY.match(line)
        if entry and len(line) - len(line.lstrip()) == least and entry[1] not in known:
            raise ValueError(f"the docstring of tool {name} describes {entry[1]!r}, which is none of its parameters")


def _entries(block: str, known: Mapping[str, Any]) -> dict[str, str]:
    """`name: text` for each known name at the beginning of a line or a sentence; nothing unless the block begins so."""
    if not known:
        return {}
    names = "|".join(map(re.escape, known))
    entry = re.compile(
        rf"(?:^[ \t]*|(?<=[.;] ))((?:{names})(?:,\s+(?:{names}))*)(?:[ \t]*\([^)\n]*\))?:\s", re.MULTILINE
    )
    starts = list(entry.finditer(block + "\n"))
    if not starts or block[: starts[0].start()].strip():
        return {}
    ends = [start.start() for start in starts[1:]] + [len(block)]
    found: dict[str, str] = {}
    for start, end in zip(starts, ends, strict=True):
        text = " ".join(block[start.end() : end].split()).removesuffix(";")
        found |= dict.fromkeys(re.split(r",\s+", start[1]), text) if text else {}
    return found
