"""System calls of Linux that Python has no function for."""

import ctypes
import os
import struct

_libc = ctypes.CDLL(None, use_errno=True)

CLONE_NEWNS, CLONE_NEWIPC = 0x20000, 0x8000000
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REC, MS_PRIVATE = 2, 4, 8, 0x4000, 0x40000
CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 1, 2

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_KEEPCAPS = 1, 4, 8
_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 22, 38
_SECCOMP_MODE_FILTER = 2
_CAPABILITY_VERSION_3 = 0x20080522
# The numbers of Landlock are the same on every processor.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_RULE_PATH_BENEATH, _ASK_VERSION = 1, 1
# Rights over files, bit by bit, as <linux/landlock.h> numbers them.
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
MAKE_CHAR, MAKE_SOCK, MAKE_BLOCK = 1 << 6, 1 << 9, 1 << 11
_TCP_BIND_CONNECT, _SCOPE_SOCKETS_SIGNALS = 3, 3
# How many of those bits a version of Landlock knows.
_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}
_ALL_RIGHTS = 16


def _checked(result: int, call: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")
    return result


def _prctl(option: int, value: int, pointer: object = None) -> None:
    arguments = (ctypes.c_ulong(value), pointer, ctypes.c_ulong(0), ctypes.c_ulong(0))
    _checked(_libc.prctl(ctypes.c_int(option), *arguments), "prctl")


def unshare(flags: int) -> None:
    """Leave the namespaces of the parent."""
    _checked(_libc.unshare(ctypes.c_int(flags)), "unshare")


def mount(kind: str | None, target: str, flags: int, options: str = "") -> None:
    """Mount a file system of a kind; None: change how the mount at `target` spreads."""
    named = None if kind is None else kind.encode()
    result = _libc.mount(named, target.encode(), named, ctypes.c_ulong(flags), options.encode())
    _checked(result, "mount")


def keep_capabilities_over_setuid() -> None:
    """Permitted capabilities outlive the change of the user."""
    _prctl(_PR_SET_KEEPCAPS, 1)


def permitted_capabilities() -> int:
    """The permitted capabilities as bits."""
    header, data = _capability_arguments()
    _checked(_libc.capget(header, data), "capget")
    low, high = struct.unpack("=6I", data.raw)[1::3]
    return low | high << 32


def set_capabilities(wanted: int) -> None:
    """Have these capabilities, by bits below 32, and no others."""
    header, data = _capability_arguments()
    data.raw = struct.pack("=6I", wanted, wanted, 0, 0, 0, 0)
    _checked(_libc.capset(header, data), "capset")


def _capability_arguments() -> "tuple[ctypes.Array, ctypes.Array]":
    header = ctypes.create_string_buffer(struct.pack("=Ii", _CAPABILITY_VERSION_3, 0), 8)
    return header, ctypes.create_string_buffer(24)


def die_with_parent() -> None:
    """Be killed when the thread that started this process ends."""
    _prctl(_PR_SET_PDEATHSIG, 9)


def forbid_dumps() -> None:
    """No process without rights over others may look into this one."""
    _prctl(_PR_SET_DUMPABLE, 0)


def no_new_privileges() -> None:
    """Nothing that is executed gains rights: what filters and Landlock ask for."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def filter_system_calls(program: bytes) -> None:
    """Install a seccomp filter: instructions of 8 bytes."""
    code = ctypes.create_string_buffer(program, len(program))
    # struct sock_fprog: the number of instructions, padded, and where they are.
    head = struct.pack("@HP", len(program) // 8, ctypes.addressof(code))
    _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.create_string_buffer(head, len(head)))


def landlock_version() -> int:
    """The version of Landlock that the kernel speaks; 0: none."""
    none = ctypes.c_void_p(None)
    return max(0, _syscall(_CREATE_RULESET, none, ctypes.c_size_t(0), ctypes.c_uint(_ASK_VERSION)))


def _syscall(number: int, *arguments: object) -> int:
    return _libc.syscall(ctypes.c_long(number), *arguments)


class FileRules:
    """Landlock: what may be done with files from now on, everything else is refused.

    Args:
        network: whether TCP stays allowed.

    Raises:
        OSError: the kernel has no Landlock.
    """

    def __init__(self, network: bool) -> None:
        version = landlock_version()
        self._handled = (1 << _RIGHTS.get(version, _ALL_RIGHTS)) - 1
        tcp = _TCP_BIND_CONNECT if version >= 4 and not network else 0
        scope = _SCOPE_SOCKETS_SIGNALS if version >= 6 else 0
        rules = struct.pack("=QQQ", self._handled, tcp, scope)
        size = ctypes.c_size_t(len(rules))
        made = _syscall(_CREATE_RULESET, rules, size, ctypes.c_uint(0))
        self._descriptor = _checked(made, "landlock_create_ruleset")

    def read(self, path: str, write: bool = False) -> None:
        """Allow to read a file or what lies below a folder; a path that is not there is none.

        Args:
            path: the file or folder.
            write: a file may be written too; below a folder, files and folders may be made.
        """
        try:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            return
        folder = os.path.isdir(path)
        rights = READ_FILE | (READ_DIR if folder else 0)
        if write:
            never = EXECUTE | MAKE_CHAR | MAKE_SOCK | MAKE_BLOCK
            rights |= self._handled & ~never if folder else WRITE_FILE
        rule = struct.pack("=Qi", rights, place)
        which = (ctypes.c_int(self._descriptor), ctypes.c_int(_RULE_PATH_BENEATH))
        try:
            _checked(_syscall(_ADD_RULE, *which, rule, ctypes.c_uint(0)), "landlock_add_rule")
        finally:
            os.close(place)

    def enforce(self) -> None:
        """From here on the rules hold, and cannot be taken back."""
        rules = (ctypes.c_int(self._descriptor), ctypes.c_uint(0))
        _checked(_syscall(_RESTRICT_SELF, *rules), "landlock_restrict_self")
        os.close(self._descriptor)
