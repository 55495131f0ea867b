import subprocess
import sys

import pytest

from hone.envs import EnvironmentLoadError, installed_environments, load_environment

PACKAGE = """
from hone.envs import Rubric, SingleTurn, Task, reward, user

@reward
def exact(answer, reference):
    return answer == reference

def load_environment(size: int = 3, data: str = ""):
    if size < 1:
        raise ValueError(f"size {size} is not positive")
    if data:
        open(data)
    return SingleTurn(name="mine", rubric=Rubric([exact]), train=[Task((user("hi"),), "ho")] * size)

def something_else():
    return 3

NUMBER = 4
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Install a distribution with these entry points, as pip would leave it."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "package_of_mine.py").write_text(PACKAGE)
    monkeypatch.delitem(sys.modules, "package_of_mine", raising=False)

    def write(distribution="mine", **entries):
        folder = tmp_path / f"{distribution}-2.5.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 2.5\n")
        lines = [f"{name} = {value}" for name, value in entries.items()]
        (folder / "entry_points.txt").write_text("\n".join(["[hone.environments]", *lines]))

    return write


def test_an_installed_environment_is_found_by_either_spelling_with_its_version(install):
    install(my_env="package_of_mine:load_environment")
    assert "my_env" in installed_environments()
    for name in ("my_env", "my-env"):
        environment = load_environment(name, size=7)
        assert (environment.num_train_tasks, environment.version) == (7, "2.5")


def test_an_unknown_name_lists_what_is_installed(install):
    install(my_env="package_of_mine:load_environment")
    with pytest.raises(EnvironmentLoadError, match=r"'my_emv' is not installed \(installed: .*my_env"):
        load_environment("my_emv")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"sice": 3}, r"unexpected keyword argument 'sice'; its arguments are size, data"),
        ({"size": 0}, "size 0 is not positive"),
        ({"data": "/no/such/file"}, "No such file"),
    ],
)
def test_arguments_that_do_not_fit_are_named(install, arguments, complaint):
    install(my_env="package_of_mine:load_environment")
    with pytest.raises(EnvironmentLoadError, match=complaint):
        load_environment("my_env", **arguments)


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ("no_such_package:load", "cannot be imported"),
        ("package_of_mine:missing", "cannot be imported"),
        ("package_of_mine:NUMBER", "is not a function"),
        ("package_of_mine:something_else", "returned int, not an Environment"),
    ],
)
def test_a_broken_package_is_named(install, value, complaint):
    install(my_env=value)
    with pytest.raises(EnvironmentLoadError, match=complaint):
        load_environment("my_env")


def test_one_name_in_two_packages_is_refused(install):
    install("one", my_env="package_of_mine:load_environment")
    install("two", my_env="package_of_mine:something_else")
    with pytest.raises(EnvironmentLoadError, match="uninstall all packages but one"):
        load_environment("my_env")


def test_importing_the_author_interface_loads_nothing_heavy():
    heavy = {"torch", "numpy", "pydantic", "aiohttp", "typer", "rich", "zmq", "tokenizers", "jinja2"}
    code = f"import hone.envs, sys; print(sorted(set(sys.modules) & {heavy!r}))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.strip() == "[]"
