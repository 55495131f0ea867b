import struct

import pytest

from hone.sandbox.cells.seccomp import ALLOW, ARCHITECTURES, ENOSYS, EPERM, ERRNO, FORBIDDEN, KILL, instructions

AF_UNIX, AF_INET, AF_PACKET = 1, 2, 17


def decide(program: bytes, audit: int, number: int, first: int = 0, second: int = 0) -> int:
    """What the kernel would: an interpreter of the few instructions there are."""
    data = struct.pack("=IIQ6Q", number, audit, 0, first, second, 0, 0, 0, 0)
    position = value = 0
    while True:
        code, if_true, if_false, k = struct.unpack_from("=HBBI", program, position * 8)
        position += 1
        if code == 0x20:
            (value,) = struct.unpack_from("=I", data, k)
        elif code == 0x05:
            position += k
        elif code == 0x06:
            return int(k)
        else:
            holds = {0x15: value == k, 0x35: value >= k, 0x45: bool(value & k)}[code]
            position += if_true if holds else if_false


@pytest.fixture(params=sorted(ARCHITECTURES))
def machine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_every_system_call_gets_what_its_name_deserves(machine: str) -> None:
    architecture = ARCHITECTURES[machine]
    program = instructions(machine=machine)
    for name, number in architecture.numbers.items():
        decision = decide(program, architecture.audit, number, first=AF_UNIX)
        expected = ERRNO | EPERM if name in FORBIDDEN else ERRNO | ENOSYS if name == "clone3" else ALLOW
        assert decision == expected, name


def test_what_is_not_known_does_not_exist(machine: str) -> None:
    architecture = ARCHITECTURES[machine]
    program = instructions(machine=machine)
    known = set(architecture.numbers.values())
    for number in set(range(2000)) - known | {0x3FFFFFFF}:
        assert decide(program, architecture.audit, number) == ERRNO | ENOSYS, number


def test_another_architecture_is_deadly(machine: str) -> None:
    assert decide(instructions(machine=machine), 0x40000003, 1) == KILL


def test_clone_makes_processes_and_threads_but_no_namespaces(machine: str) -> None:
    architecture = ARCHITECTURES[machine]
    program, clone = instructions(machine=machine), architecture.numbers["clone"]
    assert decide(program, architecture.audit, clone, first=0x01200011) == ALLOW  # fork
    assert decide(program, architecture.audit, clone, first=0x003D0F00) == ALLOW  # a thread
    for flag in (0x20000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000):
        assert decide(program, architecture.audit, clone, first=flag | 17) == ERRNO | EPERM


def test_sockets_by_family(machine: str) -> None:
    architecture = ARCHITECTURES[machine]
    number = architecture.numbers["socket"]
    for has_network, family, is_allowed in (
        (True, AF_INET, True), (True, AF_UNIX, True), (True, AF_PACKET, False), (False, AF_INET, False), (False, AF_UNIX, True),
    ):  # fmt: skip
        program = instructions(machine=machine, has_network=has_network)
        assert (decide(program, architecture.audit, number, first=family) == ALLOW) is is_allowed


def test_typing_into_a_terminal_is_refused(machine: str) -> None:
    architecture = ARCHITECTURES[machine]
    program, ioctl = instructions(machine=machine), architecture.numbers["ioctl"]
    assert decide(program, architecture.audit, ioctl, second=0x5412) == ERRNO | EPERM
    assert decide(program, architecture.audit, ioctl, second=0x5413) == ALLOW


def test_an_unknown_machine_is_named() -> None:
    with pytest.raises(ValueError, match="riscv64"):
        instructions(machine="riscv64")
