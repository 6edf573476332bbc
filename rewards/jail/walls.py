"""The walls that a process puts up around itself before it runs what nobody has read.

What must hold on every system: no process is started, no other one is reached, no socket is opened
and no file outside of the process's own folder is written. A seccomp filter alone sees to all of
it; the rest is a second wall, or more comfort, where the system allows it:

    files      Landlock: reads Python and the system's libraries, writes only its own folder
    network    a network namespace without a way out
    folder     16 MiB of memory as the current folder; without it nothing can be written at all
    user       root becomes a user who owns nothing
    threads    at most 64, where this process can be counted alone

The order matters: rights are given up after what needs them, the filter comes last. A fork stands
behind all of it but the filter, which knows its process and must be put up by each.
"""

import os
import resource
import sys
from contextlib import suppress

from rewards.jail import calls
from rewards.jail.filter import build_filter

SECCOMP = "seccomp"
FILES, NETWORK, FOLDER, USER, THREADS = "files", "network", "folder", "user", "threads"
MAX_THREADS = 64
MAX_OPEN_FILES = 64
FOLDER_MB = 16
# Not those of anybody: users of systemd and of containers lie below.
_FIRST_USER = 1_000_000_000
_NOBODY = 65534
_READABLE = (
    "/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/share/zoneinfo",
    "/etc/localtime", "/etc/ld.so.cache", "/dev/zero", "/dev/random", "/dev/urandom",
)  # fmt: skip


def put_up(memory_mb: int, cpu_s: int) -> None:
    """Put up every wall that this system allows around a process that needs no folder.

    Args:
        memory_mb: limit of the address space, in MiB.
        cpu_s: limit of the processor's time, in seconds, of all threads together.

    Raises:
        OSError: as `surround` and `refuse_calls` do.
    """
    refuse_calls(surround(memory_mb, cpu_s), network=False)


def surround(
    memory_mb: int,
    cpu_s: int,
    network: bool = False,
    folder: bool = False,
    without: tuple[str, ...] = (),
) -> list[str]:
    """Put up the walls that a fork inherits.

    Args:
        memory_mb: limit of the address space, in MiB.
        cpu_s: limit of the processor's time, in seconds, of all threads together.
        network: leave the network open.
        folder: the current folder is an empty one that belongs to this process alone.
        without: walls to leave out, as on a system that lacks them.

    Returns:
        The names of the walls.

    Raises:
        OSError: a wall that should be possible is not.
    """
    apart, counted = (False, False) if NETWORK in without else _namespaces(network)
    landlock = FILES not in without and calls.landlock_version() > 0
    mounted = folder and landlock and apart and FOLDER not in without and _mount_folder()
    rules = _file_rules(network) if landlock else None
    if rules is not None and folder:
        rules.read(os.curdir, write=mounted)
    user = _give_up_rights(readable=landlock, change=USER not in without)
    counted = (counted or user >= _FIRST_USER) and THREADS not in without
    _limit(memory_mb, cpu_s, counted)
    # Its memory is read by nobody, a fork of it with a program inside included.
    calls.forbid_dumps()
    calls.no_new_privileges()
    if rules is not None:
        rules.enforce()
    there = {
        FILES: landlock, NETWORK: apart and not network, FOLDER: mounted, USER: user > 0,
        THREADS: counted,
    }  # fmt: skip
    return [name for name, is_there in there.items() if is_there]


def refuse_calls(walls: list[str], network: bool, child: int | None = None) -> None:
    """Put up the last wall, and be killed when the thread that started this process ends.

    Args:
        walls: those that stand already.
        network: leave the network open.
        child: the one process that may be sent signals.

    Raises:
        OSError: there is no seccomp.
    """
    calls.die_with_parent()
    code = build_filter(os.getpid(), network, writing=FILES in walls, child=child)
    calls.filter_system_calls(code)


def _namespaces(network: bool) -> tuple[bool, bool]:
    """Leave the namespaces of mounts, messages and the network.

    Some systems let anybody make a namespace of users and then allow nothing inside (AppArmor of
    Ubuntu, from 23.10 on). What was left is left all the same; only mounts will be refused.

    Returns:
        Whether it was allowed; whether the processes of this user are counted anew.
    """
    flags = calls.CLONE_NEWNS | calls.CLONE_NEWIPC | (0 if network else calls.CLONE_NEWNET)
    user, group = os.geteuid(), os.getegid()
    alone = user != 0
    try:
        calls.unshare(flags | (calls.CLONE_NEWUSER if alone else 0))
    except OSError:
        return False, False
    if alone:
        with suppress(OSError):
            _write("/proc/self/setgroups", "deny")
            _write("/proc/self/uid_map", f"{user} {user} 1")
            _write("/proc/self/gid_map", f"{group} {group} 1")
    return True, alone


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def _mount_folder() -> bool:
    """Memory as the current folder, gone with the process; containers may forbid it."""
    flags = calls.MS_NOSUID | calls.MS_NODEV | calls.MS_NOEXEC
    here = os.getcwd()
    try:
        # Or the parent would see it, too.
        calls.mount(None, "/", calls.MS_REC | calls.MS_PRIVATE)
        calls.mount("tmpfs", here, flags, f"size={FOLDER_MB}m,nr_inodes=1024,mode=1777")
    except OSError:
        return False
    os.chdir(here)
    return True


def _file_rules(network: bool) -> calls.FileRules:
    rules = calls.FileRules(network)
    for path in {*_READABLE, *_python()}:
        rules.read(path)
    rules.read(os.devnull, write=True)
    return rules


def _python() -> list[str]:
    """Where Python imports from."""
    return [sys.base_prefix, sys.prefix, *filter(None, sys.path)]


def _give_up_rights(readable: bool, change: bool) -> int:
    """Root becomes another user; nobody keeps a capability but, where it must be, to read.

    Args:
        readable: whether Landlock says what may be read; only then may file modes be passed over
            by a user who cannot reach Python, which may lie in the home of root.
        change: whether to become another user at all.

    Returns:
        The new user; 0: not changed.
    """
    user = keep = 0
    if os.geteuid() == 0:
        passing = 1 << calls.CAP_DAC_READ_SEARCH | 1 << calls.CAP_DAC_OVERRIDE
        reachable = all(map(_is_open_to_all, _python()))
        if not reachable and readable:
            keep = calls.permitted_capabilities() & passing
        if change and (reachable or keep):
            user = _change_user()
    calls.set_capabilities(keep)
    return user


def _is_open_to_all(path: str) -> bool:
    """Whether every folder on the way to a path may be passed by everybody."""
    path = os.path.realpath(path)
    while os.path.dirname(path) != path:
        if os.path.isdir(path) and not os.stat(path).st_mode & 0o001:
            return False
        path = os.path.dirname(path)
    return True


def _change_user() -> int:
    calls.keep_capabilities_over_setuid()
    # A container may know few users.
    for user in (_FIRST_USER + os.getpid(), _NOBODY):
        try:
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
        except OSError:
            continue
        return user
    return 0


def _limit(memory_mb: int, cpu_s: int, count_threads: bool) -> None:
    limits = {
        resource.RLIMIT_AS: memory_mb * 2**20,
        resource.RLIMIT_CPU: cpu_s,
        resource.RLIMIT_FSIZE: FOLDER_MB * 2**20,
        resource.RLIMIT_NOFILE: MAX_OPEN_FILES,
        resource.RLIMIT_CORE: 0,
    }
    if count_threads:
        limits[resource.RLIMIT_NPROC] = MAX_THREADS
    for name, most in limits.items():
        _, hard = resource.getrlimit(name)
        lowest = most if hard == resource.RLIM_INFINITY else min(most, hard)
        # The processor's time: first a signal that says why, then the end.
        resource.setrlimit(name, (lowest, lowest + 1 if name == resource.RLIMIT_CPU else lowest))
