"""Our own programs inside a sandbox: the code of one, and messages to and from it."""

import functools
from pathlib import Path

from hone.envs.guests import channel
from hone.envs.sandboxes import Process


@functools.cache
def guest_code(name: str) -> str:
    """The program that is a guest of `hone.envs.guests`, with what it imports of ours in the same text."""
    module = channel.__name__
    return (
        "import sys\n"
        f"module = sys.modules[{module!r}] = type(sys)({module!r})\n"
        f"exec({_source('channel')!r}, module.__dict__)\n"
        f"exec({_source(name)!r}, {{'__name__': '__main__'}})"
    )


def _source(name: str) -> str:
    return Path(channel.__file__).with_name(f"{name}.py").read_text()


class MessageStream:
    """The owner's end of a guest's channel: messages behind four bytes of length over its stdin and stdout."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self._read = bytearray()

    async def send(self, message: bytes) -> None:
        """Send a message; `BrokenPipeError` when the guest is gone."""
        await self.process.write(len(message).to_bytes(4, "big") + message)

    async def receive(self) -> bytes | None:
        """The next message; None at the end of the stream, `ValueError` when it is too long."""
        if not await self._fill(4):
            return None
        size = int.from_bytes(self._read[:4], "big")
        if size > channel.MAX_MESSAGE_BYTES:
            raise ValueError(f"the program answers with more than {channel.MAX_MESSAGE_BYTES} bytes")
        if not await self._fill(4 + size):
            return None
        message = bytes(self._read[4 : 4 + size])
        del self._read[: 4 + size]
        return message

    async def _fill(self, size: int) -> bool:
        while len(self._read) < size:
            data = await self.process.read()
            if not data:
                return False
            self._read += data
        return True
