"""The stages of a run: prepare, SFT, RL, evaluations, report. Each does nothing when its result is there already."""

import sys
from pathlib import Path

from hone.config.recipe import Recipe
from hone.envs.registry import load_environment
from hone.launch.console import RL_SHOWN, SFT_SHOWN, Bar, StageConsole
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

    async def run(self) -> None:
        """All stages in turn, then the table and the report."""
        await self.evaluate("base", self._folder.model)
        if self._recipe.sft is not None:
            await self.sft()
            await self.evaluate("sft", self._folder.sft_export)
        if self._recipe.rl is not None:
            await self.rl()
            await self.evaluate("rl", self._folder.export)
        self.report()

    async def prepare(self) -> None:
        """The base model with its tokenizer."""
        if (self._folder.model / "config.json").exists():
            return
        self._console.say("preparing the base model")
        command = (sys.executable, "-m", "hone.launch.prepare", str(self._folder.path))
        await self._supervisor.run([ProcessPlan("prepare", command, ends_stage=True)])

    async def sft(self) -> None:
        """From the base model to sft/export."""
        if self._folder.sft_export.exists():
            return
        await self.prepare()
        section = self._recipe.sft
        if section is None:
            raise ValueError("the recipe has no [sft] section; add one to fine-tune")
        if section.data == "environments" and not self._folder.sft_conversations.exists():
            assert section.num_conversations is not None  # the recipe's own rule
            write_gold_conversations(
                {s.name: load_environment(s.name, **s.arguments) for s in self._recipe.environments},
                {s.name: s.weight for s in self._recipe.environments},
                section.num_conversations,
                self._recipe.run.seed,
                self._folder.sft_conversations,
            )
        bar = Bar("SFT", section.max_steps, "sft/loss", SFT_SHOWN, total_of="sft/num_steps")
        async with self._console.following(self._folder.metrics, bar):
            await self._supervisor.run(plan_sft(self._recipe, self._folder.path))

    async def rl(self) -> None:
        """From the SFT result (or the base model) to export."""
        if self._folder.export.exists():
            return
        await self.prepare()
        if self._recipe.rl is None:
            raise ValueError("the recipe has no [rl] section; add one to train by reinforcement learning")
        save_addresses(allocate(self._recipe), self._folder.addresses)
        bar = Bar("RL", self._recipe.rl.num_steps, "train/loss", RL_SHOWN)
        async with self._console.following(self._folder.metrics, bar):
            await self._supervisor.run(plan_rl(self._recipe, self._folder.path))
