"""A teacher over HTTP: an OpenAI-compatible server in a thread, which says what a function of the request tells it."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[dict[str, Any]], dict[str, Any]]


@contextlib.contextmanager
def teacher(answer: Answer) -> Iterator[str]:
    """Serves `answer` (request body to assistant message) while the body runs; yields the base URL.

    A message with a key `status` is an error with that HTTP status.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            message = answer(body)
            status = message.pop("status", 200)
            choice = {"message": {"role": "assistant", **message}, "finish_reason": "stop"}
            usage = {"prompt_tokens": 10, "completion_tokens": 5}
            told = {"choices": [choice], "usage": usage} if status == 200 else {"error": {"message": "on fire"}}
            data = json.dumps(told).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def shopper(body: dict[str, Any]) -> dict[str, Any]:
    """Solves the tasks of the scaffold of kind tool: asks for every price at once, then adds up."""
    messages = body["messages"]
    basket = dict(reversed(part.split()) for part in messages[0]["content"].split("? ")[1].split(".")[0].split(", "))
    if messages[-1]["role"] == "user":
        calls = [
            {
                "id": f"call_{item}",
                "type": "function",
                "function": {"name": "price", "arguments": json.dumps({"item": item})},
            }
            for item in basket
        ]
        return {"content": "", "tool_calls": calls}
    prices = {message["tool_call_id"].removeprefix("call_"): int(message["content"]) for message in messages[2:]}
    return {"content": str(sum(int(count) * prices[item] for item, count in basket.items()))}
