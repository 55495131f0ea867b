"""Short constructors for the messages that environments write."""

from hone.schema.messages import Message


def system(content: str) -> Message:
    """A system message."""
    return Message("system", content)


def user(content: str) -> Message:
    """A message of the user, or of the environment speaking as the user."""
    return Message("user", content)


def assistant(content: str) -> Message:
    """A message of the policy, as in gold conversations and in examples inside a prompt."""
    return Message("assistant", content)
