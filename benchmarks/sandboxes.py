"""Cells beside the floor of the machine, F: a fork, exec of /bin/true and wait by a small C program, measured in turn.

Creation, programs, Python, bursts, thousands of idle cells and turnover through the Python API in this process; a program
through a node and a gateway over TCP; then bubblewrap, crun, runc and runsc by the same rules, where they are installed.
Ratios are of medians, with F taken in the same rounds.
"""

import argparse
import asyncio
import json
import tempfile
from pathlib import Path

import harness
from sandbox_measures.addresses import addresses
from sandbox_measures.cells import acquisitions, creations, programs
from sandbox_measures.crowds import burst, crowd, storm, sustained, warm_crowd
from sandbox_measures.peers import peers
from sandbox_measures.pythons import pythons
from sandbox_measures.rounds import Floor
from sandbox_measures.states import states

AT_MOST = {
    "create_f": 1.8,
    "create_net_f": 3.0,
    "warm_acquire_ms": 0.3,
    "exec_f": 1.25,
    "exec_gateway_f": 2.0,
    "session_ms": 0.2,
    "snippet_ratio": 0.35,
    "first_output_ratio": 0.6,
    "burst_512_seconds": 1.5,
    "exec_2000_f": 2.0,
    "idle_kb": 400,
    "idle_python_kb": 1200,
}
AT_LEAST = {"cells_2000": 2000, "sustained_per_core": 200, "storm_share": 0.8}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few rounds and small crowds: does it run?")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--python-rounds", type=int, default=200)
    parser.add_argument("--burst", type=int, default=512)
    parser.add_argument("--crowd", type=int, default=2000)
    parser.add_argument("--warm-crowd", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=5.0, help="of sustained turnover")
    parser.add_argument("--peer-rounds", type=int, default=50)
    parser.add_argument("--peer-burst", type=int, default=64)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.python_rounds, arguments.peer_rounds = 5, 5, 3
        arguments.burst, arguments.crowd, arguments.warm_crowd, arguments.peer_burst = 16, 32, 8, 4
        arguments.seconds = 0.5
    with tempfile.TemporaryDirectory() as folder:
        figures, spreads, others = asyncio.run(measure(arguments, Path(folder)))
    show(figures, spreads, others)
    result = {
        "claim": "cells are created, run programs and Python, and come and go in thousands at about the floor's cost",
        "ratio": AT_MOST["exec_f"] / figures["exec_f"],
        **figures,
        "spreads": spreads,
        "peers": others,
        "at_most": AT_MOST,
        "at_least": AT_LEAST,
    }
    if arguments.quick:
        print(json.dumps(result))  # not worth keeping
    else:
        harness.finish("sandboxes", result, "msgspec")


async def measure(
    arguments: argparse.Namespace, folder: Path
) -> tuple[dict[str, float], dict[str, tuple[float, float]], dict[str, dict[str, float | str]]]:
    """Figures, quartiles of those that are ratios to F or to a cold Python, and the figures of the peers."""
    floor = Floor(folder)
    try:
        # First, because what the kernel keeps of many cells for the next ones would make these look lighter.
        warm = await warm_crowd(arguments.warm_crowd)
        made = await creations(floor, arguments.rounds)
        ran = await programs(floor, arguments.rounds)
        python = await pythons(floor, arguments.python_rounds)
        away = await addresses(floor, folder, arguments.rounds)
        acquired = await acquisitions(floor, arguments.rounds)
        state = await states(floor, arguments.peer_rounds)
        figures = {
            "f_ms": made.milliseconds("f"),
            "create_f": made.ratio("create"),
            "create_net_f": made.ratio("create_net"),
            "destroy_f": made.ratio("destroy"),
            "warm_acquire_ms": acquired.milliseconds("acquire"),
            "exec_f": ran.ratio("exec"),
            **{f"{name}_f": away.ratio(name) for name in away.seconds if name != "f"},
            **{f"{name}_ms": ran.milliseconds(name) for name in ("pause", "resume") if name in ran.seconds},
            **{f"{name}_ms": state.milliseconds(name) for name in state.seconds if name != "f"},
            "session_ms": python.milliseconds("session"),
            "session_first_ms": python.milliseconds("session_first"),
            "snippet_ratio": python.ratio("snippet", "cold"),
            "first_output_ratio": python.ratio("first_output", "cold"),
            "python_cold_ms": python.milliseconds("cold"),
            **warm,
            **await burst(arguments.burst),
            **await crowd(floor, arguments.crowd, arguments.rounds),
            **await sustained(arguments.seconds),
            **await storm(arguments.burst * 2),
        }
        spreads = {
            "create_f": made.spread("create"),
            "create_net_f": made.spread("create_net"),
            "exec_f": ran.spread("exec"),
            **{f"{name}_f": away.spread(name) for name in away.seconds if name != "f"},
            "snippet_ratio": python.spread("snippet", "cold"),
            "first_output_ratio": python.spread("first_output", "cold"),
        }
        return figures, spreads, await peers(floor, folder, arguments.peer_rounds, arguments.peer_burst)
    finally:
        floor.close()


def show(
    figures: dict[str, float], spreads: dict[str, tuple[float, float]], others: dict[str, dict[str, float | str]]
) -> None:
    """The tables for people: what is promised first, then everything else, then the peers."""
    rows = []
    for name in [*AT_MOST, *AT_LEAST, *(name for name in figures if name not in AT_MOST | AT_LEAST)]:
        quartiles = " to ".join(f"{value:.3g}" for value in spreads.get(name, ()))
        bar, kept = promise(name, figures.get(name))
        rows.append((name, figures.get(name, "not measured"), quartiles, bar, kept))
    harness.show_table("cells", ["figure", "measured", "quartiles", "bar", "kept"], rows)
    columns = ("run_f", "exec_f", "burst_per_second")
    rows = [
        (name, *(value.get(column, value.get("reason", "-")) for column in columns)) for name, value in others.items()
    ]
    harness.show_table("from nothing to the end of `true`, beside others", ["what", *columns], rows)


def promise(name: str, value: float | None) -> tuple[str, str]:
    """The bar of a figure, and whether it is kept."""
    if name in AT_MOST:
        return f"<= {AT_MOST[name]:g}", "-" if value is None else "yes" if value <= AT_MOST[name] else "NO"
    if name in AT_LEAST:
        return f">= {AT_LEAST[name]:g}", "-" if value is None else "yes" if value >= AT_LEAST[name] else "NO"
    return "", ""


if __name__ == "__main__":
    main()
