"""Addresses of a run: free, distinct, durable."""

import socket
from urllib.parse import urlsplit

import pytest

from hone.config.load import recipe_from
from hone.transport.addresses import PortInUseError, allocate, load_addresses, save_addresses


def recipe(**server):
    return recipe_from({"model": {"path": "some/model"}, "server": server}, "test")


def ports(addresses):
    names = ("api", "admin", "tokens", "trainer", "workers")
    return {name: urlsplit(getattr(addresses, name)).port for name in names}


def test_free_ports_are_distinct_and_can_be_bound():
    found = ports(allocate(recipe()))
    assert found["api"] == found["admin"]
    assert len(set(found.values())) == 4
    for port in set(found.values()):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", port))


def test_the_admin_routes_can_have_their_own_port():
    found = ports(allocate(recipe(admin_port=0)))
    assert found["admin"] != found["api"]


def test_a_wildcard_host_is_reached_through_the_loopback():
    assert allocate(recipe(host="0.0.0.0")).api.startswith("http://127.0.0.1:")


def test_a_port_in_use_is_one_readable_error():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(PortInUseError, match=f"127.0.0.1:{port}.*choose another port"):
            allocate(recipe(port=port))


def test_addresses_come_back_from_the_file(tmp_path):
    addresses = allocate(recipe())
    save_addresses(addresses, tmp_path / "addresses.json")
    assert load_addresses(tmp_path / "addresses.json") == addresses


def test_a_missing_or_foreign_file_is_one_readable_error(tmp_path):
    with pytest.raises(ValueError, match="hone run"):
        load_addresses(tmp_path / "addresses.json")
    (tmp_path / "addresses.json").write_text("{}")
    with pytest.raises(ValueError, match="delete it"):
        load_addresses(tmp_path / "addresses.json")
