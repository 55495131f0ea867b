"""Arguments that several commands share."""

import json
from typing import Any

import typer

# Whatever is not an option of the command is an override of the recipe: --rl.num_steps=10.
EXTRA = {"allow_extra_args": True, "ignore_unknown_options": True}


def overrides(context: typer.Context) -> list[str]:
    """The --a.b=c arguments of a command; also accepts `--a.b c`."""
    words = list(context.args)
    joined: list[str] = []
    while words:
        word = words.pop(0)
        if word.startswith("--") and "=" not in word and words and not words[0].startswith("--"):
            word = f"{word}={words.pop(0)}"
        joined.append(word)
    return joined


def json_object(text: str, option: str) -> dict[str, Any]:
    """The value of an option that is a JSON object."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{option} {text!r} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f'{option} {text!r} is not a JSON object such as {{"limit": 5}}')
    return value
