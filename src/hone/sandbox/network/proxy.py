"""The proxy through which a sandbox reaches the hosts that it may: on the node's side of a socket in the sandbox."""

import asyncio
import contextlib
import logging
import socket
import time
from collections import deque
from dataclasses import dataclass

from hone.sandbox.network.egress import NetworkPolicy, grant
from hone.sandbox.network.exchange import END_OF_HEAD, Meter, Peer, Refused, exchange, tunnel
from hone.sandbox.network.http1 import MAX_HEAD_BYTES, BadMessage, Request, parse_request, refusal
from hone.sandbox.network.network_log import NetworkLog
from hone.sandbox.network.upstream import Connector, Resolver, Upstream
from hone.sandbox.readiness import until_ready
from hone.schema.sandbox_network import DEFAULT_PORTS, DENIALS, NetworkRecord, Verdict, parse_rules

HEAD_SECONDS = 10.0
SOCKET_BYTES = 128 << 10
MAX_WAITING = 64
MAX_LOOKUPS = 4
MAX_RECORDS = 1000
MAX_RULES_TOLD = 10

logger = logging.getLogger("hone.sandbox.network.proxy")


class Gate:
    """What the proxies of a node have in common: its policy, its way to hosts, its log, and how many connections it has."""

    def __init__(
        self,
        policy: NetworkPolicy,
        log: NetworkLog,
        *,
        resolve: Resolver | None = None,
        connect: Connector | None = None,
    ) -> None:
        self.policy = policy
        self.log = log
        self.upstream = Upstream(policy, resolve=resolve, connect=connect)
        self.num_connections = 0

    def statistics(self) -> dict[str, float]:
        """Numbers to watch."""
        counts = self.log.counts
        return {
            "sandbox/network_connections": self.num_connections,
            "sandbox/network_requests": sum(counts.values()),
            "sandbox/network_denied": sum(counts[verdict] for verdict in DENIALS),
            "sandbox/network_bytes_up": self.log.bytes_up,
            "sandbox/network_bytes_down": self.log.bytes_down,
            "sandbox/network_unwritten": self.log.num_unwritten,
        }

    def close(self) -> None:
        """To be called when its proxies are closed."""
        self.upstream.close()
        self.log.close()


class Proxy:
    """The proxy of one sandbox, whose programs connect to the listener; that is the proxy's own from now on.

    allow: rules as in `SandboxSpec`. records: where its requests are told. Whoever is at the other end is hostile: every
    wait for it has a deadline, and what is kept of it a bound.
    """

    def __init__(
        self,
        gate: Gate,
        sandbox_id: str,
        owner: str,
        allow: tuple[str, ...],
        listener: socket.socket,
        records: deque[NetworkRecord],
    ) -> None:
        self._records = records
        self._gate = gate
        self._sandbox_id = sandbox_id
        self._owner = owner
        self._allow = allow
        self._rules = parse_rules(allow)
        self._listener = listener
        self._places = asyncio.Semaphore(gate.policy.max_sandbox_connections)
        self._pace = _Pace(gate.policy.max_requests_per_second, ahead_seconds=1)
        self._byte_pace = _Pace(gate.policy.max_bytes_per_second, ahead_seconds=0.1)
        self._lookups = asyncio.Semaphore(MAX_LOOKUPS)
        self._num_bytes = 0
        self._connections: set[asyncio.Task[None]] = set()
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):  # those of what is accepted, too
            listener.setsockopt(socket.SOL_SOCKET, option, SOCKET_BYTES)
        self._accepting = asyncio.get_running_loop().create_task(self._accept())

    async def close(self) -> None:
        """Hang up everywhere; returns when nothing of it is left."""
        self._accepting.cancel()
        await asyncio.wait([self._accepting])
        connections = list(self._connections)
        for connection in connections:
            connection.cancel()
        if connections:
            await asyncio.wait(connections)
        self._listener.close()

    async def _accept(self) -> None:
        """As many connections as there are places for; the others wait in the sandbox's own network."""
        loop = asyncio.get_running_loop()
        while True:
            await self._places.acquire()
            await until_ready(self._listener.fileno(), loop.add_reader, loop.remove_reader)
            try:
                connection, _ = self._listener.accept()
            except OSError:  # it hung up already, or this process has no descriptors left
                self._places.release()
                await asyncio.sleep(0.05)
                continue
            connection.setblocking(False)
            serving = loop.create_task(self._serve(connection))
            self._connections.add(serving)
            serving.add_done_callback(self._over)

    def _over(self, serving: asyncio.Task[None]) -> None:
        self._connections.discard(serving)
        self._places.release()

    async def _serve(self, connection: socket.socket) -> None:
        self._gate.num_connections += 1
        client = None
        try:
            client = Peer(*await asyncio.open_connection(sock=connection, limit=MAX_HEAD_BYTES))
            while await self._answer(client):
                pass
            await client.linger()
        except OSError:
            pass  # it hung up
        except Exception:  # whatever it is, it is this connection's alone
            logger.exception("%s: a connection of its proxy failed", self._sandbox_id)
        finally:
            self._gate.num_connections -= 1
            if client is not None:
                await client.hang_up()
            else:
                connection.close()

    async def _answer(self, client: Peer) -> bool:
        """One request, checked for itself; whether there may be another on this connection."""
        await self._pace.turn()
        if not (first := await self._first_byte(client)):
            return False
        begun = time.monotonic()
        entry = _Entry(Meter(self._gate.policy.idle_seconds, self._spend))
        try:
            request = await _read_request(first, client)
            entry.method, entry.host, entry.port = request.method, request.host, request.port
            return await self._carry_out(request, client, entry)
        except Refused as error:
            shortly = error.problem.partition(" (")[0] if error.verdict is Verdict.NO_RULE else ""
            entry.verdict, entry.problem = error.verdict, shortly or error.problem
            if not entry.meter.is_answered:
                client.writer.write(refusal(error.status, error.problem, shortly))
        except OSError as error:
            entry.problem = str(error) or "it hung up"
        finally:
            self._record(entry, time.monotonic() - begun)
        return False

    async def _first_byte(self, client: Peer) -> bytes:
        """Of a request; empty where none comes: that is nobody's fault and no request."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(HEAD_SECONDS):
                return await client.reader.read(1)
        return b""

    async def _carry_out(self, request: Request, client: Peer, entry: "_Entry") -> bool:
        granted = grant(self._rules, request.host, request.port)
        if granted is None:
            raise Refused(Verdict.NO_RULE, 403, self._missing(request))
        if self._gate.num_connections > self._gate.policy.max_connections:
            raise Refused(Verdict.LIMIT, 503, "the node has as many connections as it may; try again later")
        await self._spend(0)
        host = await self._gate.upstream.open(request.host, request.port, granted, self._lookups)
        entry.address = host.address
        try:
            async with entry.meter as meter:
                if not request.is_tunnel:
                    return await exchange(request, client, host, meter)
                await tunnel(client, host, request.host, meter, is_tcp=granted.is_tcp)
                return False
        except TimeoutError:
            problem = f"{request.host} was silent for {self._gate.policy.idle_seconds:g} s"
            raise Refused(Verdict.TIMEOUT, 504, problem) from None
        except BadMessage as error:
            raise Refused(Verdict.BAD_REQUEST, error.status, str(error)) from None
        finally:
            await host.hang_up()

    def _missing(self, request: Request) -> str:
        host = f"[{request.host}]" if ":" in request.host else request.host
        rule = host if request.port in DEFAULT_PORTS else f"{host}:{request.port}"
        told = ", ".join(self._allow[:MAX_RULES_TOLD]) + (", ..." if len(self._allow) > MAX_RULES_TOLD else "")
        return f"{host}:{request.port} is not on the allow-list of this sandbox ({told}); it takes the rule {rule}"

    async def _spend(self, num_bytes: int) -> None:
        self._num_bytes += num_bytes
        limit = self._gate.policy.max_bytes
        if limit is not None and self._num_bytes > limit:
            raise Refused(Verdict.LIMIT, 403, f"this sandbox has used up the {limit} bytes that it may have carried")
        await self._byte_pace.turn(num_bytes)

    def _record(self, entry: "_Entry", seconds: float) -> None:
        record = NetworkRecord(
            time=time.time(),
            sandbox_id=self._sandbox_id,
            owner=self._owner,
            method=entry.method,
            host=entry.host,
            port=entry.port,
            verdict=entry.verdict,
            address=entry.address,
            problem=entry.problem,
            bytes_up=entry.meter.num_up,
            bytes_down=entry.meter.num_down,
            seconds=seconds,
        )
        self._records.append(record)
        self._gate.log.add(record)


@dataclass(slots=True)
class _Entry:
    """What will be recorded of a request."""

    meter: Meter
    method: str = ""
    host: str = ""
    port: int = 0
    address: str = ""
    verdict: Verdict = Verdict.ALLOWED
    problem: str = ""


class _Pace:
    """So much a second. ahead_seconds: what of it may come at once."""

    def __init__(self, per_second: float, *, ahead_seconds: float) -> None:
        self._per_second = per_second
        self._ahead_seconds = ahead_seconds
        self._next = 0.0

    async def turn(self, amount: float = 1) -> None:
        """Wait until so much may come."""
        now = time.monotonic()
        self._next = max(self._next, now - self._ahead_seconds) + amount / self._per_second
        if self._next > now:
            await asyncio.sleep(self._next - now)


async def _read_request(first: bytes, client: Peer) -> Request:
    try:
        async with asyncio.timeout(HEAD_SECONDS):
            return parse_request(first + await client.reader.readuntil(END_OF_HEAD))
    except TimeoutError:
        raise Refused(Verdict.BAD_REQUEST, 408, f"no whole request came within {HEAD_SECONDS:g} s") from None
    except asyncio.LimitOverrunError:
        raise Refused(Verdict.BAD_REQUEST, 431, f"a request head of more than {MAX_HEAD_BYTES} bytes") from None
    except asyncio.IncompleteReadError:
        raise Refused(Verdict.BAD_REQUEST, 400, "half a request") from None
    except BadMessage as error:
        raise Refused(Verdict.BAD_REQUEST, error.status, str(error)) from None
