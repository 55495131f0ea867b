"""Environments that others wrote, as ours: each module here needs an extra, and is checked before it is used."""


class BridgeError(ValueError):
    """Something of another library that cannot be used as an environment; the message says why and what to do."""
