"""Scaffolds are packages that validate, and whose own tests pass as they are."""

import asyncio
import os
import re
import subprocess
import sys
import tomllib

import pytest

from hone.config.load import load_recipe
from hone.envs import EnvironmentLoadError
from hone.envs.checks import validate
from hone.envs.registry import load_folder
from hone.envs.scaffold import KINDS, check_name, scaffold

PLACEHOLDER = re.compile(r"@[a-z]+@")
QUICK = ("single", "multi", "tool")


@pytest.mark.parametrize("kind", KINDS)
def test_a_scaffold_is_a_whole_package(tmp_path, kind):
    made = scaffold("my_own", kind, tmp_path / "package")
    names = {str(path.relative_to(made.folder)) for path in made.files}
    assert {"pyproject.toml", "README.md", "hone_my_own/__init__.py", "hone_my_own/tasks.py"} <= names
    assert {"hone_my_own/rewards.py", "tests/test_my_own.py"} <= names
    assert not any(PLACEHOLDER.search(path.read_text()) for path in made.files)
    project = tomllib.loads((made.folder / "pyproject.toml").read_text())["project"]
    assert project["name"] == "hone-my-own"
    assert project["entry-points"]["hone.environments"] == {"my_own": "hone_my_own:load_environment"}


@pytest.mark.parametrize("kind", QUICK)
def test_a_scaffold_validates(tmp_path, kind):
    made = scaffold(f"quick_{kind}", kind, tmp_path)
    environment = load_folder(made.folder)
    assert environment.version == "0.1.0"
    for check in asyncio.run(validate(environment, num_tasks=3)):
        assert check.has_passed, check.problems


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_tests_of_a_scaffold_pass(tmp_path, kind):
    made = scaffold(f"whole_{kind}", kind, tmp_path)
    # As in a fresh installation: none of this project's settings, warnings are errors.
    command = [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:asyncio", "-p", "no:cacheprovider"]
    ended = subprocess.run(command, cwd=made.folder, capture_output=True, text=True, timeout=300, env=dict(os.environ))
    assert ended.returncode == 0, ended.stdout


@pytest.mark.network
def test_a_scaffold_installs_with_pip(tmp_path):
    made = scaffold("installed", "single", tmp_path / "package")
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site), str(made.folder)]
    subprocess.run(install, check=True, timeout=300)
    code = "from hone.envs import load_environment; print(load_environment('installed').version)"
    path = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=os.environ | {"PYTHONPATH": path}
    )
    assert ended.stdout == "0.1.0\n", ended.stderr


def test_the_recipe_of_a_scaffold_is_a_recipe(tmp_path):
    made = scaffold("trained", "single", tmp_path)
    recipe = load_recipe(made.folder / "recipe.toml")
    assert [section.name for section in recipe.environments] == ["trained"]


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(ValueError, match="is there already and is not empty"):
        scaffold("mine", "single", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="nothing was written"):
        scaffold("mine", "single", tmp_path / "file")


@pytest.mark.parametrize("name", ["math", "a1", "two_words", "gsm8k_hard"])
def test_good_names_are_taken(name):
    check_name(name)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("My-Env", "try my_env"),
        ("1st", "try st"),
        ("", "lower case"),
        ("a__b", "try a_b"),
        ("../up", "try up"),
        ("name\n", "try name"),
        ("lambda", "word of Python's"),
    ],
)
def test_bad_names_are_refused_with_a_better_one(name, hint):
    with pytest.raises(ValueError, match=hint):
        check_name(name)


def test_an_unknown_kind_is_refused(tmp_path):
    with pytest.raises(ValueError, match="there are single, multi"):
        scaffold("mine", "many", tmp_path / "mine")
    assert not (tmp_path / "mine").exists()


def test_a_folder_that_is_no_package_is_told(tmp_path):
    with pytest.raises(EnvironmentLoadError, match="is no environment package"):
        load_folder(tmp_path)
    (tmp_path / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    with pytest.raises(EnvironmentLoadError, match="does not declare one entry point"):
        load_folder(tmp_path)
    (tmp_path / "pyproject.toml").write_text("[project\n")
    with pytest.raises(EnvironmentLoadError, match="not a TOML file"):
        load_folder(tmp_path)


def test_a_folder_is_not_taken_for_a_module_from_elsewhere(tmp_path):
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "x"\n[project.entry-points."hone.environments"]\nx = "hone_arithmetic:load_environment"\n'
    )
    with pytest.raises(EnvironmentLoadError, match="was imported from"):
        load_folder(tmp_path)
