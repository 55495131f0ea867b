"""This user's cache, for what a machine keeps of sandboxes from one run to the next."""

import os
import tempfile
from pathlib import Path


def cache_folder(name: str) -> Path:
    """The place of a folder in it, which need not be there yet; beneath the temporary folder where no home can be written.

    Raises `ValueError` where somebody else has taken that.
    """
    wanted = os.environ.get("XDG_CACHE_HOME")
    try:
        folder = (Path(wanted) if wanted else Path.home() / ".cache") / "hone"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        folder = Path(tempfile.gettempdir()) / f"hone-cache-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.stat(follow_symlinks=False)
        if status.st_uid != os.getuid() or status.st_mode & 0o022:
            raise ValueError(f"{folder} is not this user's alone; set XDG_CACHE_HOME") from None
    return folder / name
