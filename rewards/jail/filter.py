"""The seccomp filter: system calls that a program under judgement is refused.

A program may compute, start threads and end. It may start no process, reach no other one, open no
socket, hold no memory that its address space does not count, change no file's mode, owner or
times, and leave nothing behind in the kernel. Refused calls fail with EPERM, which Python raises as
PermissionError.
"""

import os
import struct

# A call by its numbers on (x86_64, aarch64); None: it has no such call.
Numbers = tuple[int | None, int | None]
_REFUSED: dict[str, Numbers] = {
    # Processes, and reaching into others.
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "process_madvise": (440, 440), "process_mrelease": (448, 448), "kcmp": (312, 272),
    "pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "pidfd_send_signal": (424, 424),
    "kill": (62, 129), "tkill": (200, 130), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "setpriority": (141, 140), "ioprio_set": (251, 30),
    "sched_setaffinity": (203, 122), "sched_setscheduler": (144, 119),
    "sched_setparam": (142, 118), "sched_setattr": (314, 274), "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    # Rights, and doors into the kernel that bypass a filter.
    "unshare": (272, 97), "setns": (308, 268), "bpf": (321, 280), "perf_event_open": (298, 241),
    "userfaultfd": (323, 282), "keyctl": (250, 219), "add_key": (248, 217),
    "request_key": (249, 218), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427), "open_by_handle_at": (304, 265),
    # Memory that no limit counts.
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194),
    "shmat": (30, 196), "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180),
    # What Landlock does not know of files.
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "chown": (92, None),
    "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54), "utime": (132, None),
    "utimes": (235, None), "utimensat": (280, 88), "futimesat": (261, None),
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "removexattr": (197, 14),
    "lremovexattr": (198, 15), "fremovexattr": (199, 16), "truncate": (76, 45),
}  # fmt: skip
_NETWORK: dict[str, Numbers] = {"socket": (41, 198)}
# Refused where no Landlock limits them.
_WRITING: dict[str, Numbers] = {
    "mkdir": (83, None), "mkdirat": (258, 34), "rmdir": (84, None), "unlink": (87, None),
    "unlinkat": (263, 35), "rename": (82, None), "renameat": (264, 38), "renameat2": (316, 276),
    "link": (86, None), "linkat": (265, 37), "symlink": (88, None), "symlinkat": (266, 36),
    "mknod": (133, None), "mknodat": (259, 33), "creat": (85, None), "openat2": (437, 437),
}  # fmt: skip
_CLONE3 = 435
_CLONE: Numbers = (56, 220)
_TGKILL: Numbers = (234, 131)
_FCNTL: Numbers = (72, 25)
_IOCTL: Numbers = (16, 29)
_PRLIMIT: Numbers = (302, 261)
_PRCTL: Numbers = (157, 167)
_SOCKETPAIR: Numbers = (53, 199)
_OPEN: Numbers = (2, None)
_OPENAT: Numbers = (257, 56)

_CLONE_THREAD = 0x10000
_PR_SET_PDEATHSIG = 1
_SOCK_TYPE, _SOCK_STREAM = 0xF, 1
# Who is told of a file's events by a signal (F_SETOWN, F_SETSIG, F_SETOWN_EX), and F_SETLEASE.
_FCNTL_REFUSED = (8, 10, 15, 1024)
# The same by ioctl (FIOSETOWN, SIOCSPGRP), and typing into a terminal (TIOCSTI).
_IOCTL_REFUSED = (0x8901, 0x8902, 0x5412)
# O_WRONLY, O_RDWR, O_CREAT, O_TRUNC.
_OPEN_TO_WRITE = 0x3 | 0x40 | 0x200
# Calls newer than these are unknown here; also the number from which x86_64 has a second table.
_FIRST_UNKNOWN = 450

_PROCESSORS = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_NUMBER_AT, _PROCESSOR_AT, _ARGUMENTS_AT = 0, 4, 16
_LOAD, _AND, _RETURN = 0x20, 0x54, 0x06
_IF_EQUAL, _IF_AT_LEAST, _IF_ANY_BIT = 0x15, 0x35, 0x45
_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000
_EPERM, _ENOSYS = 1, 38

Instruction = tuple[int, int, int, int]


def build_filter(
    pid: int,
    network: bool,
    writing: bool,
    machine: str | None = None,
    child: int | None = None,
) -> bytes:
    """The filter for the process `pid`.

    Args:
        pid: the process, which may send signals to its own threads.
        network: whether sockets are allowed.
        writing: whether files may be opened to write; something else must then say which.
        machine: the processor, as `platform.machine` calls it; None: this one.
        child: another process that it may send signals to; None: none.

    Raises:
        OSError: the numbers of this processor's calls are not known.
    """
    machine = machine or os.uname().machine
    if machine not in _PROCESSORS:
        raise OSError(f"seccomp: no table of the system calls of {machine}")
    column, processor = _PROCESSORS[machine]
    refused = dict(_REFUSED) if network else _REFUSED | _NETWORK
    if not writing:
        refused |= _WRITING
    if child is not None:
        del refused["kill"]
    code = [
        (_LOAD, 0, 0, _PROCESSOR_AT), *_unless(_IF_EQUAL, processor, _KILL),
        (_LOAD, 0, 0, _NUMBER_AT), *_when(_IF_AT_LEAST, _FIRST_UNKNOWN, _ERROR | _ENOSYS),
    ]  # fmt: skip
    for numbers in refused.values():
        number = numbers[column]
        if number is not None:
            code += _when(_IF_EQUAL, number, _ERROR | _EPERM)
    # The C library then takes clone, whose flags can be read.
    code += _when(_IF_EQUAL, _CLONE3, _ERROR | _ENOSYS)
    for numbers, argument, test in _conditions(pid, network, writing, child):
        number = numbers[column]
        if number is not None:
            code += _call(number, argument, test)
    code.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


def _conditions(
    pid: int, network: bool, writing: bool, child: int | None
) -> list[tuple[Numbers, int, list[Instruction]]]:
    """Calls that depend on an argument: their numbers, which argument, and its test."""
    refuse = _ERROR | _EPERM
    stream = [(_AND, 0, 0, _SOCK_TYPE), *_unless(_IF_EQUAL, _SOCK_STREAM, refuse)]
    to_write = _when(_IF_ANY_BIT, _OPEN_TO_WRITE, refuse)
    conditions = [
        (_CLONE, 0, _unless(_IF_ANY_BIT, _CLONE_THREAD, refuse)),
        (_TGKILL, 0, _unless(_IF_EQUAL, pid, refuse)),
        (_PRLIMIT, 0, _unless(_IF_EQUAL, 0, refuse)),
        (_PRCTL, 0, _when(_IF_EQUAL, _PR_SET_PDEATHSIG, refuse)),
        (_FCNTL, 1, _when_one_of(_FCNTL_REFUSED, refuse)),
        (_IOCTL, 1, _when_one_of(_IOCTL_REFUSED, refuse)),
    ]
    if child is not None:
        conditions.append((_REFUSED["kill"], 0, _unless(_IF_EQUAL, child, refuse)))
    if not network:
        # Packets of a pair could be sent elsewhere.
        conditions.append((_SOCKETPAIR, 1, stream))
    if not writing:
        conditions += [(_OPEN, 1, to_write), (_OPENAT, 2, to_write)]
    return conditions


def _when(test: int, value: int, action: int) -> list[Instruction]:
    return [(test, 0, 1, value), (_RETURN, 0, 0, action)]


def _unless(test: int, value: int, action: int) -> list[Instruction]:
    return [(test, 1, 0, value), (_RETURN, 0, 0, action)]


def _when_one_of(values: tuple[int, ...], action: int) -> list[Instruction]:
    return [part for value in values for part in _when(_IF_EQUAL, value, action)]


def _call(number: int, argument: int, test: list[Instruction]) -> list[Instruction]:
    """Instructions that look at an argument of one call; both processors are little-endian."""
    body = [(_LOAD, 0, 0, _ARGUMENTS_AT + 8 * argument), *test, (_RETURN, 0, 0, _ALLOW)]
    return [(_IF_EQUAL, 0, len(body), number), *body]
