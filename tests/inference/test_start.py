"""What the inference server makes of a run's folder before it serves: which weights, which addresses, which routes."""

import errno
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hone.config.load import recipe_from, save_recipe
from hone.config.recipe import Recipe
from hone.inference.server import __main__ as start
from hone.inference.server.admin import admin_router
from hone.inference.server.serve import Endpoint, Serving, serving_alone
from hone.model.checkpoint import CheckpointError
from hone.transport.addresses import Addresses, save_addresses
from hone.transport.folders import RunFolder


def recipe(**sections: object) -> Recipe:
    return recipe_from({"model": {"path": "m"}, **sections}, "test")


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path)
    here = "127.0.0.1"
    save_addresses(
        Addresses(
            f"http://{here}:5001", f"http://{here}:5002", f"tcp://{here}:1", f"tcp://{here}:2", f"tcp://{here}:3"
        ),
        folder.addresses,
    )
    save_recipe(recipe(), folder.config)
    return folder


def publish(run: RunFolder, version: int) -> Path:
    folder = run.weights_of(version)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def test_a_version_that_vanishes_while_it_is_loaded_is_followed_by_the_next(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(run, 1)
    served: list[int] = []

    def serve(serving: Serving) -> None:
        if serving.version == 1:
            (serving.model_folder / "config.json").unlink()
            serving.model_folder.rmdir()
            publish(run, 2)
            raise CheckpointError("config.json is missing")
        served.append(serving.version)

    monkeypatch.setattr(start, "run", serve)
    start.serve_run(recipe(), run, None)
    assert served == [2]


def test_weights_that_are_broken_and_stay_are_not_tried_again(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(run, 1)

    def refuse(serving: Serving) -> None:
        raise CheckpointError(f"{serving.model_folder} is broken")

    monkeypatch.setattr(start, "run", refuse)
    with pytest.raises(CheckpointError):
        start.serve_run(recipe(), run, None)


def test_a_fixed_model_that_is_not_there_is_hopeless(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Serving) -> None:
        raise CheckpointError("config.json is missing")

    monkeypatch.setattr(start, "run", refuse)
    with pytest.raises(CheckpointError):
        start.serve_run(recipe(), run, run.path / "absent")


def test_the_server_binds_what_the_recipe_says_at_the_port_that_was_chosen(run: RunFolder) -> None:
    given = recipe(server={"host": "0.0.0.0", "admin_host": "0.0.0.0", "admin_port": 0})
    serving = start.serving_of(given, run, None)
    assert (serving.api, serving.admin) == (Endpoint("0.0.0.0", 5001), Endpoint("0.0.0.0", 5002))


def test_a_full_disk_ends_the_server_with_one_readable_line(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fill_the_disk(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")

    monkeypatch.setattr(start, "serve_run", fill_the_disk)
    monkeypatch.setattr(sys, "argv", ["server", str(run.path)])
    assert start.main() == 2
    assert (
        capsys.readouterr().err.strip() == "error: cannot write metrics.jsonl: No space left on device; free some space"
    )


def test_a_recipe_is_served_with_its_numbers_and_its_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADMIN", "sesame")
    given = recipe(
        model={"path": "m", "dtype": "bfloat16", "device": "cpu"},
        server={"admin_token_variable": "ADMIN"},
        engine={"num_blocks": 7},
    )
    serving = serving_alone(Path("m"), given, Endpoint("127.0.0.1", 8000))
    assert (serving.dtype, serving.device, serving.admin_token) == (torch.bfloat16, "cpu", "sesame")
    assert serving.engine.num_blocks == 7


def test_strict_numerics_of_a_recipe_are_kept_when_it_is_served() -> None:
    serving = serving_alone(Path("m"), recipe(trainer={"numerics": "strict"}), Endpoint("127.0.0.1", 8000))
    assert serving.strict
    assert serving.device == "cpu"


def test_controls_can_be_left_out_while_health_stays() -> None:
    def paths(**options: bool) -> set[str]:
        return {route.path for route in admin_router(SimpleNamespace(engine=None), None, **options).routes}

    assert paths(controls=False) == {"/health", "/metrics"}
    assert "/admin/load" in paths()
