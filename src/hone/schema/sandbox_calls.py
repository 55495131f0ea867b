"""What the clients of a sandbox node and the node say to one another, over one stream for everything.

A call has a number that its client chose; no other call of the session has it. Every call ends with one `Done` or
`Failed`, also one that was cancelled, and the client says `Received`: only then does the node forget it. What a call
streams is under credit: nobody sends more bytes than the other side granted, so that one slow reader stops only its own
stream. Credit says what was taken, too: what was not is kept by its sender.

A connection may break; calls belong to the session. Over the next connection, with the same `Hello`, the client says
`Resume` of every call without an answer that is about a sandbox, and sends the others again, which are the same when they
come twice. A call says nothing over a connection before it was asked or resumed there. The node answers `Resumed`, and
both go on where the other side stopped; a call that the node never heard of is sent again as a whole.
"""

import msgspec

from hone.schema.sandboxes import SandboxSpec

VERSION = 2
MIN_SESSION_LENGTH = 32
CONTROL = 4
"""The stream whose credit counts the signals and sizes that came, one for each."""


class _Message(msgspec.Struct, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    pass


class Hello(_Message, frozen=True):
    """The first message. session: a secret of the client, at least `MIN_SESSION_LENGTH` long, by which it comes back.

    owner: on whose behalf a gateway speaks, which only those may do who are trusted with it.
    """

    version: int
    session: str
    token: str
    owner: str = ""


class Create(_Message, frozen=True):
    """Answered with the id at once; the sandbox may not be ready yet. key: asked twice, it is the same sandbox.

    snapshot_id: of what it begins from, on the node whose prefix this has. Empty: from its image alone.
    """

    call: int
    spec: SandboxSpec
    key: str
    snapshot_id: str = ""


class UntilReady(_Message, frozen=True):
    """Answered when the sandbox is ready."""

    call: int
    sandbox_id: str


class Exec(_Message, frozen=True):
    """As `Sandbox.exec` of `hone.sandbox.client`."""

    call: int
    sandbox_id: str
    argv: list[str]
    stdin: bytes
    env: dict[str, str]
    cwd: str
    timeout_seconds: float
    kept_bytes: int


class Spawn(_Message, frozen=True):
    """Start a program to talk with; the call ends with the program, its result is the exit code.

    terminal: rows and columns of one, or none.
    """

    call: int
    sandbox_id: str
    argv: list[str]
    env: dict[str, str]
    cwd: str
    terminal: list[int] | None


class Signal(_Message, frozen=True):
    """A signal for the process group of a spawned program; 0 kills it and all that it started."""

    call: int
    number: int


class Resize(_Message, frozen=True):
    """A spawned program's terminal has another size."""

    call: int
    rows: int
    columns: int


class Python(_Message, frozen=True):
    """A snippet for the sandbox's session, or for a fork of the warm interpreter (`ExecResult`)."""

    call: int
    sandbox_id: str
    code: str
    is_session: bool
    timeout_seconds: float


class Read(_Message, frozen=True):
    """A file's content."""

    call: int
    sandbox_id: str
    path: str
    max_bytes: int


class Write(_Message, frozen=True):
    """A file as a whole. mode: permission bits, or those that it had."""

    call: int
    sandbox_id: str
    path: str
    data: bytes
    mode: int | None


class List(_Message, frozen=True):
    """What is in a folder."""

    call: int
    sandbox_id: str
    path: str


class Remove(_Message, frozen=True):
    """A file, or a folder."""

    call: int
    sandbox_id: str
    path: str
    is_recursive: bool


class Pause(_Message, frozen=True):
    """Stop everything in a sandbox where it is, or let it go on."""

    call: int
    sandbox_id: str
    is_paused: bool


class Renew(_Message, frozen=True):
    """The lease lasts for so long from now."""

    call: int
    sandbox_id: str
    seconds: float


class Destroy(_Message, frozen=True):
    """End a sandbox; answered with what it used in all."""

    call: int
    sandbox_id: str


class Status(_Message, frozen=True):
    """The sandboxes of the caller, or all of them for those who may see them."""

    call: int


class Statistics(_Message, frozen=True):
    """The node's numbers."""

    call: int


class Cancel(_Message, frozen=True):
    """Nobody waits for this call any more. A program that it runs is killed; then it has failed, of kind cancelled."""

    call: int


class Ping(_Message, frozen=True):
    """Answered with the same."""

    number: int


class Data(_Message, frozen=True):
    """A piece of a stream of a call, empty at its end. stream: 0 is a program's input, 1 its output, 2 its errors.

    From the node, 0 says that the program runs, and 3 has its exit code as text.
    """

    call: int
    stream: int
    data: bytes


class Credit(_Message, frozen=True):
    """So many bytes more may come on this stream."""

    call: int
    stream: int
    num_bytes: int


class Welcome(_Message, frozen=True):
    """The answer to `Hello`. prefix: of the ids of the node's sandboxes; another one means that the node was restarted.

    grace_seconds: how long the session lives without a connection. is_relay: nodes are behind it, which live on while it
    does not. has_sandboxes: whether the node has some that end with the session.
    """

    prefix: str
    grace_seconds: float
    is_relay: bool = False
    has_sandboxes: bool = False


class Done(_Message, frozen=True):
    """How a call ended. result: encoded; its type follows from the call."""

    call: int
    result: msgspec.Raw


class Failed(_Message, frozen=True):
    """Why a call did not do what it should. kind: sandbox, busy, value, cancelled, or os with an error number; with
    broken_pipe the call goes on, only nobody reads its input. Call 0 is the connection's.

    outcome: of trouble with the sandbox. number: the error number, or of busy the seconds to wait.
    """

    call: int
    kind: str
    message: str
    outcome: str = ""
    number: float = 0.0


class Resume(_Message, frozen=True):
    """A call goes on over this connection. received: how many bytes came of streams 1 and 2. taken: how many were read.

    attempt: a number that the answer has, too: of several answers, the one to the last question counts.
    """

    call: int
    sandbox_id: str
    received: list[int]
    taken: list[int]
    attempt: int


class Resumed(_Message, frozen=True):
    """The answer to `Resume`, and the first word of the call over this connection.

    is_known: if not, the node never heard of it: send it again, with its whole input. received: how many bytes of input
    came. taken: how many of them the program has. num_controls: how many signals and sizes came.
    """

    call: int
    is_known: bool
    received: int
    taken: int
    num_controls: int
    attempt: int


class Received(_Message, frozen=True):
    """The answer of this call came; nobody needs it any more."""

    call: int


class Interrupted(_Message, frozen=True):
    """From a relay: its connection to the node with this prefix broke. Resume the calls of its sandboxes."""

    prefix: str


class Report(_Message, frozen=True):
    """How a node is (`NodeReport` of `hone.schema.sandbox_nodes`), for those who see everybody's sandboxes."""

    call: int


class Drain(_Message, frozen=True):
    """A node shall take no new sandboxes, or take them again. Answered with the number of those that it still has.

    node: its name, or the beginning of its sandboxes' ids; at the node itself, empty will do.
    """

    call: int
    node: str
    is_draining: bool


class Usage(_Message, frozen=True):
    """What a sandbox has used; one that ended not too long ago, in all."""

    call: int
    sandbox_id: str


class Stat(_Message, frozen=True):
    """What is at a path."""

    call: int
    sandbox_id: str
    path: str
    follows_links: bool


class MakeFolder(_Message, frozen=True):
    """A folder, with those above it."""

    call: int
    sandbox_id: str
    path: str


class Upload(_Message, frozen=True):
    """A tar archive that comes on stream 0, to be unpacked into a folder."""

    call: int
    sandbox_id: str
    path: str


class Download(_Message, frozen=True):
    """A folder's content, or one file, as a tar archive on stream 1."""

    call: int
    sandbox_id: str
    path: str


class TakeSnapshot(_Message, frozen=True):
    """The files of a sandbox as they are now, held for so long (`SnapshotStatus`)."""

    call: int
    sandbox_id: str
    ttl_seconds: float


class HoldSnapshot(_Message, frozen=True):
    """Hold a snapshot for so long from now; zero: let go of it. sandbox_id: the snapshot's, whose node answers."""

    call: int
    sandbox_id: str
    seconds: float


class Reset(_Message, frozen=True):
    """A sandbox begins anew from a snapshot."""

    call: int
    sandbox_id: str
    snapshot_id: str


class ReadNetworkLog(_Message, frozen=True):
    """What a sandbox asked of the network."""

    call: int
    sandbox_id: str


class SpawnPython(_Message, frozen=True):
    """As `Spawn`, of code in a fork of the warm interpreter."""

    call: int
    sandbox_id: str
    code: str
    env: dict[str, str]
    cwd: str


class Dial(_Message, frozen=True):
    """A connection to a port of a sandbox. It has the streams of a program: its errors say what broke the connection.

    timeout_seconds: for so long it is tried while nobody listens.
    """

    call: int
    sandbox_id: str
    port: int
    timeout_seconds: float


Streamed = Spawn | SpawnPython | Upload | Download | Dial
"""The calls that have streams (a union)."""


def sandbox_of(message: msgspec.Struct) -> str:
    """The sandbox that a call is about. Empty: none, and then it does no harm to ask twice."""
    return getattr(message, "sandbox_id", "")


ToNode = (
    Hello
    | Create
    | UntilReady
    | Exec
    | Spawn
    | Signal
    | Resize
    | Python
    | Read
    | Write
    | List
    | Remove
    | Pause
    | Renew
    | Destroy
    | Status
    | Statistics
    | Cancel
    | Ping
    | Data
    | Credit
    | Resume
    | Received
    | Report
    | Drain
    | Usage
    | Stat
    | MakeFolder
    | Upload
    | Download
    | TakeSnapshot
    | HoldSnapshot
    | Reset
    | ReadNetworkLog
    | SpawnPython
    | Dial
)
ToClient = Welcome | Done | Failed | Data | Credit | Ping | Resumed | Interrupted
