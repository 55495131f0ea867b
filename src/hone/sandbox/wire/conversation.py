"""A spawned program, or a connection to a port, whose streams go to a client."""

import asyncio
import contextlib

from hone.sandbox.cells.programs import Process
from hone.sandbox.errors import SandboxError
from hone.sandbox.network.ports import Connection
from hone.sandbox.wire.call_streams import CallStreams
from hone.sandbox.wire.flow import CHUNK_BYTES
from hone.sandbox.wire.frames import failed
from hone.schema import sandbox_calls as calls

DRAIN_SECONDS = 0.2


async def converse(call: int, process: Process | Connection, streams: CallStreams) -> int:
    """Carry the streams of a program, or of a connection, until it has ended and its output is sent.

    What its children write later is not sent. Returns its exit code. Cancelled, it kills the program.
    """
    loop = asyncio.get_running_loop()
    streams.signal = lambda number: _signal(process, number)
    streams.resize = lambda rows, columns: _resize(process, rows, columns)
    streams.tell(calls.Data(call, 0, b""))
    pumps = [loop.create_task(_pump(process, streams, number)) for number in streams.outputs]
    feeding = loop.create_task(_feed(call, process, streams))
    try:
        code = await process.wait()
        streams.tell(calls.Data(call, 3, str(code).encode()))
        while not all(pump.done() for pump in pumps):
            done, _ = await asyncio.wait(pumps, timeout=DRAIN_SECONDS)
            if len(done) < len(pumps) and all(output.room for output in streams.outputs.values()):
                break  # something in the background holds them open
        return code
    finally:
        streams.signal = lambda _: None
        streams.resize = lambda *_: None
        for task in (feeding, *pumps):
            task.cancel()
        await asyncio.wait([feeding, *pumps])
        await process.close()


async def _feed(call: int, process: Process | Connection, streams: CallStreams) -> None:
    while data := await streams.read(CHUNK_BYTES):
        try:
            await process.write(data)
        except OSError as error:
            streams.tell(failed(call, BrokenPipeError(f"nobody reads: {error}")))
            return
        streams.took(len(data))
    process.end_input()


async def _pump(process: Process | Connection, streams: CallStreams, number: int) -> None:
    read = process.read if number == 1 else process.read_error
    while data := await read(min(await streams.outputs[number].until_room(), CHUNK_BYTES)):
        streams.write(number, data)
    streams.end(number)


def _signal(process: Process | Connection, number: int) -> None:
    with contextlib.suppress(SandboxError):  # its end will be told otherwise
        if number:
            process.signal(number)
        else:
            process.kill()


def _resize(process: Process | Connection, rows: int, columns: int) -> None:
    with contextlib.suppress(OSError):
        process.resize(rows, columns)
