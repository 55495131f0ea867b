"""What a disk that takes no more looks like: trouble that a person has to mend, and that starting again does not."""

import errno

OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def is_disk_trouble(error: BaseException) -> bool:
    """Whether a file could not grow: no space, quota or file size limit reached, read-only."""
    return isinstance(error, OSError) and error.errno in OUT_OF_SPACE


def disk_complaint(error: OSError, folder: object) -> str:
    """One line for the person; `folder` is named where the error names no file."""
    return f"cannot write {error.filename or folder}: {error.strerror}; free some space"
