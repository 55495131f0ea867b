"""Arguments that several commands share."""

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
