"""Where a gateway's nodes are: addresses, the addresses behind a DNS name, or those in a file."""

import asyncio
import logging
import socket
from pathlib import Path
from typing import Protocol

from hone.sandbox.wire.addresses import Address, parse_address

LOOKUP_SECONDS = 5.0

logger = logging.getLogger("hone.sandbox.gateway.gateway")


class Source(Protocol):
    """Says where nodes are, at the moment it is asked."""

    async def addresses(self) -> set[Address]:
        """What is known; what was known before, when it cannot be had."""


class Fixed:
    """One address."""

    def __init__(self, address: Address) -> None:
        self._address = address

    async def addresses(self) -> set[Address]:
        """It."""
        return {self._address}


class Name:
    """All addresses that a name stands for, such as the pods of a headless service. kind: tcp or tls; then the
    certificates are for the name.
    """

    def __init__(self, kind: str, name: str, port: int) -> None:
        self._kind, self._name, self._port = kind, name, port
        self._known: set[Address] = set()

    async def addresses(self) -> set[Address]:
        """Those of now."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(LOOKUP_SECONDS):
                found = await loop.getaddrinfo(self._name, self._port, type=socket.SOCK_STREAM)
        except (OSError, TimeoutError) as error:
            logger.warning("the name %s of nodes is not to be had: %s", self._name, error or "no answer")
            return self._known
        self._known = {Address(self._kind, host=str(one[4][0]), port=self._port, name=self._name) for one in found}
        return self._known


class Lines:
    """A file with an address a line, such as a job of many machines writes; empty lines and # are left out."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: set[Address] = set()

    async def addresses(self) -> set[Address]:
        """Those of now. A line that is none is told and left out: others may be writing."""
        try:
            lines = self._path.read_text().splitlines()
        except (OSError, ValueError) as error:  # a ValueError: it is no text
            logger.warning("the file %s of nodes is not to be had: %s", self._path, error)
            return self._known
        found = set()
        for line in lines:
            if text := line.partition("#")[0].strip():
                try:
                    found.add(parse_address(text))
                except ValueError as error:
                    logger.warning("%s: %s", self._path, error)
        self._known = found
        return found


def parse_source(text: str) -> Source:
    """An address, dns:NAME:PORT, dns+tls:NAME:PORT or file:PATH."""
    kind, _, rest = text.partition(":")
    if kind == "file" and rest:
        return Lines(Path(rest))
    if kind in ("dns", "dns+tls"):
        name, _, port = rest.removeprefix("//").rpartition(":")
        if not name or not port.isdecimal():
            raise ValueError(f"{text!r} is not {kind}:NAME:PORT")
        return Name("tls" if kind == "dns+tls" else "tcp", name, int(port))
    try:
        return Fixed(parse_address(text))
    except ValueError as error:
        raise ValueError(f"{error}, dns:NAME:PORT, dns+tls:NAME:PORT, file:PATH") from None
