"""An MCP server for tests, made with the package's own server: `python mcp_server.py [PORT]`, without a port over stdio."""

import os
import sys
import time

from mcp import MCPError
from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ToolError

server = MCPServer("testing", log_level="CRITICAL")
notes: list[str] = []


@server.tool()
def add(left: int, right: int = 1) -> int:
    """The sum of two numbers."""
    return left + right


@server.tool()
def note(text: str) -> str:
    """Note a text and tell all notes so far."""
    notes.append(text)
    return ", ".join(notes)


@server.tool()
def fail() -> str:
    """Raise an error."""
    raise ToolError("it broke")


@server.tool()
def die() -> str:
    """End the server in the middle of the call."""
    os._exit(1)


@server.tool()
def sleep(seconds: float) -> str:
    """Sleep."""
    time.sleep(seconds)
    return "slept"


@server.tool()
async def hang() -> str:
    """Block the whole server, without ending it."""
    time.sleep(60)
    return "continued"


@server.tool()
def refuse() -> str:
    """Raise an error of the protocol."""
    raise MCPError(-32603, "no more today")


@server.tool()
def environment(name: str) -> str:
    """The value of an environment variable."""
    return os.environ.get(name, "unset")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        server.run(transport="streamable-http", host="127.0.0.1", port=int(sys.argv[1]))
    else:
        server.run(transport="stdio")
