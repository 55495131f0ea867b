"""What a node tells of its work: tallies for its metrics, spans, and the accounts of its sandboxes."""

import contextlib
import logging
import time
from collections.abc import Iterator
from pathlib import Path

from hone.observability.spans import Spans
from hone.sandbox.node.accounts import Accounts, EndedSandbox
from hone.sandbox.node.lifecycle import End, Lease
from hone.sandbox.node.tallies import Tallies, image_class
from hone.schema.sandboxes import Outcome, SandboxUsage

logger = logging.getLogger("hone.sandbox.node.node")


class Records:
    """Of one node. spans: where its pieces of work are told, None nowhere. Moments are of `time.monotonic`."""

    def __init__(self, spans: Spans | None) -> None:
        self.tallies = Tallies()
        self._spans = spans
        self._accounts = Accounts(None)

    def open(self, folder: Path) -> None:
        """Keep the accounts in a folder, too."""
        self._accounts = Accounts(folder)

    def close(self) -> None:
        """Let go of the files."""
        self._accounts.close()

    def ready(self, lease: Lease, *, is_warm: bool) -> float:
        """A sandbox has got its cell, warm or made for it; returns the seconds since it was asked for."""
        now = time.monotonic()
        image, cell = image_class(lease.spec.image), "warm" if is_warm else "cold"
        seconds = now - lease.asked
        self.tallies.created[image, cell] += 1
        self.tallies.ready_seconds[cell].observe(seconds)
        if self._spans is not None:
            starting = max(0.0, now - lease.started)
            self.span(lease, "create", lease.asked, seconds, image=image, cell=cell, starting_seconds=starting)
        return seconds

    def called(self, lease: Lease, kind: str, began: float) -> None:
        """A call of a sandbox is over."""
        seconds = time.monotonic() - began
        self.tallies.call_seconds[kind].observe(seconds)
        if self._spans is not None:
            self.span(lease, kind, began, seconds)

    def outcome(self, outcome: Outcome) -> None:
        """A program, or a call, ended in this way."""
        self.tallies.outcomes[outcome] += 1

    def ended(self, lease: Lease, end: End, reason: str, ready_seconds: float | None, usage: SandboxUsage) -> None:
        """Nothing of a sandbox is left."""
        now = time.monotonic()
        self.tallies.ended[end] += 1
        account = EndedSandbox(
            lease.sandbox_id,
            lease.owner,
            lease.spec.rollout,
            lease.spec.image,
            asked=unix_time(lease.asked),
            ended=unix_time(now),
            ready_seconds=ready_seconds,
            end=end,
            reason=reason.removeprefix(f"{lease.sandbox_id}: "),
            usage=usage,
        )
        with self._counting_losses():
            self._accounts.add(account)
        if self._spans is not None:
            self.span(lease, "sandbox", lease.asked, now - lease.asked, end=end, cpu_seconds=usage.cpu_seconds)

    def span(self, lease: Lease, name: str, began: float, seconds: float, **fields: int | float | str) -> None:
        """A piece of work on a sandbox."""
        if self._spans is not None:
            whose = {"rollout": lease.spec.rollout} if lease.spec.rollout else {}
            with self._counting_losses():
                self._spans.record(name, unix_time(began), seconds, sandbox=lease.sandbox_id, **whose, **fields)

    def find(self, sandbox_id: str) -> EndedSandbox | None:
        """A sandbox that ended not too long ago."""
        return self._accounts.find(sandbox_id)

    @contextlib.contextmanager
    def _counting_losses(self) -> Iterator[None]:
        """A disk that takes no more is no trouble of a sandbox: the line is lost, and counted."""
        try:
            yield
        except OSError as error:
            self.tallies.unwritten_lines += 1
            if self.tallies.unwritten_lines == 1:
                logger.error("accounts or spans are not written any more: %s", error)


def unix_time(moment: float) -> float:
    """The Unix time of a moment of `time.monotonic`."""
    return round(time.time() - time.monotonic() + moment, 6)
