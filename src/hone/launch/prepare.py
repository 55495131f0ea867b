"""Make the base model's folder of a run: link a trained model, or build one with its tokenizer from the recipe.

Runs as its own process (`python -m hone.launch.prepare RUN_FOLDER`) because it needs torch, which the launcher does not.
"""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from hone.config.load import ConfigError, load_recipe
from hone.config.recipe import Recipe
from hone.envs.remote import environment_of
from hone.model.checkpoint import save_model
from hone.model.families import ModelConfig
from hone.model.transformer import Transformer
from hone.observability import logs
from hone.schema.seeds import derive_seed
from hone.text.template import FAMILIES, ChatTemplate, built_in
from hone.text.tokenizer import Tokenizer
from hone.text.training import train_tokenizer
from hone.transport.folders import RunFolder

NUM_TRAINING_TASKS = 4000
"""Tasks of each environment whose texts a trained tokenizer sees."""


def prepare(recipe: Recipe, folder: RunFolder) -> None:
    """Fill `folder.model`; does nothing when that is done already."""
    if (folder.model / "config.json").exists():
        return
    if recipe.model.config is None:
        _link_model(recipe, folder.model)
    else:
        _build_model(recipe, recipe.model.config, folder.model)


def _build_model(recipe: Recipe, config: dict[str, object], target: Path) -> None:
    tokenizer = _tokenizer(recipe)
    size = config.get("vocab_size", tokenizer.vocab_size)
    if not isinstance(size, int) or size < tokenizer.vocab_size:
        raise ConfigError(
            f"model.config.vocab_size = {size!r} is less than the tokenizer's {tokenizer.vocab_size}; remove it or raise it"
        )
    eos = tokenizer.eos_token_ids
    described = config | {"vocab_size": size} | ({"eos_token_id": eos} if eos else {})
    model_config = ModelConfig.from_hugging_face(described)
    model = Transformer(model_config)
    model.initialize(derive_seed(recipe.run.seed, "weights"))
    source = target.with_name("tokenizer")
    tokenizer.save(source)
    save_model(model, model_config, target, tokenizer_from=source)


def _tokenizer(recipe: Recipe) -> Tokenizer:
    section = recipe.tokenizer
    if section.path is not None:
        return _loaded(section.path, section.chat_template)
    assert section.vocab_size is not None  # the recipe's own rule
    return train_tokenizer(
        _training_texts(recipe), section.vocab_size, alphabet=section.alphabet, chat_template=section.chat_template
    )


def _loaded(folder: Path | str, chat_template: str | None) -> Tokenizer:
    """A trained tokenizer, with another template where the recipe names one."""
    tokenizer = Tokenizer.load(Path(folder).expanduser())
    if chat_template in FAMILIES:
        tokenizer.chat_template = built_in(chat_template).source
    elif chat_template is not None:
        tokenizer.chat_template = Path(chat_template).expanduser().read_text()
    return tokenizer


def _training_texts(recipe: Recipe) -> Iterator[str]:
    """What tasks and gold conversations say; where there are tools, as rendered, descriptions and calls included."""
    assert recipe.tokenizer.chat_template is not None  # the recipe's own rule
    template = ChatTemplate(built_in(recipe.tokenizer.chat_template).source)
    for section in recipe.environments:
        environment = environment_of(section)
        available = environment.num_train_tasks
        count = NUM_TRAINING_TASKS if available is None else min(available, NUM_TRAINING_TASKS)
        for index in range(count):
            task = environment.train_task(index)
            conversation = [*task.prompt, *(environment.gold(task) or ())]
            if environment.tools:
                yield template.render(conversation, environment.tools)
            else:
                yield from (message.content for message in conversation)


def _link_model(recipe: Recipe, target: Path) -> None:
    assert recipe.model.path is not None  # the recipe's own rule
    source = _local(recipe.model.path)
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        link = target / file.name
        if file.suffix == ".safetensors" and not link.exists():
            link.symlink_to(file.absolute())
        elif file.is_file() and file.name != "config.json" and not link.exists():
            shutil.copy(file, link)
    section = recipe.tokenizer
    if section.path is not None or section.chat_template is not None:
        _loaded(section.path or source, section.chat_template).save(target)
    shutil.copy(source / "config.json", target / "config.json")  # last: it marks the end


def _local(path: str) -> Path:
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    try:
        from huggingface_hub import snapshot_download  # an optional extra; only needed for names on the hub
    except ImportError as error:
        raise ConfigError(
            f"model.path = {path!r} is no folder; to load it from the hub: pip install huggingface_hub"
        ) from error
    return Path(snapshot_download(path))


def main(run_folder: Path) -> int:
    folder = RunFolder(run_folder)
    logs.configure("prepare", run_folder)
    try:
        prepare(load_recipe(folder.config), folder)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
