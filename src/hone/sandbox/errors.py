"""What goes wrong with a sandbox that is not its programs' doing."""

import errno

from hone.schema.sandboxes import Outcome

SHORTAGES = frozenset({errno.EAGAIN, errno.ENOMEM, errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE})
"""What the machine has not enough of now, and may have later: never a reason to say that it cannot have sandboxes."""


class SandboxError(RuntimeError):
    """Trouble of the infrastructure: nobody's answer, never a result. outcome: which trouble.

    Where `outcome.is_infra` is false it is no such trouble: the programs of the sandbox have brought its end about.
    """

    def __init__(self, message: str, outcome: Outcome = Outcome.AGENT_LOST) -> None:
        super().__init__(message)
        self.outcome = outcome


class Unsupported(SandboxError):
    """This machine cannot keep the promise that was asked for, and nothing weaker was allowed."""

    def __init__(self, message: str) -> None:
        super().__init__(message, Outcome.POLICY_DENIED)


class ImageError(RuntimeError):
    """An image cannot be had: there is no such thing, it is broken, or a program that fetches it is missing."""


class Busy(SandboxError):
    """As many sandboxes wait as may; ask again after `retry_after_seconds`, or somewhere else."""

    def __init__(self, message: str, retry_after_seconds: float) -> None:
        super().__init__(f"{message}; ask again in {retry_after_seconds:.2g} s", Outcome.NODE_LOST)
        self.retry_after_seconds = retry_after_seconds
