"""Connections from the node to the hosts that sandboxes may reach: looked up once, checked, and to just that address."""

import asyncio
import contextlib
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from hone.sandbox.network.egress import Address, Grant, NetworkPolicy, objection
from hone.sandbox.network.exchange import Peer, Refused
from hone.sandbox.network.http1 import MAX_HEAD_BYTES
from hone.schema.sandbox_network import Verdict, is_address, split_authority

RESOLVE_SECONDS = 10.0
CONNECT_SECONDS = 10.0
MAX_ADDRESSES = 4
NUM_RESOLVING = 32
MAPPED = "mapped"  # in place of an address, which is the node's business

Resolver = Callable[[str], Awaitable[Sequence[str]]]
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Connector = Callable[[str, int], Awaitable[Streams]]


class Upstream:
    """Finds and connects to hosts. resolve, connect: by default the machine's own.

    A name is looked up in one place, here, and what was checked is what is connected to: a name that means another
    address a moment later gains nothing.
    """

    def __init__(
        self, policy: NetworkPolicy, *, resolve: Resolver | None = None, connect: Connector | None = None
    ) -> None:
        self._policy = policy
        self._threads = ThreadPoolExecutor(NUM_RESOLVING, thread_name_prefix="hone-resolve")
        self._resolve: Resolver = resolve or self._look_up
        self._connect: Connector = connect or _connect

    def close(self) -> None:
        """Look nothing up any more."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def open(self, host: str, port: int, granted: Grant, lookups: asyncio.Semaphore) -> Peer:
        """A connection to a host that was granted; raises `Refused`. lookups: of one sandbox, so many at a time."""
        if granted.is_named and (mapped := self._policy.maps.get(host)) is not None:
            return await self._open_mapped(host, mapped)
        addresses = await self._addresses(host, granted, lookups)
        problem: Exception | None = None
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                for address in addresses[:MAX_ADDRESSES]:
                    try:
                        return Peer(*await self._connect(str(address), port), str(address))
                    except OSError as error:
                        problem = error
        except TimeoutError:
            raise Refused(Verdict.TIMEOUT, 504, f"{host}:{port} does not answer") from None
        raise Refused(Verdict.UNREACHABLE, 502, f"{host}:{port} cannot be reached: {problem}")

    async def _addresses(self, host: str, granted: Grant, lookups: asyncio.Semaphore) -> list[Address]:
        """Those of a host that may be connected to."""
        found = [host] if is_address(host) else await self._find(host, lookups)
        problems, addresses = set(), []
        for text in dict.fromkeys(found):
            address = ipaddress.ip_address(text)
            problem = objection(address, is_private=granted.is_private, is_own=_is_own(address))
            if problem:
                problems.add(problem)
            else:
                addresses.append(address)
        if addresses:
            return addresses
        what = " and ".join(sorted(problems))
        raise Refused(
            Verdict.BAD_ADDRESS, 403, f"{host} leads to {what}; a rule with +private would allow private ones"
        )

    async def _find(self, host: str, lookups: asyncio.Semaphore) -> Sequence[str]:
        try:
            async with asyncio.timeout(RESOLVE_SECONDS), lookups:
                found = [address for address in await self._resolve(host) if "%" not in address]
        except TimeoutError:
            raise Refused(Verdict.TIMEOUT, 504, f"the address of {host} was not found in time") from None
        except OSError as error:
            raise Refused(Verdict.UNREACHABLE, 502, f"{host} has no address: {error}") from None
        if not found:
            raise Refused(Verdict.UNREACHABLE, 502, f"{host} has no address")
        return found

    async def _open_mapped(self, host: str, mapped: str) -> Peer:
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                if mapped.startswith("unix:"):
                    path = mapped.removeprefix("unix:")
                    return Peer(*await asyncio.open_unix_connection(path, limit=MAX_HEAD_BYTES), MAPPED)
                name, port = split_authority(mapped)
                assert port is not None
                return Peer(*await self._connect(name.strip("[]"), port), MAPPED)
        except TimeoutError:
            raise Refused(Verdict.TIMEOUT, 504, f"{host} does not answer") from None
        except OSError:
            raise Refused(Verdict.UNREACHABLE, 502, f"{host} cannot be reached; its node maps it somewhere") from None

    async def _look_up(self, host: str) -> Sequence[str]:
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(self._threads, _getaddrinfo, host)
        return [str(entry[4][0]) for entry in found]


def _getaddrinfo(host: str) -> list[tuple[int, int, int, str, tuple[object, ...]]]:
    return list(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM))


async def _connect(host: str, port: int) -> Streams:
    return await asyncio.open_connection(host, port, limit=MAX_HEAD_BYTES)


def _is_own(address: Address) -> bool:
    """Whether this machine has this address: the kernel would then go to it from itself. Nothing is sent."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((str(address), 9))
        return bool(probe.getsockname()[0] == str(address))
    return False
