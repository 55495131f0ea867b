"""The server's end of the token channel: requests of local env workers come and go as token ids, many per message."""

import errno
import logging
import time
from collections.abc import Iterable

import zmq

from hone.inference.engine.engine import Engine, Finished, RequestTooLong
from hone.observability.logs import fields
from hone.schema.sampling import Answers, FinishReason, Generate, Generated, GenerateMany, Refused
from hone.schema.wire import Wire, WireError

logger = logging.getLogger(__name__)

# A client repeats itself every few seconds while it waits; one that is silent for this long is dead.
SILENT_SECONDS = 60.0
MAX_WAITING = 65536


class AddressInUseError(ValueError):
    """Another process has the port."""


class TokenServer:
    """A ZeroMQ ROUTER that feeds an engine and answers every client once per step. Belongs to the engine's thread."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.SNDHWM, 0)
        self.socket.setsockopt(zmq.RCVHWM, 0)
        self._requests_in = Wire(GenerateMany)
        self._answers_out = Wire(Answers)
        self._owners: dict[str, bytes] = {}
        self._heard: dict[bytes, float] = {}
        try:
            self.socket.bind(address)
        except zmq.ZMQError as error:
            self.close()
            if error.errno in (errno.EADDRINUSE, errno.EACCES, errno.EADDRNOTAVAIL):
                raise AddressInUseError(f"cannot bind the token channel to {address}: {error}") from error
            raise

    def receive(self, engine: Engine) -> None:
        """Take what has arrived: new requests, repeated ones, cancellations."""
        while self.socket.poll(0):
            client, data = self.socket.recv_multipart(zmq.NOBLOCK)
            self._heard[client] = time.monotonic()
            try:
                message: GenerateMany = self._requests_in.decode(data)
            except WireError as error:
                logger.warning("unreadable message on the token channel", extra=fields(error=str(error)))
                continue
            answers = Answers([], [])
            for request in message.requests:
                self._add(engine, client, request, answers)
            for cancel in message.cancels:
                self._cancel(engine, client, cancel.request_id)
            if answers.generated or answers.refused:
                self._send(client, answers)

    def answer(self, finished: Iterable[Finished]) -> list[Finished]:
        """Send what is finished to those who asked for it; returns what nobody here asked for."""
        foreign: list[Finished] = []
        by_client: dict[bytes, Answers] = {}
        for completion in finished:
            client = self._owners.pop(completion.generated.request_id, None)
            if client is None:
                foreign.append(completion)
                continue
            answers = by_client.setdefault(client, Answers([], []))
            if completion.failure is None:
                answers.generated.append(completion.generated)
            else:
                answers.refused.append(Refused(completion.generated.request_id, completion.failure, retry=False))
        for client, answers in by_client.items():
            self._send(client, answers)
        return foreign

    def drop_silent(self, engine: Engine) -> None:
        """Cancel what clients asked for that are gone."""
        oldest = time.monotonic() - SILENT_SECONDS
        gone = {client for client, heard in self._heard.items() if heard < oldest}
        if not gone:
            return
        abandoned = [request_id for request_id, client in self._owners.items() if client in gone]
        for request_id in abandoned:
            engine.cancel(request_id)
            del self._owners[request_id]
        for client in gone:
            del self._heard[client]
        if abandoned:
            logger.warning("clients of the token channel are gone", extra=fields(cancelled=len(abandoned)))

    def close(self) -> None:
        self.socket.close()
        self._context.term()

    def _add(self, engine: Engine, client: bytes, request: Generate, answers: Answers) -> None:
        request_id = request.request_id
        if request_id in self._owners:  # repeated after a lost connection: its answer goes to the new one
            self._owners[request_id] = client
            return
        if engine.num_waiting >= MAX_WAITING:
            reason = f"the engine is overloaded: {engine.num_waiting} requests wait"
            answers.refused.append(Refused(request_id, reason, retry=True))
            return
        try:
            engine.add(request)
        except RequestTooLong as error:  # for a rollout a full context is an end like any other
            logger.debug("prompt fills the context", extra=fields(error=str(error)))
            answers.generated.append(Generated(request_id, [], [], [], FinishReason.LENGTH))
        except ValueError as error:
            answers.refused.append(Refused(request_id, str(error), retry=False))
        else:
            self._owners[request_id] = client

    def _cancel(self, engine: Engine, client: bytes, request_id: str) -> None:
        if self._owners.get(request_id) == client:
            del self._owners[request_id]
            engine.cancel(request_id)

    def _send(self, client: bytes, answers: Answers) -> None:
        # A client that is not connected any more will ask again; ROUTER drops what it cannot deliver.
        self.socket.send_multipart([client, self._answers_out.encode(answers)], zmq.NOBLOCK)
