"""Where nodes and gateways are: addresses, connecting to one, listening at one."""

import asyncio
import os
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hone.sandbox.errors import SandboxError

CA_VARIABLE = "HONE_SANDBOX_CA"
HANDSHAKE_SECONDS = 5.0
KINDS = ("unix", "tcp", "tls")


@dataclass(frozen=True, slots=True)
class Address:
    """unix:/path, tcp://host:port or tls://host:port. name: whom the certificate must be for, if that is not the host."""

    kind: str
    path: str = ""
    host: str = ""
    port: int = 0
    name: str = ""

    def __str__(self) -> str:
        if self.kind == "unix":
            return f"unix:{self.path}"
        return f"{self.kind}://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"


def parse_address(text: str) -> Address:
    """The address that a text means; `ValueError` if none."""
    kind, _, rest = text.partition(":")
    rest = rest.removeprefix("//")
    if kind == "unix" and rest:
        return Address(kind, path=rest)
    host, _, port = rest.rpartition(":")
    if kind in ("tcp", "tls") and host and port.isdecimal() and int(port) < 1 << 16:
        return Address(kind, host=host.strip("[]"), port=int(port))
    raise ValueError(f"the address {text!r} of a node is none of unix:/path, tcp://host:port, tls://host:port")


async def connect(address: Address, make: Callable[[], asyncio.Protocol], *, ca_file: str = "") -> None:
    """Connect a protocol; at a tls address, only with whom the certificate says it is.

    ca_file: of the authorities to be believed; by default the file in $HONE_SANDBOX_CA, else the system's.
    """
    loop = asyncio.get_running_loop()
    match address.kind:
        case "unix":
            await loop.create_unix_connection(make, address.path)
        case "tcp":
            await loop.create_connection(make, address.host, address.port)
        case _:
            await loop.create_connection(
                make,
                address.host,
                address.port,
                ssl=client_context(ca_file or os.environ.get(CA_VARIABLE, "")),
                server_hostname=address.name or address.host,
                ssl_handshake_timeout=HANDSHAKE_SECONDS,
            )


def client_context(ca_file: str) -> ssl.SSLContext:
    """Verifies who is at the other end."""
    try:
        context = ssl.create_default_context(cafile=ca_file or None)
    except OSError as error:
        raise ValueError(f"no certificates of authorities in {ca_file!r}: {error}; see ${CA_VARIABLE}") from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


class Listener:
    """Connections to an address, made into protocols until it is closed.

    certificate, key: files, for a tls address. A unix address lets in this user and root only.
    """

    def __init__(self, address: Address, *, certificate: Path | None = None, key: Path | None = None) -> None:
        if (address.kind == "tls") != (certificate is not None and key is not None):
            raise ValueError(f"{address}: a certificate and its key go with a tls:// address, and only with one")
        self.address = address
        self._context = server_context(certificate, key) if certificate is not None and key is not None else None
        self._server: asyncio.Server | None = None

    async def open(self, make: Callable[[], asyncio.Protocol]) -> None:
        """Listen; port 0 becomes one that is free."""
        loop = asyncio.get_running_loop()
        address = self.address
        if address.kind == "unix":
            path = Path(address.path)
            _clear_dead_socket(path)
            previous = os.umask(0o177)
            try:
                self._server = await loop.create_unix_server(make, str(path))
            finally:
                os.umask(previous)
            return
        timeout = HANDSHAKE_SECONDS if self._context is not None else None
        self._server = await loop.create_server(
            make, address.host, address.port, ssl=self._context, ssl_handshake_timeout=timeout, backlog=1024
        )
        port = self._server.sockets[0].getsockname()[1]
        self.address = Address(address.kind, host=address.host, port=port)

    def close(self) -> None:
        """Let nobody in any more."""
        if self._server is not None:
            self._server.close()
            self._server = None

    def remove(self) -> None:
        """Nothing of it is left in the file system."""
        if self.address.kind == "unix":
            Path(self.address.path).unlink(missing_ok=True)


def server_context(certificate: Path, key: Path) -> ssl.SSLContext:
    """Shows a certificate to whoever connects."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise ValueError(f"the certificate {certificate} and the key {key} do not do: {error}") from error
    return context


def peer_uid(connection: socket.socket | None) -> int | None:
    """The user at the other end of a connection, where the kernel tells."""
    if connection is None or connection.family != socket.AF_UNIX:
        return None
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return int.from_bytes(credentials[4:8], "little")


def _clear_dead_socket(path: Path) -> None:
    """A node that was killed left its socket; one that lives does not lose it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_socket():
        return
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            path.unlink(missing_ok=True)
            return
    raise SandboxError(f"a node listens at {path} already")
