"""`hone chat`: talk with a model in the terminal, streaming."""

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

import aiohttp
from rich.console import Console

from hone.schema.messages import Message

CONNECT_SECONDS = 10.0
STALL_SECONDS = 120.0
"""A server that sends nothing for so long is taken for dead."""

HELP = "/reset forgets the conversation · /system TEXT sets the system message · /exit (or Ctrl-D) leaves · Ctrl-C stops an answer"


class ChatError(ValueError):
    """The server refused or broke off; the message is what it said."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An OpenAI-compatible server: base address (ending in /v1), model name, key."""

    base_url: str
    model: str | None = None
    api_key: str | None = None

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}


@dataclass(frozen=True, slots=True)
class Settings:
    """How answers are sampled."""

    temperature: float = 1.0
    max_tokens: int | None = None


@dataclass(slots=True)
class Conversation:
    """The messages so far."""

    system: str | None = None
    messages: list[Message] = field(default_factory=list)

    def as_json(self) -> list[dict[str, str]]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return system + [{"role": message.role, "content": message.content} for message in self.messages]


async def chat(endpoint: Endpoint, settings: Settings, system: str | None, prompt: str | None) -> None:
    """Converse until the person leaves; with `prompt`, print one answer and end."""
    timeout = aiohttp.ClientTimeout(total=None, connect=CONNECT_SECONDS, sock_read=STALL_SECONDS)
    async with aiohttp.ClientSession(timeout=timeout, headers=endpoint.headers) as session:
        if endpoint.model is None:
            endpoint = Endpoint(endpoint.base_url, await first_model(session, endpoint.base_url), endpoint.api_key)
        conversation = Conversation(system)
        if prompt is not None:
            await answer(session, endpoint, settings, conversation, prompt)
        else:
            await _converse(session, endpoint, settings, conversation)


async def first_model(session: aiohttp.ClientSession, base_url: str) -> str:
    """The name of the model that the server serves."""
    try:
        async with session.get(f"{base_url}/models") as response:
            return str((await response.json())["data"][0]["id"])
    except (aiohttp.ClientError, TimeoutError, LookupError, ValueError) as error:
        raise ChatError(f"{base_url} does not answer as an OpenAI-compatible server: {error!r}") from error


async def _converse(
    session: aiohttp.ClientSession, endpoint: Endpoint, settings: Settings, conversation: Conversation
) -> None:
    console = Console(highlight=False)
    console.print(f"[bold]{endpoint.model}[/bold] at {endpoint.base_url}\n[dim]{HELP}[/dim]")
    while True:
        try:
            line = (await asyncio.to_thread(input, "\n> ")).strip()
        except EOFError:
            return
        if line == "/exit":
            return
        if line == "/reset":
            conversation.messages.clear()
            console.print("[dim]forgotten[/dim]")
        elif line.startswith("/system"):
            conversation.system = line.removeprefix("/system").strip() or None
            console.print("[dim]system message set[/dim]" if conversation.system else "[dim]no system message[/dim]")
        elif line.startswith("/"):
            console.print(f"[dim]{HELP}[/dim]")
        elif line:
            try:
                await answer(session, endpoint, settings, conversation, line)
            except ChatError as error:
                console.print(f"[red]{error}[/red]")


async def answer(
    session: aiohttp.ClientSession, endpoint: Endpoint, settings: Settings, conversation: Conversation, prompt: str
) -> None:
    """Stream one answer to the terminal and add both messages to the conversation."""
    conversation.messages.append(Message("user", prompt))
    parts: list[str] = []
    try:
        async with contextlib.aclosing(_deltas(session, endpoint, settings, conversation)) as deltas:
            async for kind, text in deltas:
                if kind == "content":
                    parts.append(text)
                sys.stdout.write(f"\x1b[2m{text}\x1b[0m" if kind == "reasoning" and sys.stdout.isatty() else text)
                sys.stdout.flush()
    except ChatError:
        conversation.messages.pop()
        raise
    except asyncio.CancelledError:  # Ctrl-C: what has arrived stays in the conversation
        sys.stdout.write(" (stopped)")
    sys.stdout.write("\n")
    conversation.messages.append(Message("assistant", "".join(parts)))


async def _deltas(
    session: aiohttp.ClientSession, endpoint: Endpoint, settings: Settings, conversation: Conversation
) -> AsyncGenerator[tuple[str, str], None]:
    body: dict[str, object] = {
        "model": endpoint.model,
        "messages": conversation.as_json(),
        "temperature": settings.temperature,
        "stream": True,
    }
    if settings.max_tokens is not None:
        body["max_tokens"] = settings.max_tokens
    try:
        async with session.post(f"{endpoint.base_url}/chat/completions", json=body) as response:
            if response.status != 200:
                raise ChatError(_complaint(await response.text(), response.status))
            async for line in response.content:
                data = line.decode().removeprefix("data:").strip()
                if data and data != "[DONE]":
                    for found in _texts(json.loads(data)):
                        yield found
    except (aiohttp.ClientError, TimeoutError, json.JSONDecodeError) as error:
        raise ChatError(f"{endpoint.base_url} broke off: {error!r}") from error


def _texts(chunk: dict[str, object]) -> list[tuple[str, str]]:
    if "error" in chunk:
        raise ChatError(_complaint(json.dumps(chunk), 200))
    choices = chunk.get("choices")
    delta = choices[0].get("delta", {}) if isinstance(choices, list) and choices else {}
    named = (("reasoning", delta.get("reasoning_content")), ("content", delta.get("content")))
    return [(kind, text) for kind, text in named if text]


def _complaint(body: str, status: int) -> str:
    try:
        return f"the server refused ({status}): {json.loads(body)['error']['message']}"
    except (ValueError, LookupError, TypeError):
        return f"the server refused ({status}): {body[:300]}"
