"""The stages of a run: prepare, SFT, RL, evaluations, report. Each does nothing when its result is there already."""

import itertools
import json
import sys
from pathlib import Path

from hone.config.recipe import Recipe
from hone.envs.remote import environment_of
from hone.launch.console import RL_SHOWN, SFT_SHOWN, Bar, StageConsole
from hone.launch.evaluations import Results, evaluate_weights
from hone.launch.plan import ProcessPlan, plan_rl, plan_sft
from hone.launch.supervise import Supervisor
from hone.synth.gold import write_gold_conversations
from hone.transport.addresses import allocate, save_addresses
from hone.transport.folders import RunFolder


class Stages:
    """One run, stage by stage, in its folder, shown on one console."""

    def __init__(self, recipe: Recipe, folder: Path, console: StageConsole) -> None:
        self._recipe = recipe
        self._folder = RunFolder(folder)
        self._console = console
        self._supervisor = Supervisor(folder, recipe.run.max_restarts, console.show)

    async def run(self) -> dict[str, Results]:
        """All stages in turn; returns what the evaluations found, by label (base, sft, rl) and environment."""
        await self.prepare()
        results = {"base": await self._evaluate("base", self._folder.model)}
        if self._recipe.sft is not None:
            await self.sft()
            results["sft"] = await self._evaluate("sft", self._folder.sft_export)
        if self._recipe.rl is not None:
            await self.rl()
            results["rl"] = await self._evaluate("rl", self._folder.export)
        return results

    async def prepare(self) -> None:
        """The base model with its tokenizer."""
        if (self._folder.model / "config.json").exists():
            return
        command = (sys.executable, "-m", "hone.launch.prepare", str(self._folder.path))
        await self._supervisor.run([ProcessPlan("prepare", command, ends_stage=True)])

    async def sft(self) -> None:
        """From the base model to sft/export."""
        section = self._recipe.sft
        if section is None:
            raise ValueError("the recipe has no [sft] section; add one to fine-tune")
        if self._folder.sft_export.exists():
            return
        await self.prepare()
        if section.data == "environments" and not self._folder.sft_conversations.exists():
            assert section.num_conversations is not None  # the recipe's own rule
            self._write_conversations(section.num_conversations)
        bar = Bar("SFT", section.max_steps, "sft/loss", SFT_SHOWN, total_of="sft/num_steps")
        async with self._console.following(self._folder.metrics, bar):
            await self._supervisor.run(plan_sft(self._recipe, self._folder.path))

    async def rl(self) -> None:
        """From the SFT result (or the base model) to export."""
        if self._recipe.rl is None:
            raise ValueError("the recipe has no [rl] section; add one to train by reinforcement learning")
        if self._folder.export.exists():
            if self._recipe.rl.num_steps <= finished_steps(self._folder):
                return
            set_result_aside(self._folder)
        await self.prepare()
        save_addresses(allocate(self._recipe), self._folder.addresses)
        bar = Bar("RL", self._recipe.rl.num_steps, "train/loss", RL_SHOWN)
        async with self._console.following(self._folder.metrics, bar):
            await self._supervisor.run(plan_rl(self._recipe, self._folder.path))
        note_finished_steps(self._folder, self._recipe.rl.num_steps)

    def _write_conversations(self, count: int) -> None:
        sections = self._recipe.environments
        environments = {section.name: environment_of(section) for section in sections}
        weights = {section.name: section.weight for section in sections}
        write_gold_conversations(environments, weights, count, self._recipe.run.seed, self._folder.sft_conversations)

    async def _evaluate(self, label: str, weights: Path) -> Results:
        return await evaluate_weights(self._recipe, self._folder, weights, label, self._console)


def finished_steps(folder: RunFolder) -> int:
    """The rl.num_steps that the run's export is the result of: more than were trained where a goal ended it early."""
    mark = _mark(folder)
    return int(json.loads(mark.read_text())["num_steps"]) if mark.exists() else max(folder.saved_steps(), default=0)


def note_finished_steps(folder: RunFolder, num_steps: int) -> None:
    """Remember what was asked of a stage that is over."""
    _mark(folder).write_text(json.dumps({"num_steps": num_steps}))


def set_result_aside(folder: RunFolder) -> None:
    """Keep the result of fewer steps, with its evaluation, under names of their own."""
    step = max(folder.saved_steps(), default=0)
    for result in (folder.evals / "rl", folder.export):
        if result.exists():
            result.rename(_free(result.with_name(f"{result.name}-step_{step:06d}")))
    _mark(folder).unlink(missing_ok=True)


def _free(path: Path) -> Path:
    others = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
    return next(candidate for candidate in itertools.chain([path], others) if not candidate.exists())


def _mark(folder: RunFolder) -> Path:
    return folder.path / "rl_done.json"
