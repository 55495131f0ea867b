"""`hone env`: write an environment, prove it, look at one rollout of it, judge saved traces again."""

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hone.cli.arguments import json_object

if TYPE_CHECKING:
    from collections.abc import Callable

    from hone.envs.checks import Check
    from hone.envs.environment import Environment

app = typer.Typer(
    help="Write an environment, prove it without a model, look at one rollout, judge saved traces again.",
    no_args_is_help=True,
)

Target = Annotated[str, typer.Argument(help="Name of an installed environment, or the folder of its package.")]
Arguments = Annotated[str, typer.Option(help="Arguments of load_environment as a JSON object.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]

FAILED = 1
STALL_SECONDS, STALL_DEADLINE_SECONDS = 5.0, 120.0
"""A rubric that keeps the event loop so long is named, and ends the validation."""


@app.command()
def init(
    name: Annotated[str, typer.Argument(help="Name as in recipes: lower case letters, digits, _.")],
    kind: Annotated[str, typer.Option(help="single, multi, tool, sandbox or harness.")] = "single",
    folder: Annotated[Path | None, typer.Option(help="Folder of the package; default: the name.")] = None,
) -> None:
    """Write a package with one environment in it: tasks, rewards, a card, tests that pass."""
    from hone.envs.scaffold import scaffold

    made = scaffold(name, kind, folder or Path(name))
    for path in made.files:
        typer.echo(path)
    typer.echo(f"\nnext: pip install -e {made.folder} && hone env validate {made.folder}")


@app.command("list")
def list_environments(as_json: AsJson = False) -> None:
    """The installed environments: version, number of tasks, kind, what they say of themselves."""
    from hone.cli.listing import describe_installed, listing_table, print_json, print_table

    found = describe_installed()
    if as_json:
        print_json(found)
    else:
        print_table(listing_table(found))


@app.command()
def validate(
    environment: Target,
    arguments: Arguments = "{}",
    num_tasks: Annotated[int, typer.Option(min=1, help="Tasks of each split that are played.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Prove without a model that gold answers score full marks and that wrong, empty and adversarial ones do not.

    Also: tasks are the same whenever and wherever they are asked for, splits are disjoint, prompts render, no answer
    makes a rollout fail, rollouts leave nothing behind. Ends with 1 when something does not hold.
    """
    from hone.cli.listing import checks_table, print_json, print_table, status
    from hone.envs.fingerprint import load_target

    loaded = load_target(environment, settings := json_object(arguments, "--arguments"))
    with status(f"validating {loaded.name}") as tell:
        checks = asyncio.run(_checks(loaded, num_tasks, tell))
    checks.append(_elsewhere(loaded, environment, settings, num_tasks))
    has_passed = all(check.has_passed for check in checks)
    if as_json:
        print_json(
            {
                "environment": loaded.name,
                "version": loaded.version,
                "has_passed": has_passed,
                "checks": [
                    {name: getattr(check, name) for name in ("name", "num_tried", "problems", "not_tried")}
                    for check in checks
                ],
            }
        )
    else:
        print_table(checks_table(loaded, checks))
        typer.echo(_verdict(checks))
    if not has_passed:
        raise typer.Exit(FAILED)


@app.command()
def replay(
    traces: Annotated[Path, typer.Argument(help="A run's folder or its traces/, an evaluation's folder, or a file.")],
    environment: Annotated[
        str | None, typer.Option(help="Judge by this environment (name or folder); default: the one of each trace.")
    ] = None,
    arguments: Annotated[
        str | None, typer.Option(help="Arguments of load_environment as a JSON object; default: those of the run.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Write the traces with their new rewards here, one a line.")
    ] = None,
    rows: Annotated[int, typer.Option(min=0, help="Traces to show, the most changed first.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Judge saved traces by the environment's present rubric: old against new rewards. Changes no file but --output."""
    from hone.cli.listing import print_json, print_table
    from hone.cli.replay import replay_all, replay_table, summary_of

    settings = None if arguments is None else json_object(arguments, "--arguments")
    replayed = asyncio.run(replay_all(traces, environment, settings, output))
    summary = summary_of(replayed)
    if as_json:
        print_json(summary.as_json(replayed))
    else:
        print_table(replay_table(replayed, rows))
        typer.echo(summary.line)


@app.command()
def debug(
    environment: Target,
    target: Annotated[
        str | None, typer.Argument(help="Who answers: a recipe (its newest policy), a model folder or an http address.")
    ] = None,
    index: Annotated[int, typer.Option(min=0, help="Which task.")] = 0,
    held_out: Annotated[
        bool, typer.Option("--held-out", help="Of the held-out tasks; default: of the train tasks.")
    ] = False,
    gold: Annotated[bool, typer.Option("--gold", help="Play the gold answer; no model is needed.")] = False,
    base_url: Annotated[str | None, typer.Option(help="The same as an http address as the target.")] = None,
    model: Annotated[str | None, typer.Option(help="Model name at an http address.")] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="OPENAI_API_KEY", show_envvar=True, help="API key of an http address.")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")] = 1.0,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer of one turn.")] = None,
    max_turns: Annotated[int | None, typer.Option(min=1, help="Truncate after so many turns.")] = None,
    deadline: Annotated[float, typer.Option(help="Seconds for the whole rollout.")] = 600.0,
    seed: Annotated[int, typer.Option(min=0, help="Of sampling.")] = 0,
    arguments: Arguments = "{}",
) -> None:
    """One rollout, message by message, as it happens: tokens, tool calls, rewards, failures with their traceback."""
    from hone.cli.debug import Debugged, debug_rollout
    from hone.envs.fingerprint import load_target

    who = target or base_url
    if gold == (who is not None):
        raise ValueError(
            "say who answers: --gold, or a recipe, a model folder or an http address (--base-url), not both"
        )
    settings = Debugged(index, held_out, seed, temperature, max_tokens, max_turns, deadline)
    loaded = load_target(environment, json_object(arguments, "--arguments"))
    trace = asyncio.run(debug_rollout(loaded, settings, who, model, api_key))
    if trace.failure is not None:
        raise typer.Exit(FAILED)


async def _checks(environment: "Environment", num_tasks: int, tell: "Callable[[str], None]") -> "list[Check]":
    from hone.envs.checks import validate as prove
    from hone.envs.stalls import StallMeter

    # Code that never comes back (a pattern that explodes on a huge answer) ends the process with its place.
    with StallMeter(report_seconds=STALL_SECONDS, deadline_seconds=STALL_DEADLINE_SECONDS):
        return await prove(environment, num_tasks=num_tasks, progress=tell)


def _elsewhere(environment: "Environment", target: str, arguments: dict[str, Any], num_tasks: int) -> "Check":
    from hone.envs.checks import Check, compare_fingerprints
    from hone.envs.fingerprint import fingerprint, fingerprint_elsewhere

    name = "a second process gives the same tasks"
    try:
        there = fingerprint_elsewhere(target, arguments, num_tasks)
    except ValueError as error:
        return Check(name, 1, [str(error)])
    return compare_fingerprints(name, fingerprint(environment, num_tasks), there)


def _verdict(checks: "list[Check]") -> str:
    failed = [check for check in checks if not check.has_passed]
    untried = sum(1 for check in checks if check.not_tried)
    rest = f"; {untried} could not be tried" if untried else ""
    if failed:
        return f"{len(failed)} of {len(checks)} checks failed{rest}"
    return f"{len(checks) - untried} checks passed{rest}"
