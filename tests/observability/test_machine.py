"""The description of the machine that a run's numbers belong to."""

from importlib.metadata import version

from hone.observability.machine import describe_machine


def test_the_machine_and_the_packages_are_named() -> None:
    facts = describe_machine()
    assert facts["hone"] == version("hone")
    assert int(facts["cores"]) >= 1
    assert all(facts.values())


def test_packages_that_are_not_installed_are_left_out() -> None:
    assert set(describe_machine()) <= {
        *("processor", "cores", "memory", "system", "python", "hone", "torch", "safetensors"),
        *("tokenizers", "msgspec", "pyzmq", "numpy", "aiohttp", "fastapi"),
    }
