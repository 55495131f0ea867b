"""Whether a sandbox may reach a host, and an address that the host's name led to: pure decisions."""

import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from hone.schema.sandbox_network import AllowRule, normal_host, parse_rules, split_authority
from hone.schema.sandboxes import SandboxSpec

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

PROXY_PORT = 3128
LOCAL = "localhost,127.0.0.1,::1"

# What the public internet is not: the registries of special addresses of IANA, and what only seems to be elsewhere.
PRIVATE = tuple(
    ipaddress.ip_network(text)
    for text in (
        *("10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24"),
        *("192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24"),
        *("::1/128", "fc00::/7", "fe80::/10", "fec0::/10"),
    )
)
NEVER = tuple(
    ipaddress.ip_network(text)
    for text in (
        *("0.0.0.0/8", "224.0.0.0/4", "240.0.0.0/4"),  # "this host", multicast, reserved with broadcast
        *("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20"),  # Teredo and others, examples, 6to4
    )
)
PUBLIC_IPV6 = ipaddress.ip_network("2000::/3")


@dataclass(frozen=True, slots=True)
class Grant:
    """What the rules together allow for a host and port. is_private, is_tcp: as of `AllowRule`.

    is_named: whether one names the host, and not only a wildcard covers it.
    """

    is_private: bool
    is_tcp: bool
    is_named: bool


@dataclass(frozen=True, slots=True)
class NetworkPolicy:
    """What a node grants to the sandboxes that ask for hosts.

    maps: addresses by name, `unix:/path` or `host:port`, for names that mean something to this node alone, such as
    "model.internal". A sandbox reaches them where its allow-list names them, not by a wildcard; their address is not
    checked. is_private_allowed: whether rules may say `+private`, and sandboxes have the host's network.
    max_connections: of all sandboxes together; max_sandbox_connections: of one; more wait. max_requests_per_second,
    max_bytes_per_second: of one, so that it leaves the node its time. max_bytes: that one may have carried, up and down
    together. idle_seconds: after so long without a byte a connection is ended.
    """

    maps: Mapping[str, str] = field(default_factory=dict)
    is_private_allowed: bool = True
    max_connections: int = 1024
    max_sandbox_connections: int = 64
    max_requests_per_second: float = 200.0
    max_bytes_per_second: float = 64 << 20
    max_bytes: int | None = None
    idle_seconds: float = 300.0

    def __post_init__(self) -> None:
        for name in ("max_requests_per_second", "max_bytes_per_second", "max_sandbox_connections", "idle_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} {getattr(self, name)} is not positive: nothing would be carried")
        for name, address in self.maps.items():
            if normal_host(name) != name:
                raise ValueError(f"the map of {name!r} would never be used; write {normal_host(name)!r}")
            if not address.startswith("unix:/") and split_authority(address)[1] is None:
                raise ValueError(f"{name} is mapped to {address!r}, which is neither unix:/path nor host:port")

    def refuses(self, spec: SandboxSpec) -> str:
        """What of a sandbox's network is not to be had here, in a clause; empty if nothing."""
        if self.is_private_allowed:
            return ""
        if spec.network == "host":
            return "network='host', which is a private network"
        private = [text for text, rule in zip(spec.allow, parse_rules(spec.allow), strict=True) if rule.is_private]
        return f"private networks: allow {private}" if private else ""


def grant(rules: Sequence[AllowRule], host: str, port: int) -> Grant | None:
    """What rules allow for a host, as `normal_host` writes it, and a port; None: nothing."""
    covering = [rule for rule in rules if rule.covers(host, port)]
    if not covering:
        return None
    return Grant(
        is_private=any(rule.is_private for rule in covering),
        is_tcp=any(rule.is_tcp for rule in covering),
        is_named=not all(rule.is_wildcard for rule in covering),
    )


def objection(address: Address, *, is_private: bool, is_own: bool) -> str:
    """What speaks against a connection to an address; empty if nothing.

    is_private: whether private networks, and the node itself, are allowed. is_own: whether the address is the node's.
    Addresses that stand for others (IPv4 in IPv6, NAT64, 6to4, Teredo) and those that are nobody's are never allowed.
    """
    if any(address in network for network in PRIVATE):
        return "" if is_private else "a private network"
    if any(address in network for network in NEVER) or (address.version == 6 and address not in PUBLIC_IPV6):
        return "an address of no host"
    if is_own and not is_private:
        return "the node itself"
    return ""


def proxy_variables(port: int = PROXY_PORT) -> dict[str, str]:
    """The environment that tells programs of the proxy."""
    proxy = f"http://127.0.0.1:{port}"
    names = ("http_proxy", "https_proxy", "all_proxy")
    variables = {spelled: proxy for name in names for spelled in (name, name.upper())}
    return {**variables, "no_proxy": LOCAL, "NO_PROXY": LOCAL}
