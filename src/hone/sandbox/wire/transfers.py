"""Trees of files between a sandbox of this node and a client: archives that come and go on the streams of a call."""

import asyncio
import tempfile
from typing import BinaryIO, cast

from hone.sandbox.files.archives import TreeLimits
from hone.sandbox.files.beneath import LimitExceeded
from hone.sandbox.node.sandbox import NodeSandbox
from hone.sandbox.wire.call_streams import CallStreams
from hone.sandbox.wire.flow import CHUNK_BYTES
from hone.schema.sandboxes import Transfer

SPOOL_BYTES = 4 << 20
MAX_ARCHIVE_BYTES = TreeLimits().archive_bytes


async def take_tree(sandbox: NodeSandbox, path: str, streams: CallStreams) -> Transfer:
    """Unpack what a client sends into a folder, when all of it has come: a slow client keeps nobody waiting."""
    with tempfile.SpooledTemporaryFile(SPOOL_BYTES) as spool:
        num_bytes = 0
        while data := await streams.read(CHUNK_BYTES):
            num_bytes += len(data)
            if num_bytes > MAX_ARCHIVE_BYTES:
                raise LimitExceeded(f"the archive is longer than {MAX_ARCHIVE_BYTES} bytes")
            await asyncio.to_thread(spool.write, data)
            streams.took(len(data))
        spool.seek(0)
        return await sandbox.unpack(path, cast(BinaryIO, spool))


async def give_tree(sandbox: NodeSandbox, path: str, streams: CallStreams) -> Transfer:
    """Pack what is at a path, and send it as the client takes it."""
    with tempfile.SpooledTemporaryFile(SPOOL_BYTES) as spool:
        transfer = await sandbox.pack(path, cast(BinaryIO, spool))
        spool.seek(0)
        while data := await asyncio.to_thread(spool.read, min(await streams.outputs[1].until_room(), CHUNK_BYTES)):
            streams.write(1, data)
        streams.end(1)
        await streams.outputs[1].until_taken()
        return transfer
