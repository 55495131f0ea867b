"""Light where it should be: the base install, `import hone.envs` and `hone --help`.

A fresh virtual environment gets `pip install .` without extras; its distributions are counted, and the import and the
help page are timed as whole processes, interleaved with an empty Python process (the floor).
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import harness

ROOT = Path(__file__).parents[1]
BARS = {"distributions": 20, "import_envs_seconds": 0.2, "help_seconds": 0.3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=9)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        python = fresh_environment(Path(folder))
        distributions = installed(python)
        commands = {
            "empty python": [str(python), "-c", "pass"],
            "import hone.envs": [str(python), "-c", "import hone.envs"],
            "hone --help": [str(python.with_name("hone")), "--help"],
        }
        timed = {name: [] for name in commands}
        for _ in range(arguments.runs + 1):
            for name, command in commands.items():
                timed[name].append(seconds(command))
    figures = {name: harness.summary(values[1:]) for name, values in timed.items()}
    # The interpreter's own start is not the import's: it is taken off, and shown beside it.
    import_seconds = figures["import hone.envs"]["median"] - figures["empty python"]["median"]
    rows = [(name, value["median"], value["min"], value["max"]) for name, value in figures.items()]
    harness.show_table("light where it should be (seconds)", ["process", "median", "min", "max"], rows)
    print(f"{len(distributions)} distributions: {', '.join(distributions)}")
    harness.finish(
        "light",
        {
            "claim": "base install: torch-free, at most 20 distributions; import hone.envs < 0.2 s; hone --help < 0.3 s",
            "ratio": BARS["help_seconds"] / figures["hone --help"]["median"],
            "distributions": len(distributions),
            "torch_free": "torch" not in distributions,
            "import_envs_seconds": import_seconds,
            "help_seconds": figures["hone --help"],
            "python_seconds": figures["empty python"],
            "bars": BARS,
        },
        "typer",
        "msgspec",
    )


def fresh_environment(folder: Path) -> Path:
    """A virtual environment with nothing but hone and what it depends on; returns its interpreter."""
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", str(ROOT)], check=True)
    return python


def installed(python: Path) -> list[str]:
    """Names of the distributions, without pip and setuptools, which venv brings."""
    listing = subprocess.run(
        [python, "-m", "pip", "list", "--format=freeze"], check=True, capture_output=True, text=True
    ).stdout
    names = [line.partition("==")[0].partition(" ")[0] for line in listing.splitlines() if line]
    return sorted(name for name in names if name not in ("pip", "setuptools", "wheel"))


def seconds(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
