"""Recipes: what is right loads and survives a round trip, what is wrong is refused in words a person can act on."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hone.config.load import ConfigError, load_recipe, recipe_from, save_recipe
from hone.config.recipe import Recipe, nearest_divisors

ROOT = Path(__file__).parents[2]
RECIPES = sorted(ROOT.glob("recipes/**/*.toml"))
SMALL = """
[model]
path = "models/small"
[[environments]]
name = "first"
[[environments]]
name = "second"
arguments = { letters = 4 }
[sft]
num_conversations = 10
[rl]
batch_size = 32
"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    return path


def complaint(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, overrides)
    return str(caught.value)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_recipe_loads_and_survives_a_round_trip(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    save_recipe(recipe, tmp_path / "run" / "config.toml")
    assert load_recipe(tmp_path / "run" / "config.toml") == recipe


def test_there_are_recipes() -> None:
    assert RECIPES


def test_defaults_are_filled_in(small: Path) -> None:
    recipe = load_recipe(small)
    assert recipe.rl is not None
    assert recipe.rl.groups_per_batch == 4
    assert recipe.folder == Path("runs/run")
    assert recipe.evaluation.every is None


def test_a_section_given_in_part_keeps_the_rest_of_its_parents_default(small: Path) -> None:
    whole = load_recipe(small).rl
    part = load_recipe(small, ["--rl.optimizer.warmup_steps=3"]).rl
    own = load_recipe(small, ["--rl.optimizer.lr=1e-3"]).rl
    assert whole is not None
    assert part is not None
    assert own is not None
    assert part.optimizer.lr == whole.optimizer.lr == 1e-6
    assert own.optimizer.lr == 1e-3


def test_overrides_are_toml_values_and_bare_words_are_text(small: Path) -> None:
    recipe = load_recipe(
        small,
        [
            "--run.name=hello",
            "--run.seed=7",
            "--rl.loss.kind=gspo",
            "--trainer.activation-checkpointing=true",
            "--sft.optimizer.betas=[0.8, 0.9]",
            "--run.folder=/tmp/a b",
        ],
    )
    assert recipe.folder == Path("/tmp/a b/hello")
    assert recipe.run.seed == 7
    assert recipe.trainer.activation_checkpointing
    assert recipe.sft is not None
    assert recipe.sft.optimizer.betas == (0.8, 0.9)
    assert recipe.rl is not None
    assert recipe.rl.loss.kind == "gspo"


def test_overrides_reach_into_lists_and_tables(small: Path) -> None:
    recipe = load_recipe(
        small, ["--environments.1.weight=2.5", "--environments.1.arguments.letters=5", "--environments.0.name=third"]
    )
    assert [(e.name, e.weight, e.arguments) for e in recipe.environments] == [
        ("third", 1.0, {}),
        ("second", 2.5, {"letters": 5}),
    ]


def test_a_later_override_wins(small: Path) -> None:
    assert load_recipe(small, ["--run.seed=1", "--run.seed=2"]).run.seed == 2


@pytest.mark.parametrize(
    ("override", "phrase"),
    [
        ("--rl.batchsize=64", "unknown field rl.batchsize; did you mean batch_size?"),
        ("--rl.loss.zzz=1", "unknown field rl.loss.zzz; known here: kind, low, high"),
        ("--environments.0.nam=x", "unknown field environments.0.nam; did you mean name?"),
        ("--colour=red", "unknown field colour"),
        ("--rl.batch_size=-8", "rl.batch_size = -8: input should be greater than 0"),
        ("--rl.num_steps=many", "rl.num_steps = 'many': input should be a valid integer"),
        ("--rl.loss.kind=magic", "rl.loss.kind = 'magic': input should be 'icepop'"),
        ("--rl.optimizer.lr=nan", "rl.optimizer.lr = nan: input should be a finite number"),
        ("--rl.optimizer.lr=inf", "rl.optimizer.lr = inf: input should be a finite number"),
        ("--sft.optimizer.betas=[0.9, 1.0]", "sft.optimizer.betas.1 = 1.0: input should be less than 1"),
        ("--server.port=70000", "server.port = 70000: input should be less than or equal to 65535"),
        ("--rl.group_size=6", "rl.group_size 6 does not divide rl.batch_size 32; use 4 or 8"),
        ("--rl.group_size=1", "rl.group_size = 1: input should be greater than or equal to 2"),
        ("--rl.sampling.temperature=0", "rl.sampling.temperature is 0"),
        ("--rl.sampling.top_p=0.9", "rl.sampling.top_p cuts the distribution"),
        ("--rl.sampling.top_k=5", "rl.sampling.top_k cuts the distribution"),
        ("--rl.sampling.min_p=0.1", "rl.sampling.min_p cuts the distribution"),
        ("--rl.max_concurrent=4", "rl.max_concurrent 4 is less than one group of 8"),
        ("--rl.optimizer.momentum=0.9", "optimizer.momentum has no effect with kind = 'adamw'"),
        ("--rl.optimizer.min_lr_ratio=0.1", "optimizer.min_lr_ratio has no effect with a constant schedule"),
        ("--rl.stop_at_reward=0.9", "rl.stop_at_reward needs evaluation.every"),
        ("--rl.optimizer={kind='muon', momentum=1.0}", "rl.optimizer.momentum = 1.0: input should be less than 1"),
        ("--rl.optimizer.warmup_steps=100", "rl.optimizer.warmup_steps 100 leaves none of rl.num_steps 100"),
        ("--rl.loss={kind='gspo', reducer='token_mean'}", "rl.loss.reducer = 'token_mean' does not fit kind = 'gspo'"),
        ("--rl.loss={kind='ppo_clip', low=1.5}", "rl.loss.low 1.5 is above 1"),
        ("--engine={num_blocks=8, cache_bytes=4096}", "engine.cache_bytes has no effect with engine.num_blocks"),
        ("--run.metrics_port=65535", "run.metrics_port = 65535: input should be less than or equal to 65534"),
        ("--model.config={model_type='qwen3'}", "give either model.path (a trained model) or model.config"),
        ("--environments.1.name=first", "environment 'first' is listed twice"),
        ("--environments=[]", "no [[environments]] given"),
        ("--tokenizer={path='t', vocab_size=9}", "tokenizer.vocab_size trains a tokenizer, tokenizer.path loads one"),
        ("--server.admin_host=0.0.0.0", "server.admin_host has no effect without server.admin_port"),
        ("--environments.0.solved_reward=0.5", "environments.solved_reward has no effect without environments.pools"),
        ("--environments.0.pools={hard_to=0.8}", "pools.hard_to 0.8 is not below pools.easy_from 0.75"),
        ("--environments.0.pools={easy_share=0.5, hard_share=0.5}", "leave no turn for normal tasks"),
        ("--environments.0.pools={retire_after=0}", "input should be greater than 0"),
        ("--environments.0.curriculum={start_share=1.0}", "input should be less than 1"),
        ("--environments.2.name=x", "'2' is not an index below 2"),
        ("--environments.x.name=x", "'x' is not an index below 2"),
        ("--run.seed.deeper=1", "run.seed = {'deeper': 1}: input should be a valid integer"),
        ("--model.path.deeper=1", "path is a value, not a section"),
        ("--rl=3", "rl = 3: input should be a valid dictionary"),
        ("rl.num_steps=3", "is not of the form --section.field=value"),
        ("--rl.num_steps", "is not of the form --section.field=value"),
        ("--=3", "is not of the form --section.field=value"),
    ],
)
def test_what_cannot_be_run_is_refused_in_words(small: Path, override: str, phrase: str) -> None:
    message = complaint(small, override)
    assert phrase in message
    assert "pydantic" not in message
    assert "Traceback" not in message


def test_pools_and_curricula_belong_to_an_environment_and_are_saved(tmp_path: Path) -> None:
    path = tmp_path / "pools.toml"
    path.write_text(
        SMALL.replace(
            "[sft]",
            "solved_reward = 0.5\n[environments.pools]\nretire_after = 2\n[environments.curriculum]\nwindow = 9\n[sft]",
        )
    )
    recipe = load_recipe(path)
    assert recipe.environments[0].pools is None
    second = recipe.environments[1]
    assert second.pools is not None
    assert second.curriculum is not None
    assert (second.pools.retire_after, second.pools.hard_to, second.curriculum.window) == (2, 0.25, 9)
    save_recipe(recipe, tmp_path / "saved.toml")
    assert load_recipe(tmp_path / "saved.toml") == recipe


@pytest.mark.parametrize("section", ["pools", "curriculum"])
def test_pools_and_curricula_are_for_rl(tmp_path: Path, section: str) -> None:
    path = tmp_path / "sft.toml"
    path.write_text(SMALL.partition("[rl]")[0] + "[evaluation]\nnum_tasks = 3\n")
    assert "have no effect without [rl]" in complaint(path, f"--environments.0.{section}={{}}")


def test_strict_numerics_need_float32_everywhere(small: Path) -> None:
    strict = "--trainer.numerics=strict"
    assert "float32 everywhere" in complaint(small, strict, "--model.dtype=bfloat16")
    assert "float32 everywhere" in complaint(small, strict, "--engine.dtype=bfloat16")
    assert "float32 everywhere" in complaint(small, strict, "--trainer.autocast=bfloat16")
    assert load_recipe(small, [strict]).trainer.numerics == "strict"


def test_strict_numerics_are_for_the_cpu(small: Path) -> None:
    strict = "--trainer.numerics=strict"
    assert "'strict' is for the CPU" in complaint(small, strict, "--model.device=cuda")
    assert load_recipe(small, [strict]).device == "cpu"
    assert load_recipe(small).device == "auto"


def test_bounds_that_mask_everything_and_bounds_without_effect_are_refused(small: Path) -> None:
    assert "every token would be masked" in complaint(small, "--rl.loss.low=2.0", "--rl.loss.high=1.5")
    assert "rl.loss.low has no effect" in complaint(small, "--rl.loss.low=0.5", "--rl.loss.kind=cispo")


def test_gspo_takes_the_mean_of_sequences(small: Path) -> None:
    assert load_recipe(small).rl.loss.reducer == "token_mean"
    assert load_recipe(small, ["--rl.loss.kind=gspo"]).rl.loss.reducer == "sequence_mean"


def test_a_warm_up_of_sft_ends_before_its_steps_do(small: Path) -> None:
    message = complaint(small, "--sft.max_steps=5", "--sft.optimizer.warmup_steps=5")
    assert "sft.optimizer.warmup_steps 5 leaves none of sft.max_steps 5" in message


def test_evaluations_between_policy_versions_need_rl(tmp_path: Path) -> None:
    path = tmp_path / "plain.toml"
    path.write_text('[model]\npath = "m"\n[evaluation]\nevery = 5\n')
    assert "evaluation.every has no effect without [rl]" in complaint(path)


def test_a_path_below_a_file_is_told(small: Path) -> None:
    assert "cannot read the recipe" in complaint(small / "recipe.toml")


def test_a_file_that_may_not_be_read_is_told(small: Path) -> None:
    small.chmod(0)
    if os.access(small, os.R_OK):
        pytest.skip("this user may read everything")
    assert "cannot read the recipe" in complaint(small)


def test_a_built_model_needs_a_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "built.toml"
    path.write_text('[model.config]\nmodel_type = "qwen3"\n')
    assert "needs tokenizer.path or tokenizer.vocab_size" in complaint(path)


def test_every_mistake_is_told_at_once_and_with_the_file(small: Path) -> None:
    message = complaint(small, "--rl.num_steps=0", "--sft.epochs=-1", "--run.colour=1")
    assert message.startswith(str(small))
    assert all(name in message for name in ("rl.num_steps", "sft.epochs", "run.colour"))


def test_a_missing_file_is_told_with_advice(tmp_path: Path) -> None:
    assert "no recipe at" in complaint(tmp_path / "absent.toml")
    assert "is not a TOML file" in complaint(tmp_path)


@pytest.mark.parametrize("content", [b"[rl\nx = 1", b"a = = 2", b"\xff\xfe\x00", b"a = 1\na = 2"])
def test_a_broken_file_is_told_with_its_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.toml"
    path.write_bytes(content)
    assert f"{path} is not a TOML file" in complaint(path)


text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
plain = st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False) | text
arguments = st.dictionaries(text, plain | st.lists(plain, max_size=3) | st.dictionaries(text, plain, max_size=3))
positive = st.integers(1, 2**40)


@given(
    name=text,
    seed=st.integers(0, 2**62),
    lr=st.floats(1e-12, 1e3),
    betas=st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
    groups=st.integers(1, 64),
    group_size=st.integers(2, 64),
    low=st.none() | st.floats(0, 1),
    max_steps=st.none() | positive,
    environments=st.lists(st.tuples(text, arguments), min_size=1, max_size=3, unique_by=lambda e: e[0]),
)
def test_a_saved_recipe_loads_as_it_was(tmp_path_factory: pytest.TempPathFactory, **drawn: object) -> None:
    recipe = recipe_from(
        {
            "run": {"name": drawn["name"], "seed": drawn["seed"]},
            "model": {"path": drawn["name"]},
            "environments": [{"name": name, "arguments": given} for name, given in drawn["environments"]],  # type: ignore[attr-defined]
            "sft": {"num_conversations": 5, "max_steps": drawn["max_steps"], "optimizer": {"betas": drawn["betas"]}},
            "rl": {
                "batch_size": drawn["groups"] * drawn["group_size"],  # type: ignore[operator]
                "group_size": drawn["group_size"],
                "optimizer": {"lr": drawn["lr"]},
                "loss": {"low": drawn["low"]},
            },
        },
        "drawn",
    )
    path = tmp_path_factory.getbasetemp() / "drawn.toml"
    save_recipe(recipe, path)
    assert load_recipe(path) == recipe


def test_a_recipe_cannot_be_changed(small: Path) -> None:
    recipe = load_recipe(small)
    with pytest.raises(ValueError, match="frozen"):
        recipe.run = Recipe.model_fields["run"].default  # type: ignore[misc]


def test_divisors_near_a_wish() -> None:
    assert nearest_divisors(128, 6) == "4 or 8"
    assert nearest_divisors(7, 3) == "7"
    assert nearest_divisors(12, 100) == "12"
