"""The seccomp filter, by a small interpreter of its instructions and the kernel's own numbers."""

import errno
import re
import struct
from pathlib import Path

import pytest

from rewards.jail import filter as calls
from rewards.jail.filter import build_filter

PROCESSORS = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
ALLOWED, REFUSED, UNKNOWN = 0x7FFF0000, 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS
KILLED = 0x80000000
PID = 77


def run(code: bytes, number: int, arguments=(), processor: int = 0xC000003E) -> int:
    """What the filter says to a call: classic BPF over struct seccomp_data."""
    data = struct.pack("<IIQ6Q", number, processor, 0, *[*arguments, *[0] * 6][:6])
    place = value = 0
    while True:
        operation, yes, no, operand = struct.unpack_from("=HBBI", code, 8 * place)
        place += 1
        if operation == 0x20:
            value = struct.unpack_from("<I", data, operand)[0]
        elif operation == 0x54:
            value &= operand
        elif operation == 0x06:
            return operand
        else:
            tests = {0x15: value == operand, 0x35: value >= operand, 0x45: value & operand != 0}
            place += yes if tests[operation] else no


@pytest.mark.parametrize("machine", PROCESSORS)
@pytest.mark.parametrize("network", [False, True])
@pytest.mark.parametrize("writing", [False, True])
def test_every_call(machine, network, writing):
    """Of all numbers, exactly those of the tables are refused."""
    column, processor = PROCESSORS[machine]
    code = build_filter(PID, network, writing, machine)
    tables = [calls._REFUSED, *([] if network else [calls._NETWORK])]
    tables += [] if writing else [calls._WRITING]
    refused = {numbers[column] for table in tables for numbers in table.values()}
    # With arguments 0: no thread, another process, F_DUPFD, no kind of socket.
    refused |= {calls._CLONE[column], calls._TGKILL[column]}
    refused |= set() if network else {calls._SOCKETPAIR[column]}
    for number in range(500):
        said = run(code, number, processor=processor)
        wanted = REFUSED if number in refused else ALLOWED
        assert said == (UNKNOWN if number == 435 or number >= 450 else wanted), number
    assert run(code, 0, processor=0x40000003) == KILLED
    assert run(code, 0x40000000 + 57, processor=processor) == UNKNOWN


@pytest.mark.parametrize("machine", PROCESSORS)
@pytest.mark.parametrize(
    "call, arguments, refused",
    [
        ("_CLONE", (0x3D0F00,), False),
        ("_CLONE", (17,), True),
        ("_CLONE", (2**40,), True),
        ("_TGKILL", (PID, 1, 9), False),
        ("_TGKILL", (PID + 1, 1, 9), True),
        ("_PRLIMIT", (0, 7), False),
        ("_PRLIMIT", (1, 7), True),
        ("_PRCTL", (4,), False),
        ("_PRCTL", (1,), True),
        ("_FCNTL", (5, 4), False),
        ("_FCNTL", (5, 8), True),
        ("_IOCTL", (5, 0x5413), False),
        ("_IOCTL", (5, 0x5412), True),
        ("_SOCKETPAIR", (1, 0x80001), False),
        ("_SOCKETPAIR", (1, 0x80002), True),
        ("_OPENAT", (5, 0, 0o2000000), False),
        ("_OPENAT", (5, 0, 1), True),
        ("_OPENAT", (5, 0, 0o100), True),
    ],
)
def test_calls_that_depend_on_an_argument(machine, call, arguments, refused):
    column, processor = PROCESSORS[machine]
    code = build_filter(PID, network=False, writing=False, machine=machine)
    number = getattr(calls, call)[column]
    assert run(code, number, arguments, processor) == (REFUSED if refused else ALLOWED)


@pytest.mark.parametrize("machine", PROCESSORS)
def test_a_child_may_be_sent_signals(machine):
    """That one, nobody else, and no group."""
    column, processor = PROCESSORS[machine]
    number = calls._REFUSED["kill"][column]
    code = build_filter(PID, False, False, machine, child=99)
    for process in (99, 98, PID, 0, 2**32 - 1, 2**32 - 99):
        said = run(code, number, (process, 9), processor)
        assert said == (ALLOWED if process == 99 else REFUSED)
    assert run(build_filter(PID, False, False, machine), number, (99, 9), processor) == REFUSED


@pytest.mark.parametrize(
    "column, header",
    [(0, "x86_64-linux-gnu/asm/unistd_64.h"), (1, "asm-generic/unistd.h")],
    ids=PROCESSORS,
)
def test_numbers_are_those_of_the_kernel(column, header):
    path = Path("/usr/include") / header
    if not path.is_file():
        pytest.skip(f"no {path}")
    lines = re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", path.read_text())
    known = {name: int(number) for name, number in lines}
    named = calls._REFUSED | calls._NETWORK | calls._WRITING
    for call in ("clone", "tgkill", "fcntl", "ioctl", "prctl", "socketpair", "openat"):
        named[call] = getattr(calls, f"_{call.upper()}")
    named |= {"prlimit64": calls._PRLIMIT, "open": calls._OPEN, "clone3": (435, 435)}
    for name, numbers in named.items():
        assert known.get(name) == numbers[column], name


def test_an_unknown_processor():
    with pytest.raises(OSError, match="no table of the system calls of riscv64"):
        build_filter(1, False, False, "riscv64")
