"""Which errors are the caller's to mend, and so are shown without a traceback."""

from hone.launch.supervise import StageFailed

READABLE = (ValueError, FileNotFoundError, PermissionError, StageFailed, ModuleNotFoundError)
