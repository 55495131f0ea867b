"""Where the processes of a run find one another: concrete addresses, chosen once and saved in the run's folder."""

import contextlib
import socket
from pathlib import Path

import msgspec

from hone.config.recipe import Recipe


class Addresses(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The addresses of one run.

    api: base address of the OpenAI API (http), without a path. admin: base address of the admin routes (http), equal
    to `api` where they share it. tokens: ZeroMQ ROUTER of the inference server. trainer, workers: ZeroMQ ROUTERs of
    the orchestrator.
    """

    api: str
    admin: str
    tokens: str
    trainer: str
    workers: str


class PortInUseError(ValueError):
    """A port that the recipe asks for belongs to another process."""


def allocate(recipe: Recipe) -> Addresses:
    """Concrete addresses for a run on this machine; ports given as 0 are replaced by free ones.

    The ports are free now, not reserved: bind them soon. Raises `PortInUseError` for a fixed port that is taken.
    """
    server = recipe.server
    host = server.host
    with contextlib.ExitStack() as held:
        api_port = _port(held, host, server.port)
        api = f"http://{_connectable(host)}:{api_port}"
        admin = api
        if server.admin_port is not None:
            admin_host = server.admin_host or host
            admin = f"http://{_connectable(admin_host)}:{_port(held, admin_host, server.admin_port)}"
        tokens, trainer, workers = (f"tcp://{_connectable(host)}:{_port(held, host, 0)}" for _ in range(3))
    return Addresses(api=api, admin=admin, tokens=tokens, trainer=trainer, workers=workers)


def save_addresses(addresses: Addresses, path: Path) -> None:
    """Write the addresses so that a reader sees all of them or the file that was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(msgspec.json.format(msgspec.json.encode(addresses)))
    temporary.replace(path)


def load_addresses(path: Path) -> Addresses:
    """The inverse of `save_addresses`; `ValueError` when there is no such file or it is none of ours."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Addresses)
    except FileNotFoundError as error:
        raise ValueError(f"no addresses at {path}; start the run with `hone run`, which writes them") from error
    except msgspec.DecodeError as error:
        raise ValueError(f"{path} does not hold the addresses of a run: {error}; delete it and start again") from error


def _port(held: contextlib.ExitStack, host: str, port: int) -> int:
    """`port`, or a free one for 0; kept bound until `held` closes, so that no two of one call are equal."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    probe = held.enter_context(socket.socket(family, socket.SOCK_STREAM))
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        probe.bind((host, port))
    except OSError as error:
        raise PortInUseError(
            f"cannot bind {host}:{port} ({error.strerror}); choose another port, or 0 for a free one"
        ) from error
    return int(probe.getsockname()[1])


def _connectable(host: str) -> str:
    """The address at which local processes reach a server bound to `host`."""
    if host in ("0.0.0.0", ""):
        return "127.0.0.1"
    if host == "::":
        return "[::1]"
    return f"[{host}]" if ":" in host else host
