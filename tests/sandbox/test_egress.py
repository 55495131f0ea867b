"""Rules of allow-lists, spellings of hosts, and addresses that are refused: pure decisions."""

import ipaddress
import socket
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hone.sandbox.network.egress import Grant, NetworkPolicy, grant, objection, proxy_variables
from hone.sandbox.node.lifecycle import kind_of
from hone.schema.sandbox_network import AllowRule, is_address, normal_host, parse_rules, split_authority
from hone.schema.sandboxes import SandboxSpec

LABELS = st.text(string.ascii_lowercase + string.digits + "-", min_size=1, max_size=12).filter(
    lambda label: label[0] != "-" and label[-1] != "-"
)
NAMES = st.lists(LABELS, min_size=2, max_size=4).map(".".join).filter(lambda name: not name.split(".")[-1][0].isdigit())
PORTS = st.integers(1, 65535)


@given(NAMES, PORTS, st.booleans())
def test_a_rule_covers_its_host_however_it_is_spelled(name, port, has_dot):
    rule = AllowRule.parse(f"{name.upper()}:{port}")
    assert rule.covers(normal_host(name.title() + "." * has_dot), port)
    assert not rule.covers(normal_host(name), port % 65535 + 1)
    assert not rule.covers(normal_host("a." + name), port)
    assert not rule.covers(normal_host("a" + name), port)


@given(NAMES, NAMES)
def test_a_wildcard_covers_what_is_below_and_nothing_else(name, other):
    rule = AllowRule.parse(f"*.{name}")
    assert rule.covers(f"{other}.{name}", 443)
    assert rule.covers(f"{other}.{name}", 80)
    assert not rule.covers(name, 443)
    assert not rule.covers(f"x{name}", 443)
    assert rule.covers(other, 443) == other.endswith("." + name)


@given(st.text(max_size=80))
def test_a_text_is_a_rule_or_a_readable_error(text):
    try:
        rule = AllowRule.parse(text)
    except ValueError:
        return
    assert rule.is_wildcard or normal_host(f"[{rule.host}]" if ":" in rule.host else rule.host) == rule.host


@given(st.text(string.hexdigits + "x.:[]%-", max_size=40))
def test_whoever_reads_a_host_as_an_address_agrees_with_us(text):
    """What libc takes for an address is one for us too, the same one, or it is refused."""
    try:
        host = normal_host(text)
    except ValueError:
        return
    if is_address(host):
        assert ipaddress.ip_address(host)
        return
    with pytest.raises(socket.gaierror):
        socket.getaddrinfo(host, None, flags=socket.AI_NUMERICHOST)


UNUSUAL = ["2130706433", "0x7f000001", "0x7f.1", "0177.0.0.1", "127.1", "127.0.0.1.1", "[fe80::1%eth0]", "[::1", "0x"]
UNUSUAL += [
    "1.2.3",
    "exa mple.org",
    "a..b",
    "-a.b",
    "a_b-.c",
    "x" * 64 + ".org",
    ".".join(["abcdefgh"] * 30),
    "user@host",
]
UNUSUAL += ["ex%61m.org", "", ".", "\u212aelvin.org", "xn\u00e4.org", "a\0b"]


@pytest.mark.parametrize("text", UNUSUAL)
def test_unusual_hosts_are_refused(text):
    with pytest.raises(ValueError, match=r"no host name|address|Expected|At (least|most)"):
        normal_host(text)


def test_hosts_have_one_spelling():
    assert normal_host("ExAmple.ORG.") == "example.org"
    assert normal_host("127.0.0.1") == "127.0.0.1"
    assert normal_host("[0:0::1]") == "::1"
    assert AllowRule.parse("Bücher.example").host == "xn--bcher-kva.example"
    assert split_authority("[::1]:80") == ("[::1]", 80)
    assert AllowRule.parse("[::1]:8000+private").covers("::1", 8000)
    assert AllowRule.parse("db.example.org:5432+tcp+private") == AllowRule("db.example.org", False, 5432, True, True)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("https://pypi.org", "no host"),
        ("pypi.org:0", "port 0"),
        ("pypi.org:99999", "port 99999"),
        ("pypi.org/simple", "no host name"),
        ("*.10.0.0.1", "below an address"),
        ("a.*.org", "no host name"),
        ("*org", "no host name"),
        ("pypi.org+privat", r"\+privat is unknown"),
        ("*+private", "name the hosts"),
        ("", "no host"),
        ("*.", "no host name"),
    ],
)
def test_a_rule_that_means_nothing_says_so(text, problem):
    with pytest.raises(ValueError, match=problem):
        AllowRule.parse(text)


def test_a_spec_is_checked():
    assert SandboxSpec(network="allow", allow=("pypi.org",)).allow == ("pypi.org",)
    with pytest.raises(ValueError, match="do not agree"):
        SandboxSpec(network="allow")
    with pytest.raises(ValueError, match="do not agree"):
        SandboxSpec(network="none", allow=("pypi.org",))
    with pytest.raises(ValueError, match="do not agree"):
        SandboxSpec(network="host", allow=("pypi.org",))
    with pytest.raises(ValueError, match="too many"):
        SandboxSpec(network="allow", allow=("a.b",) * 257)
    with pytest.raises(ValueError, match=r"no host name.*write HOST"):
        SandboxSpec(network="allow", allow=("a b",))


def test_cells_with_different_lists_come_from_one_pool():
    assert kind_of(SandboxSpec(network="allow", allow=("pypi.org",))) == kind_of(SandboxSpec())


def test_what_rules_together_grant():
    rules = parse_rules(("*.example.org", "db.example.org:443+tcp", "in.example.org+private"))
    assert grant(rules, "a.example.org", 443) == Grant(is_private=False, is_tcp=False, is_named=False)
    assert grant(rules, "db.example.org", 443) == Grant(is_private=False, is_tcp=True, is_named=True)
    assert grant(rules, "in.example.org", 80) == Grant(is_private=True, is_tcp=False, is_named=True)
    assert grant(rules, "example.org", 443) is None
    assert grant(rules, "a.example.org", 8443) is None
    assert grant(parse_rules(("*",)), "10.0.0.1", 80) is None
    assert grant(parse_rules(("*",)), "any.where", 80) is not None


PRIVATE = ["10.1.2.3", "127.0.0.1", "127.9.9.9", "169.254.169.254", "172.31.0.1", "192.168.0.1", "100.64.0.1", "::1"]
PRIVATE += ["fd00::1", "fe80::1", "198.18.0.1", "192.0.2.1"]
NEVER = ["0.0.0.0", "0.1.2.3", "224.0.0.1", "255.255.255.255", "240.0.0.1", "::", "ff02::1", "::ffff:127.0.0.1"]
NEVER += ["::ffff:8.8.8.8", "64:ff9b::7f00:1", "64:ff9b:1::1", "2002:7f00:1::", "2001::1", "2001:db8::1", "::127.0.0.1"]


@pytest.mark.parametrize("text", PRIVATE)
def test_private_addresses_need_a_rule_that_says_so(text):
    address = ipaddress.ip_address(text)
    assert objection(address, is_private=False, is_own=False) == "a private network"
    assert objection(address, is_private=True, is_own=True) == ""


@pytest.mark.parametrize("text", NEVER)
def test_addresses_that_stand_for_others_are_never_reached(text):
    assert objection(ipaddress.ip_address(text), is_private=True, is_own=False) == "an address of no host"


@given(st.ip_addresses())
def test_what_the_library_knows_to_be_special_is_refused(address):
    if not address.is_global or address.is_multicast or address.is_reserved:
        assert objection(address, is_private=False, is_own=False)


def test_the_nodes_own_public_address_is_private():
    address = ipaddress.ip_address("8.8.8.8")
    assert objection(address, is_private=False, is_own=False) == ""
    assert objection(address, is_private=False, is_own=True) == "the node itself"


def test_maps_are_checked():
    assert NetworkPolicy(maps={"model.internal": "unix:/run/model"}).maps
    with pytest.raises(ValueError, match="neither"):
        NetworkPolicy(maps={"model.internal": "127.0.0.1"})
    with pytest.raises(ValueError, match=r"write .model\.internal."):
        NetworkPolicy(maps={"Model.internal.": "127.0.0.1:80"})


def test_programs_are_told_of_the_proxy_in_both_spellings():
    variables = proxy_variables(3128)
    assert variables["https_proxy"] == variables["HTTPS_PROXY"] == variables["ALL_PROXY"] == "http://127.0.0.1:3128"
    assert "localhost" in variables["NO_PROXY"]
