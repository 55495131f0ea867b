"""The door to sandboxes: on a node inside this process, or on one at an address."""

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from hone.sandbox.code import Built, CodeResult, ToolchainMissing, build_code, run_code
from hone.sandbox.errors import Busy, SandboxError, Unsupported
from hone.sandbox.files.beneath import LimitExceeded
from hone.sandbox.languages import LANGUAGES, Language
from hone.sandbox.leased import Connection, LeasedSandbox, Process
from hone.sandbox.network.ports import Forwarding
from hone.sandbox.node.node import Node
from hone.sandbox.python import session_program
from hone.sandbox.shared_nodes import embedded_node, remote_node
from hone.sandbox.wire.remote import RemoteNode
from hone.schema.sandbox_network import NetworkRecord, Verdict
from hone.schema.sandboxes import (
    RUNTIMES,
    ExecResult,
    FileEntry,
    Outcome,
    PythonResult,
    SandboxSpec,
    SandboxUsage,
    SnapshotStatus,
    Transfer,
)

__all__ = [
    "LANGUAGES",
    "Built",
    "Busy",
    "CodeResult",
    "Connection",
    "ExecResult",
    "FileEntry",
    "Language",
    "LimitExceeded",
    "NetworkRecord",
    "Outcome",
    "Process",
    "PythonResult",
    "Sandbox",
    "SandboxError",
    "SandboxSpec",
    "SandboxUsage",
    "Snapshot",
    "ToolchainMissing",
    "Transfer",
    "Unsupported",
    "Verdict",
    "build_code",
    "embedded_node",
    "run_code",
    "session_program",
]

_DEFAULT = SandboxSpec()
_FIELDS = SandboxSpec.__struct_fields__


class Snapshot:
    """The files of a sandbox as they were, which its node holds; an async context manager. Leaving it lets go of it.

    Begin sandboxes from it with `Sandbox(snapshot=...)`, or take one back to it with `Sandbox.reset`. It is gone when its
    time is over, and with its node.
    """

    def __init__(self, node: "Node | RemoteNode", status: SnapshotStatus, spec: SandboxSpec) -> None:
        self.snapshot_id = status.snapshot_id
        self.size_bytes = status.size_bytes
        """What it holds of the node's memory, some of it together with other snapshots."""
        self.spec = spec
        """Of the sandbox that it was taken of."""
        self.node = node

    async def renew(self, seconds: float) -> None:
        """It is held for so long from now."""
        if not seconds > 0:
            raise ValueError(f"{seconds:g} s is no time for a snapshot")
        await self.node.hold_snapshot(self.snapshot_id, seconds)

    async def close(self) -> None:
        """Let go of it. Sandboxes that began from it go on. Harmless when repeated."""
        await self.node.hold_snapshot(self.snapshot_id, 0)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class Sandbox:
    """An isolated machine; an async context manager. Leaving it ends everything in it.

    Example::

        async with Sandbox(memory_mb=512, cpus=1, network="none", ttl_seconds=600) as box:
            result = await box.exec(["python3", "-c", "print(6 * 7)"], timeout_seconds=10)
            await box.write("a.txt", b"...")
            await box.python("x = 1")

    Entering it asks for the sandbox and does not wait for it: the first call does, or `ready`. The arguments before `spec`
    are those of `SandboxSpec`, which may be given instead of them.

    network: "none", a loopback of its own; "off", not even that; "host", this machine's; or "allow", the hosts that `allow`
    lists, which is the default where it lists any. node: where it shall be. By default inside this process, without a daemon
    and without root; or the address of a node or a gateway, `unix:/path`, `tcp://host:port` or `tls://host:port`, with a
    `token` where that wants one, by default that in $HONE_SANDBOX_TOKEN; or a `Node`, where `owner` is whose it is. key: one
    of your own makes asking repeatable: while it lives, the same key is the same sandbox, and one whose asking was cancelled
    is there until its lease or this client is over. reconnect_seconds: for how long a connection that broke is made anew
    before all is lost; by default as long as the node waits. snapshot: what it begins from, on the snapshot's node and with
    its image.

    Relative paths start at the working folder, where programs start, too. What a program does wrong is a result. Trouble of
    the infrastructure is a `SandboxError`, whose `outcome` says which. Files raise `OSError`.
    """

    def __init__(
        self,
        image: str = "python",
        *,
        memory_mb: int = 512,
        cpus: float = 1.0,
        disk_mb: int = 256,
        max_processes: int = 256,
        runtime: str = "cell",
        network: str | None = None,
        allow: Sequence[str] = (),
        ttl_seconds: float = 600.0,
        idle_seconds: float | None = None,
        env: Mapping[str, str] | None = None,
        rollout: str = "",
        spec: SandboxSpec | None = None,
        node: "Node | str | None" = None,
        token: str | None = None,
        owner: str = "",
        key: str = "",
        reconnect_seconds: float | None = None,
        snapshot: Snapshot | None = None,
    ) -> None:
        network = network or ("allow" if allow else "none")
        if network not in ("none", "off", "host", "allow"):
            raise ValueError(f"network {network!r} of a sandbox is none of none, off, host, allow")
        if runtime not in RUNTIMES:
            raise ValueError(f"runtime {runtime!r} of a sandbox is none of {', '.join(RUNTIMES)}")
        asked = SandboxSpec(
            image=image,
            memory_mb=memory_mb,
            cpus=cpus,
            disk_mb=disk_mb,
            max_processes=max_processes,
            network=network,  # type: ignore[arg-type]
            runtime=runtime,
            ttl_seconds=ttl_seconds,
            idle_seconds=idle_seconds,
            env=dict(env or {}),
            allow=tuple(allow),
            rollout=rollout,
        )
        if spec is not None and (
            beside := [name for name in _FIELDS if getattr(asked, name) != getattr(_DEFAULT, name)]
        ):
            raise ValueError(
                f"a sandbox is given {', '.join(beside)} beside a spec, which has its own; change the spec"
            )
        self.spec = spec or asked
        if snapshot is not None and node not in (None, snapshot.node):
            raise ValueError("a sandbox from a snapshot is on the snapshot's node; leave node out")
        self._node: Node | RemoteNode | str | None = node if snapshot is None else snapshot.node
        self._snapshot_id = ""
        if snapshot is not None:
            self._snapshot_id = snapshot.snapshot_id
            self.spec = msgspec.structs.replace(self.spec, image=snapshot.spec.image)
        self._token = token
        self._owner = owner
        self._reconnect_seconds = reconnect_seconds
        self._key = key
        self._inner: LeasedSandbox | None = None
        self._home: Node | RemoteNode | None = None

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def open(self) -> None:
        """Ask for the sandbox; returns when the node has taken it on, not when it is ready. Raises `Busy`."""
        node = self._node
        if isinstance(node, str):
            node = await remote_node(node, self._token, self._reconnect_seconds)
        elif node is None:
            node = await embedded_node()
        if isinstance(node, RemoteNode):
            self._inner = await node.create(self.spec, key=self._key, snapshot_id=self._snapshot_id)
        else:
            self._inner = node.create(self.spec, key=self._key, owner=self._owner, snapshot_id=self._snapshot_id)
        self._home = node

    @property
    def sandbox_id(self) -> str:
        """Its name, which begins with the node's."""
        return self._opened.sandbox_id

    async def ready(self) -> None:
        """Wait until it is ready; raises `SandboxError` if it will not be."""
        await self._opened.ready()

    async def exec(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes = b"",
        env: Mapping[str, str] | None = None,
        cwd: str = ".",
        timeout_seconds: float = 60.0,
        kept_bytes: int = 64 << 10,
    ) -> ExecResult:
        """Run a program to its end. At the timeout it is killed with all that it started.

        kept_bytes: of each of stdout and stderr, half of it from the beginning and half from the end.
        Background processes of a program that ended by itself live on until the sandbox is closed.
        """
        return await self._opened.exec(
            argv, stdin=stdin, env=env, cwd=cwd, timeout_seconds=timeout_seconds, kept_bytes=kept_bytes
        )

    async def spawn(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str = ".",
        terminal: tuple[int, int] | None = None,
    ) -> Process:
        """Start a program to talk with; `Process.close` it. terminal: rows and columns of one for it to have.

        Read both of its streams: a program whose stderr nobody reads waits when that is full.
        """
        return await self._opened.spawn(argv, env=env, cwd=cwd, terminal=terminal)

    async def spawn_python(self, code: str, *, env: Mapping[str, str] | None = None, cwd: str = ".") -> Process:
        """What `python -c CODE` does, to talk with, in a fork of a warm interpreter. As `spawn`."""
        return await self._opened.spawn_python(code, env=env, cwd=cwd)

    async def connect(self, port: int, *, timeout_seconds: float = 0.0) -> Connection:
        """A connection to a port of its loopback that a program in it listens at; `Connection.close` it.

        Where nobody listens it is tried for so long, then it is a `ConnectionRefusedError`. No network is needed for it;
        with network="host" or "off" there is no loopback of its own to connect to.
        """
        return await self._opened.connect(port, timeout_seconds=timeout_seconds)

    def forward(self, port: int, local_port: int = 0, *, timeout_seconds: float = 0.0) -> Forwarding:
        """A port of this machine's loopback that leads to one of the sandbox; an async context manager with a `port`.

        local_port: 0 is a free one. timeout_seconds: as of `connect`, for each connection.
        """
        return Forwarding(lambda: self.connect(port, timeout_seconds=timeout_seconds), local_port)

    async def python(self, code: str, *, timeout_seconds: float = 60.0) -> PythonResult:
        """Run a snippet in the sandbox's session, which begins with the first one and keeps its variables."""
        return await self._opened.python(code, timeout_seconds=timeout_seconds)

    async def snippet(self, code: str, *, timeout_seconds: float = 60.0) -> ExecResult:
        """What `python -c CODE` does, in a fork of a warm interpreter: a fraction of the time."""
        return await self._opened.snippet(code, timeout_seconds=timeout_seconds)

    async def read(self, path: str, *, max_bytes: int = 16 << 20) -> bytes:
        """A regular file's content, if it is no longer than `max_bytes`."""
        return await self._opened.read(path, max_bytes=max_bytes)

    async def write(self, path: str, data: bytes, *, mode: int | None = None) -> None:
        """Put a file at a path, whole, with the folders above it."""
        await self._opened.write(path, data, mode=mode)

    async def list(self, path: str = ".") -> tuple[FileEntry, ...]:
        """What is in a folder, sorted by name."""
        return await self._opened.list(path)

    async def remove(self, path: str, *, is_recursive: bool = False) -> None:
        """Remove a file, or a folder if it is empty or the removal is recursive."""
        await self._opened.remove(path, is_recursive=is_recursive)

    async def stat(self, path: str, *, follows_links: bool = True) -> FileEntry:
        """What is at a path. follows_links: tell of a link's target rather than of the link."""
        return await self._opened.stat(path, follows_links=follows_links)

    async def make_folder(self, path: str) -> None:
        """Make a folder and those above it; harmless where there is one."""
        await self._opened.make_folder(path)

    async def upload(self, local: str | Path, path: str = ".") -> Transfer:
        """Copy a local folder's content, or one local file, into a folder of the sandbox, which is made if there is none.

        What is there by the same name is replaced. Links are copied as links; devices, fifos and sockets are left out.
        """
        return await self._opened.upload(Path(local), path)

    async def download(self, path: str, local: str | Path) -> Transfer:
        """Copy a folder's content, or one file, into a local folder, out of which none of what arrives leads."""
        return await self._opened.download(path, Path(local))

    async def snapshot(self, *, ttl_seconds: float = 600.0) -> Snapshot:
        """Its files as they are now, held for so long. It goes on as if nothing had happened.

        Memory of programs is not in it. Where nothing runs in the sandbox, nothing is copied; otherwise what it has
        written is, while everything in it is paused. Raises `Busy` where the node holds too much already.
        """
        status = await self._opened.snapshot(ttl_seconds=ttl_seconds)
        assert self._home is not None
        return Snapshot(self._home, status, self.spec)

    async def fork(self, count: int) -> tuple["Sandbox", ...]:
        """So many new sandboxes like this one, with its files as they are now; nothing is copied for each of them.

        They may not be ready yet. Close each.
        """
        if count < 1:
            raise ValueError(f"{count} forks of a sandbox; ask for one at least")
        async with await self.snapshot() as snapshot:
            forks = tuple(Sandbox(spec=self.spec, snapshot=snapshot, owner=self._owner) for _ in range(count))
            try:
                for fork in forks:
                    await fork.open()
            except BaseException:  # a cancellation too: undo, then pass it on
                await asyncio.shield(asyncio.gather(*(fork.close() for fork in forks)))
                raise
        return forks

    async def reset(self, snapshot: Snapshot) -> None:
        """Begin anew from a snapshot of the same node: what runs in it ends, and what it had written is gone."""
        await self._opened.reset(snapshot.snapshot_id)

    async def network_log(self) -> tuple[NetworkRecord, ...]:
        """What it asked of the network (`allow`), the last thousand requests; those under way are not among them."""
        return await self._opened.network_log()

    async def pause(self) -> None:
        """Stop everything in it where it is, memory and all. `Unsupported` without cgroup v2."""
        await self._opened.pause()

    async def resume(self) -> None:
        """Let it go on."""
        await self._opened.resume()

    async def renew(self, seconds: float) -> None:
        """The lease lasts for so long from now."""
        await self._opened.renew(seconds)

    async def usage(self) -> SandboxUsage:
        """What it has used so far; after its end, in all."""
        return await self._opened.usage()

    async def close(self) -> None:
        """End it; returns when nothing of it is left. Harmless when repeated."""
        if self._inner is not None:
            await self._inner.close()

    @property
    def _opened(self) -> LeasedSandbox:
        if self._inner is None:
            raise RuntimeError("Sandbox is an async context manager: use `async with`, or `open` first")
        return self._inner
