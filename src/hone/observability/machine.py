"""What a process runs on: the machine and the versions of the packages that its numbers depend on."""

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("hone", "torch", "safetensors", "tokenizers", "msgspec", "pyzmq", "numpy", "aiohttp", "fastapi")


def describe_machine() -> dict[str, str]:
    """Names and values for a table; what this machine does not tell is left out."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    facts = {
        "processor": _processor(),
        "cores": str(cores),
        "memory": _memory(),
        "system": platform.platform(),
        "python": platform.python_version(),
    }
    return {name: value for name, value in (facts | _versions()).items() if value}


def save_machine(path: Path) -> None:
    """Keep the description beside the numbers that it belongs to."""
    path.write_text(json.dumps(describe_machine(), indent=2))


def read_machine(path: Path) -> dict[str, str]:
    """The inverse of `save_machine`; raises `FileNotFoundError` or `ValueError`."""
    found = json.loads(path.read_text())
    return {str(name): str(value) for name, value in found.items()}


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    lines = _lines("/proc/cpuinfo")
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _memory() -> str:
    total = next((line.split()[1] for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), None)
    return "" if total is None else f"{int(total) / 2**20:.1f} GiB"


def _lines(path: str) -> list[str]:
    file = Path(path)
    return file.read_text().splitlines() if file.exists() else []
