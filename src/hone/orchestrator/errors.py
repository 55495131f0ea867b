"""Why a run cannot go on."""


class NothingToTrainError(RuntimeError):
    """Rollouts end, but none of them can be trained."""


class HopelessError(ValueError):
    """The run cannot succeed as it is; the message says what to change."""
