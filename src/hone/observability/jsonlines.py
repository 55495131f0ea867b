"""Files of JSON lines that several processes append to, and that survive whichever of them is killed."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


class JsonLines:
    """Appends lines to a file. Every line is one write, which the kernel does not mix with those of other processes."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab", buffering=0)

    def write(self, line: Mapping[str, object]) -> int:
        """Returns how many bytes it has become."""
        data = encode(line).encode() + b"\n"
        self._file.write(data)
        return len(data)

    def close(self) -> None:
        self._file.close()


def encode(line: Mapping[str, object]) -> str:
    """JSON text of a line; numbers that are not finite, which JSON does not have, become null."""
    return json.dumps(_finite(line), default=str, allow_nan=False)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file, none if there is no file; lines that a crash left incomplete and nulls are passed over."""
    if not path.exists():
        return
    with path.open(errors="replace") as file:
        for text in file:
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                continue
            if isinstance(line, dict):
                yield {name: value for name, value in line.items() if value is not None}


def _finite(value: object) -> object:
    if isinstance(value, Mapping):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
