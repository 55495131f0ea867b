"""Which errors are the caller's to mend, and so are shown without a traceback."""

from hone.inference.client import EngineError
from hone.launch.supervise import StageFailed
from hone.observability.disk import is_disk_trouble
from hone.sandbox.errors import ImageError, SandboxError

READABLE = (
    ValueError,
    FileNotFoundError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
    StageFailed,
    EngineError,
    ImageError,
    SandboxError,
    ModuleNotFoundError,
)


def complaint(error: Exception) -> str | None:
    """What to tell the caller in one message; None for what is not the caller's to mend."""
    if isinstance(error, ExceptionGroup):
        told = [complaint(one) for one in error.exceptions]
        return None if None in told else told[0]
    if isinstance(error, OSError) and is_disk_trouble(error):
        return f"{error}; free some space"
    # A deadline that was written with what was waited for; a bare one is a fault of ours.
    told_deadline = isinstance(error, TimeoutError) and bool(str(error))
    return str(error) if isinstance(error, READABLE) or told_deadline else None
