"""The network of one leased sandbox: its way out through a proxy, and the connections to its ports."""

from collections import deque
from collections.abc import Iterable, Mapping

from hone.sandbox.cells.cell import Cell
from hone.sandbox.errors import Busy
from hone.sandbox.network.egress import PROXY_PORT, proxy_variables
from hone.sandbox.network.ports import MAX_CONNECTIONS, Connection, dial
from hone.sandbox.network.proxy import MAX_RECORDS, MAX_WAITING, Gate, Proxy
from hone.sandbox.node.lifecycle import Lease
from hone.schema.sandbox_network import NetworkRecord


class SandboxNetwork:
    """What a lease has of the network while it has one cell. gate: of its node. records: of its requests before."""

    def __init__(self, gate: Gate, lease: Lease, records: Iterable[NetworkRecord] = ()) -> None:
        self.records = deque(records, MAX_RECORDS)
        self.is_over = False
        self._gate = gate
        self._lease = lease
        self._proxy: Proxy | None = None
        self._connections: set[Connection] = set()

    @property
    def has_list(self) -> bool:
        """Whether there are hosts that it may reach."""
        return self._lease.spec.network == "allow"

    def variables(self) -> Mapping[str, str]:
        """What its programs are told by their environment."""
        return proxy_variables() if self.has_list else {}

    async def open(self, cell: Cell) -> None:
        """Open its way out, before any program of it runs. Raises `SandboxError` or `OSError`."""
        listener = await cell.listen_at(PROXY_PORT, MAX_WAITING)
        if self.is_over:
            listener.close()
            return
        lease = self._lease
        self._proxy = Proxy(self._gate, lease.sandbox_id, lease.owner, lease.spec.allow, listener, self.records)

    async def connect(self, cell: Cell, port: int, timeout_seconds: float) -> Connection:
        """A connection to a port; the network knows it until `forget`. Raises `OSError`, `Busy`."""
        if len(self._connections) >= MAX_CONNECTIONS:
            raise Busy(f"{self._lease.sandbox_id} has {MAX_CONNECTIONS} connections to its ports", 1.0)
        connection = await dial(cell, port, timeout_seconds)
        self._connections.add(connection)
        if self.is_over:
            connection.kill()
        return connection

    def forget(self, connection: Connection) -> None:
        """It has ended."""
        self._connections.discard(connection)

    def end(self) -> None:
        """The sandbox is over: break off what there is. `close` does the rest."""
        self.is_over = True
        for connection in list(self._connections):
            connection.kill()

    async def close(self) -> None:
        """Hang up; returns when nothing is left. Harmless when repeated."""
        self.end()
        if self._proxy is not None:
            await self._proxy.close()
