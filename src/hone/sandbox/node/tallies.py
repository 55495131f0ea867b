"""What a node counts of its work: plain numbers, cheap enough for every call, for metrics to be read from."""

from collections import Counter
from dataclasses import dataclass, field

from hone.observability.histogram import SECONDS, Histogram
from hone.sandbox.node.lifecycle import End
from hone.schema.sandboxes import Outcome

CALLS = ("exec", "spawn", "python", "snippet", "files", "network", "state")
IMAGES = ("host", "dir", "tar", "oci", "build", "registry")


def _histograms(names: tuple[str, ...]) -> dict[str, Histogram]:
    return {name: Histogram(SECONDS) for name in names}


@dataclass(slots=True)
class Tallies:
    """Since the start of the node.

    created: sandboxes that became ready, by class of image and by whether a warm cell was there. not_created: those
    that will not be, by outcome. cells_made, cells_failed: for sandboxes and for pools. ready_seconds: from being asked
    for to being ready, by whether a warm cell was there. call_seconds: by kind of call. outcomes: of programs, and of
    calls that trouble with the sandbox ended. ended: sandboxes, by what ended them. read_bytes, written_bytes: of files.
    """

    created: Counter[tuple[str, str]] = field(default_factory=Counter)
    not_created: Counter[Outcome] = field(default_factory=Counter)
    cells_made: int = 0
    cells_failed: int = 0
    ready_seconds: dict[str, Histogram] = field(default_factory=lambda: _histograms(("warm", "cold")))
    call_seconds: dict[str, Histogram] = field(default_factory=lambda: _histograms(CALLS))
    outcomes: Counter[Outcome] = field(default_factory=Counter)
    ended: Counter[End] = field(default_factory=Counter)
    read_bytes: int = 0
    written_bytes: int = 0
    ended_cpu_seconds: float = 0.0
    ended_output_bytes: int = 0
    unwritten_lines: int = 0

    @property
    def num_calls(self) -> int:
        """Calls that have ended."""
        return sum(histogram.count for histogram in self.call_seconds.values())


def image_class(name: str) -> str:
    """The kind of an image's name: one of a few words."""
    kind = name.partition(":")[0]
    if kind in ("python", "host"):
        return "host"
    return kind if kind in IMAGES[1:-1] else "registry"
