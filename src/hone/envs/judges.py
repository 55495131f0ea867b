"""A judge: a model behind any OpenAI-compatible endpoint that gives verdicts on answers, in a form that can be read.

Verdicts are remembered by what was asked, requests are limited, and all waiting for one verdict has one deadline. A judge
that does not answer, or not in the form asked for, is a failure of class judge and never a zero.
"""

import asyncio
import contextlib
import hashlib
import logging
import os
import re
import sqlite3
import string
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar
from weakref import WeakKeyDictionary

import msgspec

from hone.envs.blocking import call_blocking
from hone.envs.failures import deadline, failures_as
from hone.envs.parsers import final_number, json_value, without_reasoning
from hone.schema.messages import Message
from hone.schema.sampling import SamplingParameters
from hone.schema.seeds import derive_seed
from hone.schema.traces import FailureClass, Node

if TYPE_CHECKING:
    from hone.inference.client import ChatSampler

logger = logging.getLogger("hone.envs.judges")

V = TypeVar("V")

DEADLINE_SECONDS = 50.0
"""Below the 60 s that a rubric gives its functions, so that what fails is the judge and not the reward."""
MAX_REMEMBERED = 10_000
CACHE_SECONDS = 5.0


class UnreadableVerdictError(ValueError):
    """The judge said something in which there is no verdict."""


def json_verdict(kind: type[V]) -> Callable[[str], V]:
    """Verdicts that are the last JSON object in what the judge says, with the fields of a msgspec type."""

    def read(text: str) -> V:
        value = json_value(without_reasoning(text))
        if value is None:
            raise UnreadableVerdictError("there is no JSON in it")
        try:
            return msgspec.convert(value, type=kind)
        except msgspec.ValidationError as error:
            raise UnreadableVerdictError(str(error)) from error

    return read


def choice_verdict(*choices: str) -> Callable[[str], str]:
    """Verdicts that are one of these words, and only one of them, in the last line of what the judge says."""
    spelled = {choice.casefold(): choice for choice in choices}
    if len(choices) < 2 or len(spelled) < len(choices):
        raise ValueError(f"choices {choices} are not two different words at least")
    longest_first = sorted(map(re.escape, choices), key=len, reverse=True)
    pattern = re.compile(rf"(?<!\w)(?:{'|'.join(longest_first)})(?!\w)", re.IGNORECASE)

    def read(text: str) -> str:
        last_line = without_reasoning(text).rpartition("\n")[2]
        found = {spelled[word.casefold()] for word in pattern.findall(last_line)}
        if len(found) != 1:
            raise UnreadableVerdictError(f"its last line has {len(found)} of {', '.join(choices)}")
        return found.pop()

    return read


def number_verdict(least: float, most: float) -> Callable[[str], float]:
    """Verdicts that are the last number in what the judge says, which must be within these bounds; 8/10 is 8 of 10."""
    if not least < most:
        raise ValueError(f"bounds {least} and {most} leave no numbers")
    of_most = re.compile(rf"\s?(?:/|out of)\s?{most:g}(?![\d.]*\d)", re.IGNORECASE)

    def read(text: str) -> float:
        found = final_number(of_most.sub("", without_reasoning(text).replace("*", "")))
        if found is None or not least <= found <= most:
            raise UnreadableVerdictError(f"there is no number from {least:g} to {most:g} at its end")
        return float(found)

    return read


def transcript(messages: Sequence[Message]) -> str:
    """A conversation as text for a judge's prompt."""
    return "\n\n".join(f"[{message.role}]\n{message.content}" for message in messages)


class Judge(Generic[V]):
    """Asks a model for verdicts; `await judge.ask(...)` is for use in async rewards and metrics.

    Example::

        class Grade(msgspec.Struct):
            reason: str
            is_correct: bool

        judge = Judge("http://127.0.0.1:8000/v1", "Qwen/Qwen3-8B", PROMPT, json_verdict(Grade))

        @reward
        async def correct(prompt, answer, reference):
            return (await judge.ask(question=prompt[-1].content, answer=answer, reference=reference)).is_correct

    prompt: a template with named fields in braces ({answer}; braces that are meant as such are doubled). verdict: reads
    what the judge says. api_key_variable: the environment variable with the key. requests_per_minute, max_concurrent: of
    this process. deadline_seconds: for one verdict, with all waiting and all tries. max_tries: how often a judge may
    say what is no verdict; broken connections and busy endpoints are tried again as the client of endpoints does.
    cache: an SQLite file that processes share; without one, verdicts are remembered in this process only.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        prompt: str,
        verdict: Callable[[str], V],
        *,
        system: str | None = None,
        api_key_variable: str | None = None,
        sampling: SamplingParameters = SamplingParameters(temperature=0.0, max_tokens=1024),
        max_concurrent: int = 32,
        requests_per_minute: float | None = None,
        deadline_seconds: float = DEADLINE_SECONDS,
        max_tries: int = 3,
        cache: Path | None = None,
    ) -> None:
        if min(max_concurrent, max_tries, deadline_seconds, requests_per_minute or 1) <= 0:
            raise ValueError("max_concurrent, max_tries, deadline_seconds and requests_per_minute must be positive")
        self._base_url = base_url
        self._model = model
        self._prompt = prompt
        self._fields = _fields_of(prompt)
        self._verdict = verdict
        self._system = system
        self._api_key = _api_key(api_key_variable)
        self._sampling = sampling
        self._max_concurrent = max_concurrent
        self._seconds_apart = 60 / requests_per_minute if requests_per_minute else 0.0
        self._deadline_seconds = deadline_seconds
        self._max_tries = max_tries
        self._cache = None if cache is None else _Cache(cache)
        self._remembered: OrderedDict[str, str] = OrderedDict()
        self._sessions: WeakKeyDictionary[asyncio.AbstractEventLoop, _Session] = WeakKeyDictionary()

    async def ask(self, **fields: str | float) -> V:
        """The verdict on these fields of the prompt. The same question at the same time is asked once.

        Raises a `RolloutFailure` of class judge when there is none in time, `ValueError` for other fields than those of
        the prompt.
        """
        messages = self._messages(fields)
        key = self._key(messages)
        said = self._remembered.get(key)
        if said is None:
            said = await self._shared(key, messages)
        else:
            self._remembered.move_to_end(key)
        return self._verdict(said)

    def _messages(self, fields: dict[str, str | float]) -> list[Message]:
        if fields.keys() != self._fields:
            raise ValueError(
                f"the judge's prompt has the fields {', '.join(sorted(self._fields))}, not {', '.join(sorted(fields))}"
            )
        system = [] if self._system is None else [Message("system", self._system)]
        return [*system, Message("user", self._prompt.format(**fields))]

    def _key(self, messages: list[Message]) -> str:
        content = msgspec.json.encode([self._model, messages, self._sampling], order="deterministic")
        return hashlib.blake2b(content, digest_size=16).hexdigest()

    async def _shared(self, key: str, messages: list[Message]) -> str:
        session = self._session()
        asking = session.asking.get(key)
        if asking is None:
            asking = session.asking[key] = asyncio.create_task(self._answer(session, key, messages))
            asking.add_done_callback(lambda done: session.finish(key, done))
        # It goes on when one of those who wait is cancelled, for the others; its deadline ends it.
        return await asyncio.shield(asking)

    def _session(self) -> "_Session":
        loop = asyncio.get_running_loop()
        session = self._sessions.get(loop)
        if session is None:
            session = self._sessions[loop] = _Session(
                _opened(self._base_url, self._model, self._api_key, self._deadline_seconds),
                asyncio.Semaphore(self._max_concurrent),
            )
        return session

    async def _answer(self, session: "_Session", key: str, messages: list[Message]) -> str:
        with failures_as(FailureClass.JUDGE, f"judge {self._model}"):
            async with deadline(self._deadline_seconds):
                said = None if self._cache is None else await self._cache.get(key)
                if said is None or self._complaint(said) is not None:
                    said = await self._asked(session, key, messages)
                    if self._cache is not None:
                        await self._cache.put(key, said)
        self._remembered[key] = said
        while len(self._remembered) > MAX_REMEMBERED:
            self._remembered.popitem(last=False)
        return said

    async def _asked(self, session: "_Session", key: str, messages: list[Message]) -> str:
        nodes = [Node(message, index - 1 if index else None) for index, message in enumerate(messages)]
        sampling = self._sampling
        for number in range(1, self._max_tries + 1):
            async with session.places:
                await session.wait_for_turn(self._seconds_apart)
                turn = await (await session.sampler()).sample(nodes, (), sampling)
            said = turn.message.content
            complaint = self._complaint(said)
            if complaint is None:
                return said
            # The same seed would make it say the same again.
            sampling = msgspec.structs.replace(self._sampling, seed=derive_seed(0, "judge", key, number))
        raise UnreadableVerdictError(f"no verdict in {self._max_tries} answers; the last: {said[-200:]!r}: {complaint}")

    def _complaint(self, said: str) -> str | None:
        try:
            self._verdict(said)
        except UnreadableVerdictError as error:
            return str(error)
        return None


@dataclass(slots=True, eq=False)
class _Session:
    """What belongs to one event loop: the connection, the limits, and what is being asked."""

    opened: "AsyncGenerator[ChatSampler, None]"
    places: asyncio.Semaphore
    asking: dict[str, asyncio.Task[str]] = field(default_factory=dict)
    _sampler: "ChatSampler | None" = None
    _next_at: float = 0.0

    async def sampler(self) -> "ChatSampler":
        if self._sampler is None:
            self._sampler = await anext(self.opened)
        return self._sampler

    async def wait_for_turn(self, seconds_apart: float) -> None:
        now = asyncio.get_running_loop().time()
        begins = max(now, self._next_at)
        self._next_at = begins + seconds_apart
        await asyncio.sleep(begins - now)

    def finish(self, key: str, asked: asyncio.Task[str]) -> None:
        del self.asking[key]
        if not asked.cancelled():
            asked.exception()  # seen, also where all who waited for it were cancelled


async def _opened(
    base_url: str, model: str, api_key: str | None, deadline_seconds: float
) -> "AsyncGenerator[ChatSampler, None]":
    """A sampler that is closed with its event loop, which ends the generators that are left: a judge lives in a module
    or an environment, where nobody would close it."""
    from hone.inference.client import ChatSampler  # of an extra; few environments have a judge

    async with ChatSampler(base_url, model, api_key, deadline_seconds=deadline_seconds) as sampler:
        yield sampler


class _Cache:
    """What judges said, in an SQLite file. Trouble with the file costs requests, and no verdict."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._is_broken = False

    async def get(self, key: str) -> str | None:
        rows = await self._execute("SELECT said FROM verdicts WHERE key = ?", (key,))
        return rows[0][0] if rows else None

    async def put(self, key: str, said: str) -> None:
        await self._execute("INSERT OR REPLACE INTO verdicts (key, said) VALUES (?, ?)", (key, said))

    async def _execute(self, statement: str, values: tuple[str, ...]) -> list[tuple[str]]:
        if self._is_broken:
            return []
        arguments = {"path": self._path, "statement": statement, "values": values}
        try:
            found: list[tuple[str]] = await call_blocking(_execute, arguments, 2 * CACHE_SECONDS)
        except (sqlite3.Error, OSError) as error:
            self._is_broken = not _is_passing(error)
            logger.warning("the cache of verdicts at %s is not used: %s", self._path, error)
            return []
        return found


def _is_passing(error: sqlite3.Error | OSError) -> bool:
    """Whether others only use the file at the moment."""
    code = getattr(error, "sqlite_errorcode", None)
    return isinstance(error, TimeoutError) or (
        code is not None and code & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
    )


def _execute(path: Path, statement: str, values: tuple[str, ...]) -> list[tuple[str]]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.closing(sqlite3.connect(path, timeout=CACHE_SECONDS, isolation_level=None)) as database:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("CREATE TABLE IF NOT EXISTS verdicts (key TEXT PRIMARY KEY, said TEXT NOT NULL)")
        return database.execute(statement, values).fetchall()


def _fields_of(prompt: str) -> set[str]:
    try:
        pieces = list(string.Formatter().parse(prompt))
    except ValueError as error:
        raise ValueError(f"the judge's prompt is no template: {error}; double braces that are no field") from error
    names = {name for _, name, _, _ in pieces if name is not None}
    odd = [
        name
        for _, name, spec, conversion in pieces
        if name is not None and (spec or conversion or not name.isidentifier())
    ]
    if odd:
        raise ValueError(f"the judge's prompt has the field {{{odd[0]}}}; use plain names, and double other braces")
    if not names:
        raise ValueError("the judge's prompt has no field, so every verdict would be the same; write {answer}")
    return names


def _api_key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable)
    if not key:
        raise ValueError(f"environment variable {variable}, which has the judge's key, is not set; set it")
    return key
