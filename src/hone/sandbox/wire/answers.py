"""What a client of a node asks for, done on the node's sandboxes: one case for each call."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hone.sandbox.errors import SandboxError
from hone.sandbox.node.node import Node
from hone.sandbox.node.sandbox import NodeSandbox
from hone.sandbox.wire.call_streams import CallStreams
from hone.sandbox.wire.conversation import converse
from hone.sandbox.wire.transfers import give_tree, take_tree
from hone.schema import sandbox_calls as calls


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks. sees_all: everybody's sandboxes, not only those of this owner."""

    owner: str
    sees_all: bool = False


async def answer(
    node: Node, caller: Caller, message: Any, streams: CallStreams, created: Callable[[NodeSandbox], None]
) -> Any:
    """The result of a call. created: is told of every sandbox that was asked for."""
    match message:
        case calls.Create(_, spec, key, snapshot_id):
            if snapshot_id:
                _check_snapshot(node, caller, snapshot_id)
            sandbox = node.create(spec, key=key, owner=caller.owner, snapshot_id=snapshot_id)
            created(sandbox)
            return sandbox.sandbox_id
        case calls.Status():
            return node.sandboxes(None if caller.sees_all else caller.owner)
        case calls.Statistics():
            return node.statistics()
        case calls.Usage(_, sandbox_id):
            return node.usage(sandbox_id, None if caller.sees_all else caller.owner)
        case calls.HoldSnapshot(_, snapshot_id, seconds):
            _check_snapshot(node, caller, snapshot_id)
            return await node.hold_snapshot(snapshot_id, seconds)
        case calls.Report() | calls.Drain() if not caller.sees_all:
            raise ValueError("this is for those who see everybody's sandboxes; a gateway's token will do")
        case calls.Report():
            return node.report()
        case calls.Drain(_, name, is_draining):
            if name not in ("", node.name, node.prefix.rstrip(".")):
                raise ValueError(f"this is the node {node.name}, not {name}")
            return node.drain(is_draining)
        case calls.Reset(_, _, snapshot_id):
            _check_snapshot(node, caller, snapshot_id)
    return await _answer_in(_find(node, caller, message.sandbox_id), message, streams)


def _check_snapshot(node: Node, caller: Caller, snapshot_id: str) -> None:
    """One that is gone is found to be so elsewhere."""
    owner = node.snapshots.owner(snapshot_id)
    if owner is not None and not caller.sees_all and owner != caller.owner:
        raise SandboxError(f"{snapshot_id}: there is no such snapshot (any more)")


def _find(node: Node, caller: Caller, sandbox_id: str) -> NodeSandbox:
    sandbox = node.sandbox(sandbox_id)
    if not caller.sees_all and sandbox.lease.owner != caller.owner:
        raise SandboxError(f"{sandbox_id}: there is no such sandbox (any more)")
    return sandbox


async def _answer_in(sandbox: NodeSandbox, message: Any, streams: CallStreams) -> Any:
    match message:
        case calls.UntilReady():
            return await sandbox.ready()
        case calls.Exec(_, _, argv, stdin, env, cwd, timeout_seconds, kept_bytes):
            return await sandbox.exec(
                argv, stdin=stdin, env=env, cwd=cwd, timeout_seconds=timeout_seconds, kept_bytes=kept_bytes
            )
        case calls.Spawn(call, _, argv, env, cwd, size):
            terminal = (size[0], size[1]) if size else None
            process = await sandbox.spawn(argv, env=env, cwd=cwd, terminal=terminal)
            return await converse(call, process, streams)
        case calls.SpawnPython(call, _, code, env, cwd):
            return await converse(call, await sandbox.spawn_python(code, env=env, cwd=cwd), streams)
        case calls.Dial(call, _, port, timeout_seconds):
            return await converse(call, await sandbox.connect(port, timeout_seconds=timeout_seconds), streams)
        case calls.Python(_, _, code, is_session, timeout_seconds):
            run = sandbox.python if is_session else sandbox.snippet
            return await run(code, timeout_seconds=timeout_seconds)
        case calls.Read(_, _, path, max_bytes):
            return await sandbox.read(path, max_bytes=max_bytes)
        case calls.Write(_, _, path, data, mode):
            return await sandbox.write(path, data, mode=mode)
        case calls.List(_, _, path):
            return await sandbox.list(path)
        case calls.Remove(_, _, path, is_recursive):
            return await sandbox.remove(path, is_recursive=is_recursive)
        case calls.Pause(_, _, is_paused):
            return await (sandbox.pause() if is_paused else sandbox.resume())
        case calls.Stat(_, _, path, follows_links):
            return await sandbox.stat(path, follows_links=follows_links)
        case calls.MakeFolder(_, _, path):
            return await sandbox.make_folder(path)
        case calls.Upload(_, _, path):
            return await take_tree(sandbox, path, streams)
        case calls.Download(_, _, path):
            return await give_tree(sandbox, path, streams)
        case calls.TakeSnapshot(_, _, ttl_seconds):
            return await sandbox.snapshot(ttl_seconds=ttl_seconds)
        case calls.Reset(_, _, snapshot_id):
            return await sandbox.reset(snapshot_id)
        case calls.ReadNetworkLog():
            return await sandbox.network_log()
        case calls.Renew(_, _, seconds):
            return await sandbox.renew(seconds)
        case calls.Destroy():
            await sandbox.close()
            return sandbox.used()
    raise ValueError(f"a call that this node does not know: {type(message).__name__}")
