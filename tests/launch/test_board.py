"""What a person sees of an evaluation under way: a table on a terminal, few plain lines elsewhere."""

import asyncio
import io

import pytest
from rich.console import Console

from fakes import ScriptedSampler
from hone.envs import Rubric, SingleTurn, Task, reward, user
from hone.evals.evaluate import Cell, Plan, complete
from hone.evals.results import Prices
from hone.launch import board as board_module
from hone.launch.board import Board, Place, spoken, table_of


@reward
def correct(answer: str, reference: str) -> float:
    return float(answer == reference)


def cell(prices: Prices | None = None) -> Cell:
    tasks = [Task((user(f"say {n}"),), str(n)) for n in range(4)]
    environment = SingleTurn(name="say", rubric=Rubric([correct]), train=[], held_out=tasks)
    return Cell(Plan(environment, 4, prices=prices))


async def done(prices: Prices | None = None) -> Cell:
    found = cell(prices)
    await complete([found], ScriptedSampler([ConnectionError("gone"), "1", "2", "no"]), max_concurrent=1)
    return found


def printed(table: object) -> str:
    console = Console(width=160)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


async def test_the_table_has_progress_score_failures_and_cost() -> None:
    shown = printed(table_of({Place("a", "say"): await done(Prices(1, 1e6)), Place("b", "say"): cell()}))
    header, first, second = shown.splitlines()
    assert header.split() == [
        "model",
        "environment",
        "rollouts",
        "reward",
        "95%",
        "interval",
        "failed",
        "tokens/s",
        "cost",
    ]
    assert "4/4" in first
    assert "0.667" in first
    assert first.split()[-1] == "4.00"
    assert second.split()[-2:] == ["0/4", "0"]


async def test_a_model_without_prices_has_no_cost() -> None:
    assert "cost" not in printed(table_of({Place("a", "say"): await done()}))
    assert "1 failed" in spoken(await done())


async def test_without_a_terminal_a_line_tells_of_each_cell_that_is_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(board_module, "REFRESH_SECONDS", 0.001)
    text = io.StringIO()
    board = Board(Console(file=text, width=160))
    cells = {Place("a", "say"): cell(), Place("b", "say"): cell()}
    async with board.showing(cells):
        await complete([cells[Place("a", "say")]], ScriptedSampler(["1"]), max_concurrent=2)
        async with asyncio.timeout(10):
            while not text.getvalue():
                await asyncio.sleep(0.001)
    assert text.getvalue() == "a on say: reward 0.250 (0.046 – 0.699) · 4 of 4 rollouts · 0 failed\n"


async def test_on_a_terminal_the_table_is_live(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(board_module, "REFRESH_SECONDS", 0.001)
    text = io.StringIO()
    board = Board(Console(file=text, width=160, force_terminal=True))
    found = cell()
    async with board.showing({Place("a", "say"): found}):
        await complete([found], ScriptedSampler(["1"]), max_concurrent=2)
        async with asyncio.timeout(10):
            while "4/4" not in text.getvalue():
                await asyncio.sleep(0.001)
