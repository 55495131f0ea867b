"""`hone sandbox`: a program's streams and exit code come through, here and on a node."""

import signal
import subprocess
import sys

import pytest

from hone.sandbox.cells.host import look
from hone.schema.sandboxes import RUNTIMES

pytestmark = pytest.mark.skipif(not look().has_user_namespaces, reason="no user namespaces")
HONE = [sys.executable, "-m", "hone.cli.main", "sandbox"]


def hone(*words, **options):
    return subprocess.run([*HONE, *words], capture_output=True, timeout=60, check=False, **options)


def test_a_program_has_the_streams_and_the_exit_code():
    done = hone("run", "python", "--", "sh", "-c", "cat; echo problem >&2; exit 3", input=b"given\n")
    assert (done.returncode, done.stdout, done.stderr) == (3, b"given\n", b"problem\n")


def test_a_node_serves_lists_and_stops(tmp_path):
    address = f"unix:{tmp_path}/socket"
    serving = subprocess.Popen(
        [*HONE, "serve", "--listen", address, "--folder", str(tmp_path / "node")], stdout=subprocess.PIPE
    )
    try:
        assert serving.stdout.readline() == f"node local serves at {address}\n".encode()
        done = hone("run", "python", "--node", address, "--", "echo", "hello")
        assert (done.returncode, done.stdout) == (0, b"hello\n"), done.stderr
        assert b"sandbox/created" in hone("stats", "--node", address).stdout
        assert hone("ls", "--node", address).returncode == 0
    finally:
        serving.send_signal(signal.SIGTERM)
        serving.wait(timeout=20)
        serving.stdout.close()
    assert serving.returncode == 0


def test_what_the_caller_can_mend_is_told_in_a_line(tmp_path):
    done = hone("ls", "--node", f"unix:{tmp_path}/none")
    assert done.returncode == 2
    assert b"`hone sandbox serve` starts a node" in done.stderr
    done = hone("serve", "--listen", "tcp://127.0.0.1:0", "--folder", str(tmp_path))
    assert done.returncode == 2
    assert b"give tokens" in done.stderr


def test_a_node_offers_the_runtimes_it_was_told_to(tmp_path):
    address = f"unix:{tmp_path}/socket"
    command = [*HONE, "serve", "--listen", address, "--folder", str(tmp_path / "node"), "--runtime", "cell"]
    serving = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        serving.stdout.readline()
        done = hone("run", "python", "--node", address, "--runtime", "process", "--network", "off", "--", "true")
        assert done.returncode == 2
        assert b"'process' is not offered here; ask for one of cell" in done.stderr
    finally:
        serving.send_signal(signal.SIGTERM)
        serving.wait(timeout=20)
        serving.stdout.close()
    assert hone("serve", "--runtime", "no-such").returncode == 2


def test_the_doctor_tries_every_runtime():
    shown = hone("doctor").stdout.decode()
    assert {name for name in RUNTIMES if any(name in line.split() for line in shown.splitlines())} == set(RUNTIMES)
    assert any({"ok", "cell"} <= set(line.split()) for line in shown.splitlines()), shown
