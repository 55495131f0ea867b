"""Messages between processes: msgpack of typed structs, unknown fields refused, a protocol version in every message."""

from typing import Any, TypeVar

import msgspec

PROTOCOL = 1

T = TypeVar("T")


class WireError(ValueError):
    """A message that is not what the receiver expects: malformed, of another protocol version, or of another type."""


class ProtocolError(WireError):
    """A message of another protocol version: its sender runs another version of hone."""


class Envelope(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What is on the wire: the protocol version, the name of the type, the encoded body."""

    protocol: int
    kind: str
    body: msgspec.Raw


class Wire:
    """Encodes and decodes the message types of one channel; anything else is refused with a `WireError`."""

    def __init__(self, *types: type[msgspec.Struct]) -> None:
        self._encoder = msgspec.msgpack.Encoder()
        self._envelope = msgspec.msgpack.Decoder(Envelope)
        self._decoders: dict[str, msgspec.msgpack.Decoder[Any]] = {
            t.__name__: msgspec.msgpack.Decoder(t) for t in types
        }

    def encode(self, message: msgspec.Struct) -> bytes:
        kind = type(message).__name__
        if kind not in self._decoders:
            raise WireError(f"{kind} does not belong on this channel, which carries {', '.join(self._decoders)}")
        return self._encoder.encode(Envelope(PROTOCOL, kind, msgspec.Raw(self._encoder.encode(message))))

    def decode(self, data: bytes) -> Any:
        try:
            envelope = self._envelope.decode(data)
            if envelope.protocol != PROTOCOL:
                raise ProtocolError(
                    f"message of protocol {envelope.protocol}, this process speaks {PROTOCOL}; run the same version of hone everywhere"
                )
            decoder = self._decoders.get(envelope.kind)
            if decoder is None:
                raise WireError(
                    f"message of type {envelope.kind!r} on a channel that carries {', '.join(self._decoders)}"
                )
            return decoder.decode(envelope.body)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise WireError(f"unreadable message of {len(data)} bytes: {error}") from error


def encode(value: object) -> bytes:
    """One value without an envelope, for files whose type the reader knows."""
    return msgspec.msgpack.encode(value)


def decode(data: bytes, kind: type[T]) -> T:
    """The inverse of `encode`; raises `WireError`."""
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise WireError(f"unreadable {kind.__name__} of {len(data)} bytes: {error}") from error
