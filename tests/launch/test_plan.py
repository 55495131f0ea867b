from pathlib import Path

from hone.config.load import recipe_from
from hone.config.recipe import Recipe
from hone.launch.plan import plan_rl, plan_sft

TREE = {
    "model": {"config": {"model_type": "llama"}},
    "tokenizer": {"vocab_size": 64, "chat_template": "chatml"},
    "environments": [{"name": "reverse_text"}],
    "rl": {},
}


def recipe(**sections: dict[str, object]) -> Recipe:
    return recipe_from(TREE | sections, "test")


def test_rl_needs_an_engine_an_orchestrator_workers_and_a_trainer() -> None:
    plans = plan_rl(recipe(workers={"num_workers": 2}), Path("r"))
    assert [plan.name for plan in plans] == ["inference", "orchestrator", "worker-0", "worker-1", "trainer"]


def test_rl_is_over_when_orchestrator_and_trainer_are_done() -> None:
    assert {plan.name for plan in plan_rl(recipe(), Path("r")) if plan.ends_stage} == {"orchestrator", "trainer"}


def test_several_ranks_start_under_torchrun() -> None:
    (trainer,) = plan_sft(recipe(trainer={"num_ranks": 2}), Path("r"))
    assert "torch.distributed.run" in trainer.command
    assert "--nproc-per-node=2" in trainer.command


def test_threads_of_the_recipe_reach_the_process() -> None:
    (trainer,) = plan_sft(recipe(trainer={"threads": 3}), Path("r"))
    assert trainer.environment["OMP_NUM_THREADS"] == "3"
