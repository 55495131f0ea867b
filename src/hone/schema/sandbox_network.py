"""Which hosts a sandbox may reach, as its owner writes it, and what is recorded of what it tried to."""

import ipaddress
import re
from dataclasses import dataclass
from enum import StrEnum

import msgspec

MAX_RULES = 256
DEFAULT_PORTS = frozenset({80, 443})
FLAGS = ("private", "tcp")

_AUTHORITY = re.compile(r"(\[[^\[\]]*\]|[^:\[\]]*)(?::([0-9]{1,5}))?")
_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")


@dataclass(frozen=True, slots=True)
class AllowRule:
    """One entry of an allow-list, `HOST[:PORT][+private][+tcp]`.

    host: a name, or an address if just that is meant; "" is every host there is. is_wildcard: the names below `host`, at
    any depth, and not itself. port: None is 80 and 443. is_private: also where the name leads into private networks or
    to the node itself. is_tcp: tunnels may carry anything, not TLS alone.
    """

    host: str
    is_wildcard: bool = False
    port: int | None = None
    is_private: bool = False
    is_tcp: bool = False

    @classmethod
    def parse(cls, text: str) -> "AllowRule":
        """Read one; `ValueError` says what is wrong with it."""
        authority, *flags = text.split("+")
        for flag in flags:
            if flag not in FLAGS:
                raise ValueError(f"allow {text!r}: +{flag} is unknown; there are +{' and +'.join(FLAGS)}")
        try:
            name, port = split_authority(authority)
            is_wildcard = name == "*" or name.startswith("*.")
            host = "" if name == "*" else normal_host(_ascii(name[2:] if is_wildcard else name))
        except ValueError as error:
            raise ValueError(f"allow {text!r}: {error}; write HOST, *.HOST or HOST:PORT") from error
        if is_wildcard and is_address(host):
            raise ValueError(f"allow {text!r}: there are no names below an address")
        if not host and "private" in flags:
            raise ValueError(f"allow {text!r}: every host and private networks; name the hosts, or take network='host'")
        return cls(host, is_wildcard, port, "private" in flags, "tcp" in flags)

    def covers(self, host: str, port: int) -> bool:
        """Whether it is about a host, as `normal_host` writes it, and a port."""
        if port != self.port and (self.port is not None or port not in DEFAULT_PORTS):
            return False
        if not self.is_wildcard:
            return host == self.host
        return not is_address(host) and (not self.host or host.endswith("." + self.host))


class Verdict(StrEnum):
    """What became of a connection that a sandbox asked for."""

    ALLOWED = "allowed"
    NO_RULE = "no_rule"
    """No rule of its allow-list covers host and port."""
    BAD_ADDRESS = "bad_address"
    """The name leads where the rule does not let it: into a private network, or to the node."""
    BAD_NAME = "bad_name"
    """The TLS in a tunnel asks for another host, hides which one, or is no TLS."""
    BAD_REQUEST = "bad_request"
    """No request that could be understood in one way only."""
    UNREACHABLE = "unreachable"
    """The host has no address, or does not answer as a server does."""
    TIMEOUT = "timeout"
    """The host did not answer in time."""
    LIMIT = "limit"
    """The sandbox, or the node, has as many connections, or has carried as many bytes, as it may."""


DENIALS = frozenset({Verdict.NO_RULE, Verdict.BAD_ADDRESS, Verdict.BAD_NAME, Verdict.BAD_REQUEST})


class NetworkRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One request of a sandbox to its proxy. What was asked of the host, and what was said, is not recorded.

    time: seconds since 1970. method: CONNECT for a tunnel. host, port: as asked for; empty and 0 if unreadable.
    address: what was connected to, or
    "mapped" (`hone.sandbox.network.egress.NetworkPolicy.maps`). problem: why not, in words. bytes_up, bytes_down: carried to the host and back.
    """

    time: float
    sandbox_id: str
    owner: str
    method: str
    host: str
    port: int
    verdict: Verdict
    address: str = ""
    problem: str = ""
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0


def parse_rules(texts: tuple[str, ...]) -> tuple[AllowRule, ...]:
    """An allow-list; `ValueError` for too many rules and unreadable ones."""
    if len(texts) > MAX_RULES:
        raise ValueError(f"allow has {len(texts)} rules; more than {MAX_RULES} are too many, *.HOST covers many hosts")
    return tuple(AllowRule.parse(text) for text in texts)


def split_authority(text: str) -> tuple[str, int | None]:
    """Host and port of `host`, `host:port` or `[address]:port`, the host as it stands; `ValueError`."""
    found = _AUTHORITY.fullmatch(text)
    if found is None or not found[1]:
        raise ValueError(f"{text[:100]!r} is no host with a port")
    port = int(found[2]) if found[2] else None
    if port is not None and not 0 < port < 1 << 16:
        raise ValueError(f"port {port} is not between 1 and 65535")
    return found[1], port


def normal_host(text: str) -> str:
    """The one spelling of a name (small letters, no dot at the end) or an address (IPv6 in brackets goes without).

    `ValueError` for what is neither, also for addresses in spellings that not all programs read alike: decimal, octal,
    hexadecimal or shortened ones, and those with a zone.
    """
    if not text.isascii():
        raise ValueError(f"{text[:100]!r} is no host name")
    if text.startswith("["):
        if not text.endswith("]") or "%" in text:
            raise ValueError(f"{text[:100]!r} is no address")
        return str(ipaddress.IPv6Address(text[1:-1]))
    name = text.lower().removesuffix(".")
    labels = name.split(".")
    if _NUMBER.fullmatch(labels[-1]):
        try:
            return str(ipaddress.IPv4Address(name))
        except ValueError:
            raise ValueError(f"{text[:100]!r} is an address in an unusual spelling") from None
    if len(name) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise ValueError(f"{text[:100]!r} is no host name")
    return name


def is_address(host: str) -> bool:
    """Whether a host, as `normal_host` writes it, is an address and no name."""
    return ":" in host or host.rpartition(".")[2].isdecimal()


def _ascii(name: str) -> str:
    """A name of any script as it is in the DNS."""
    if name.isascii():
        return name
    try:
        return name.encode("idna").decode("ascii")
    except UnicodeError as error:
        raise ValueError(f"{name[:100]!r} is no host name: {error}") from error
