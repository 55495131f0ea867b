"""A sandbox's Python session as a policy reads it."""

from hone.envs.sandboxes import Sandbox
from hone.schema.sandboxes import PythonResult


class PythonSession:
    """The session of a sandbox, with its results as text. timeout_seconds: for each snippet.

    A snippet that is late is interrupted, and the session goes on; if it does not heed the interrupt, or ends its process,
    the session starts anew. The output says so. The session ends with its sandbox.
    """

    def __init__(self, sandbox: Sandbox, timeout_seconds: float = 30.0) -> None:
        self._sandbox = sandbox
        self._timeout_seconds = timeout_seconds

    async def run(self, code: str) -> str:
        """What a snippet prints, the value of its last line if that is an expression, and the traceback if it raises.

        Raises a `RolloutFailure` of class sandbox for trouble that is not the snippet's.
        """
        result = await self._sandbox.python(code, timeout_seconds=self._timeout_seconds)
        return result.text + _remark(result, self._timeout_seconds)


def _remark(result: PythonResult, timeout_seconds: float) -> str:
    """What the policy must know beyond what its snippet printed."""
    if result.is_over:
        reason = f"Killed after {timeout_seconds:g} s" if result.is_late else "The code ended the session's process"
        return f"[{reason}. The next call begins a new session; all variables are gone.]"
    if result.is_late:
        return f"[Interrupted after {timeout_seconds:g} s. The session goes on with all its variables.]"
    return ""
