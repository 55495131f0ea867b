"""Receives an agent's messages: what it says, the descriptors that come along, and who it is where that was asked for."""

import array
import os
import socket
import struct
from dataclasses import dataclass

CREDENTIALS = struct.Struct("=iII")
MAX_DESCRIPTORS = 2
ANCILLARY_BYTES = socket.CMSG_SPACE(MAX_DESCRIPTORS * 4) + socket.CMSG_SPACE(CREDENTIALS.size)


@dataclass(frozen=True, slots=True)
class Message:
    """pid: of the sender, as this process numbers it; 0 where `ask_for_sender` was not called or it is elsewhere."""

    data: bytes
    descriptors: list[int]
    pid: int = 0


def ask_for_sender(control: socket.socket, *, is_asked: bool) -> None:
    """Have the kernel say with each message who sent it."""
    control.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, int(is_asked))


def receive(control: socket.socket, size: int) -> Message:
    """The next message; no data at the end of the stream. Raises as `socket.recvmsg`."""
    data, ancillary, _, _ = control.recvmsg(size, ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC)
    descriptors: array.array[int] = array.array("i")
    pid = 0
    for level, kind, content in ancillary:
        if level != socket.SOL_SOCKET:
            continue
        if kind == socket.SCM_RIGHTS:
            descriptors.frombytes(content[: len(content) - len(content) % descriptors.itemsize])
        elif kind == socket.SCM_CREDENTIALS:
            pid = CREDENTIALS.unpack_from(content)[0]
    return Message(data, list(descriptors), pid)


def close_all(descriptors: list[int]) -> None:
    """Close what came along and is not wanted."""
    for descriptor in descriptors:
        os.close(descriptor)
