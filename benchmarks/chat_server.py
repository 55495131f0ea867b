"""A mock of an OpenAI-compatible chat server: the same answer to every completion request, after a fixed latency.

Start it as `python benchmarks/chat_server.py LATENCY_SECONDS`; its first line on standard output is its port. It reads
requests as HTTP/1.1 with Content-Length and keeps connections open. Written on bare asyncio protocols, so that it is
not what a benchmark of clients measures.
"""

import asyncio
import json
import sys

ANSWER = {
    "id": "chatcmpl-mock",
    "object": "chat.completion",
    "created": 0,
    "model": "mock",
    "choices": [
        {"index": 0, "message": {"role": "assistant", "content": "The answer is 42. " * 8}, "finish_reason": "stop"}
    ],
    "usage": {"prompt_tokens": 64, "completion_tokens": 48, "total_tokens": 112},
}
BODY = json.dumps(ANSWER).encode()
RESPONSE = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(BODY), BODY)
BACKLOG = 4096


class Connection(asyncio.Protocol):
    """Answers the requests of one connection, each `latency` seconds after it is complete."""

    def __init__(self, latency):
        self.latency = latency
        self.received = b""

    def connection_made(self, transport):
        self.transport = transport
        self.loop = asyncio.get_running_loop()

    def data_received(self, data):
        self.received += data
        while (end := self.received.find(b"\r\n\r\n")) >= 0:
            head = self.received[:end].lower()
            start = head.find(b"content-length:")
            length = int(head[start + 15 :].split(b"\r\n", 1)[0]) if start >= 0 else 0
            if len(self.received) < end + 4 + length:
                return
            self.received = self.received[end + 4 + length :]
            self.loop.call_later(self.latency, self.answer)

    def answer(self):
        if not self.transport.is_closing():
            self.transport.write(RESPONSE)


async def serve(latency):
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(latency), "127.0.0.1", 0, backlog=BACKLOG)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve(float(sys.argv[1])))
