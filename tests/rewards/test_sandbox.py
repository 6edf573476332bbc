"""Hostile programs are contained and count as failures; plain ones pass."""

import os
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from rewards.sandbox import Outcome, find_walls, run_python
from tests.support import ROOT
from tests.test_layering import imported

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="programs are run on Linux only")

# Everything this system has, and what every system must have.
ALL: tuple[str, ...] = ()
BARE = ("files", "network", "user", "threads")
both = pytest.mark.parametrize("without", [ALL, BARE], ids=["all walls", "seccomp alone"])

HOSTILE = {
    "fork bomb": "import os\nwhile True: os.fork()",
    "fork, errors ignored": "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass",
    "subprocess": "import subprocess\nsubprocess.run(['/bin/true'], check=True)",
    "shell": "import os\nassert os.system('true') == 0",
    "new program": "import os\nos.execv('/bin/true', ['true'])",
    "daemon": "import os\nif os.fork() == 0:\n  os.setsid()\n  while True: pass",
    "kill the parent": "import os\nos.kill(os.getppid(), 9)",
    "kill everybody": "import os\nos.kill(-1, 9)",
    "kill the group": "import os\nos.killpg(0, 9)",
    "signal by file": "import fcntl, os\nfcntl.fcntl(1, fcntl.F_SETOWN, os.getppid())",
    "limit of the parent": "import os, resource\nresource.prlimit(os.getppid(), 0, (1, 1))",
    "raise the limits": "import resource\nresource.setrlimit(resource.RLIMIT_AS, (2**40, 2**40))",
    "become root": "import os\nos.setuid(0)\nassert os.getuid()\nos.chown('.', 0, 0)",
    "new namespace": "import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0",
    "outlive the parent": "import ctypes\nassert ctypes.CDLL(None).prctl(1, 0) == 0",
    "trace": "import ctypes\nassert ctypes.CDLL(None).ptrace(0, 0, 0, 0) == 0",
    "uncounted memory": "import os\nos.memfd_create('x')",
    "endless loop": "while True: pass",
    "endless sleep": "import time\ntime.sleep(1000)",
    "endless output": "while True: print('x' * 2**20)",
    "endless pattern": "import re\nre.match('(a+)+$', 'a' * 64 + 'b')",
    "memory": "hog = []\nwhile True: hog.append(bytearray(2**24))",
    "large number": "9 ** 9 ** 9 ** 9",
    "many threads": "import threading, time\nwhile True:\n"
    "  threading.Thread(target=time.sleep, args=(99,)).start()",
    "endless thread": "import threading, time\n"
    "threading.Thread(target=time.sleep, args=(99,)).start()",
    "exit 0": "import sys\nsys.exit(0)",
    "exit at once": "import os\nos._exit(0)",
    "exit in a thread": "import os, threading\n"
    "threading.Thread(target=os._exit, args=(0,)).start()\nwhile True: pass",
    "interrupt": "raise KeyboardInterrupt",
    "system exit": "raise SystemExit",
    "odd exception": "class E(BaseException):\n  def __str__(self): raise SystemExit\nraise E",
    "crash": "import ctypes\nctypes.string_at(0)",
    "deep recursion": "x = ()\nfor _ in range(2 * 10**5): x = (x,)\nhash(x)",
    "kill itself": "import signal\nsignal.raise_signal(9)",
    "signal without a name": "import signal\nsignal.raise_signal(40)",
    "stop itself": "import signal\nsignal.raise_signal(signal.SIGSTOP)",
    "close everything": "import os\nos.closerange(0, 4096)",
    "close and go on": "import os\nos.closerange(0, 4096)\nwhile True: pass",
    "flood every pipe": "import os\nfor fd in range(4096):\n"
    "  try:\n    while True: os.write(fd, b'x' * 4096)\n  except OSError: pass",
    "claim to have passed": "import os\nfor fd in range(4096):\n"
    '  try: os.write(fd, b\'["passed", ""]\')\n  except OSError: pass\nos._exit(0)',
    "odd text": "raise ValueError('\\ud800\\x1b[2J\\n' + 'x' * 999)",
    "syntax": "def f(:",
    "nul": "x = 1\0",
}
# Nothing but the limit ends these.
ENDLESS = {
    "fork, errors ignored", "endless loop", "endless sleep", "endless output", "endless pattern",
    "endless thread", "flood every pipe", "large number", "stop itself",
}  # fmt: skip
WORDS = {
    "memory": ("memory", "more than 256 MiB"),
    "exit 0": ("failed", "SystemExit: 0"),
    "exit at once": ("failed", "ended before its end, with exit code 0"),
    "deep recursion": ("killed", "killed by SIGSEGV"),
    "signal without a name": ("killed", "killed by signal 40"),
    "crash": ("killed", "killed by SIGSEGV"),
    "kill itself": ("killed", "killed by SIGKILL"),
    "fork bomb": ("failed", "PermissionError: [Errno 1] Operation not permitted"),
}


@both
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_programs_fail(name, without):
    children = psutil.Process().children()
    start = time.monotonic()
    limit = 0.4 if name in ENDLESS else 20
    outcome = run_python(HOSTILE[name], timeout_s=limit, memory_mb=256, without=without)
    assert time.monotonic() - start < 10
    if name in ENDLESS:
        assert outcome == Outcome("timeout", "timed out after 0.4 s")
    else:
        assert outcome.status in ("failed", "memory", "killed")
    assert outcome.detail.isprintable() and len(outcome.detail) < 400
    if name in WORDS:
        assert (outcome.status, outcome.detail) == WORDS[name]
    assert psutil.Process().children() == children


@both
@pytest.mark.parametrize(
    "program",
    [
        "",
        "import collections, decimal, hashlib, heapq, itertools, math, random, re, typing",
        "import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()",
        "from dataclasses import dataclass\n@dataclass\nclass A:\n  x: 'int'\nassert A(1) == A(1)",
        "assert hash('a') == hash('a') and len(bytearray(2**27)) == 2**27",
        "import asyncio\nasync def f(): return 1\nassert asyncio.run(f()) == 1",
        "import sys, os\nassert not os.environ.get('HOME') and 'data' not in sys.modules\n"
        "try:\n  import torch\nexcept ImportError: pass\nelse: raise AssertionError",
        "import threading, time\n"
        "threading.Thread(target=time.sleep, args=(99,), daemon=True).start()",
    ],
)
def test_plain_programs_pass(program, without):
    assert run_python(program, timeout_s=20, without=without) == Outcome("passed")


def test_equal_runs():
    """Order of sets and hashes of texts do not change from run to run."""
    program = "raise ValueError(str({'a', 'b', 'c', 'd', 'e'}))"
    assert len({run_python(program).detail for _ in range(4)}) == 1


@both
def test_files_outside_cannot_be_changed(tmp_path, monkeypatch, without):
    """Not even those that everybody may write."""
    monkeypatch.chdir(tmp_path)
    tmp_path.chmod(0o777)
    old, new = tmp_path / "old", Path.home() / f"sandbox-{os.getpid()}"
    old.write_text("as it was")
    old.chmod(0o666)
    attempts = [
        *(f"open({str(path)!r}, 'w')" for path in (old, new, ROOT / new.name, "/tmp/x", "../x")),
        *(f"open({str(old)!r}, {mode!r})" for mode in ("a", "r+")),
        f"__import__('os').open({str(old)!r}, 64 | 512)",
        *(
            f"__import__('os').{call}"
            for call in (
                f"unlink({str(old)!r})", f"truncate({str(old)!r}, 0)", f"chmod({str(old)!r}, 0)",
                f"utime({str(old)!r}, (0, 0))", f"rename({str(old)!r}, {str(new)!r})",
                f"mkdir({str(tmp_path / 'folder')!r})", f"symlink('/', {str(tmp_path / 'l')!r})",
                f"link({str(old)!r}, {str(tmp_path / 'l')!r})", "rmdir('../x')", "mkfifo('/tmp/f')",
            )
        ),
        "__import__('socket').socketpair(type=2)",
    ]  # fmt: skip
    program = "\n".join(
        f"try: {attempt}\nexcept OSError: pass\nelse: raise SystemExit({attempt!r})"
        for attempt in attempts
    )
    before = old.stat()
    assert run_python(program, timeout_s=20, without=without) == Outcome("passed")
    assert old.read_text() == "as it was" and os.listdir(tmp_path) == ["old"]
    assert (old.stat().st_mtime_ns, old.stat().st_mode) == (before.st_mtime_ns, before.st_mode)
    assert not new.exists() and not (ROOT / new.name).exists()


def test_its_own_folder_is_small_and_gone():
    if "folder" not in find_walls():
        pytest.skip("no mount namespace here")
    write = "open('a', 'wb').write(bytes({} * 2**20))\nassert len(open('a', 'rb').read())"
    assert run_python(write.format(10)).status == "passed"
    assert "OSError" in run_python(write.format(17)).detail
    many = "for n in range(40): open(str(n), 'wb').write(bytes(2**20))"
    assert "No space left" in run_python(many).detail
    inside = "import os, tempfile\nassert tempfile.gettempdir() == os.getcwd()\n"
    assert run_python(inside + "raise ValueError(os.getcwd())").status == "failed"
    where = run_python("import os\nraise ValueError(os.getcwd())").detail.split(": ")[1]
    assert not Path(where).exists()


def test_secrets_cannot_be_read(tmp_path):
    if "files" not in find_walls():
        pytest.skip("no Landlock here")
    secret = tmp_path / "secret"
    secret.write_text("key")
    for path in (secret, ROOT / "README.md", "/etc/passwd", f"/proc/{os.getpid()}/environ"):
        outcome = run_python(f"open({str(path)!r}).read()")
        assert "Permission denied" in outcome.detail


@both
def test_the_network_is_closed(without):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        port = listener.getsockname()[1]
        call = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=1)"
        assert run_python(call, without=without).status == "failed"
        with pytest.raises(BlockingIOError):
            listener.accept()
        assert run_python(call, without=without, allow_network=True) == Outcome("passed")
        listener.accept()[0].close()


# A namespace of users that nobody is let into, as AppArmor's restriction of Ubuntu has it.
NO_MAPS = (
    "import sys; sys.path.insert(0, sys.argv[1]); from rewards.jail import walls\n"
    "def refuse(*_): raise PermissionError(13, 'Permission denied')\n"
    "walls._write = walls.calls.mount = refuse\n"
)


@pytest.mark.parametrize("before", ["", NO_MAPS], ids=["namespaces", "useless namespaces"])
def test_another_user_without_any_rights(before):
    """What users see who are not root: rights come from a user namespace, if from anywhere."""
    python = shutil.which("python3", path="/usr/bin")
    if os.geteuid() != 0 or python is None:
        pytest.skip("needs root, and a Python that everybody can reach")
    programs = ["pass", "import os\nos.fork()", "import os\nos.kill(os.getppid(), 9)"]
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import rewards.sandbox as box;"
        f" box._START = {before!r} + box._START;"
        f" print([box.run_python(p, timeout_s=20).status for p in {programs}],"
        " 'folder' in box.find_walls())"
    )
    done = subprocess.run(
        [python, "-c", code], user=4321, group=4321, extra_groups=[], cwd="/", env={},
        capture_output=True, text=True,
    )  # fmt: skip
    if "SyntaxError" in done.stderr or "ImportError" in done.stderr:
        pytest.skip(f"{python} is too old")
    ended, folder = done.stdout.rsplit(maxsplit=1)
    assert ended == "['passed', 'failed', 'failed']", done.stderr
    # Without rights inside nothing can be mounted, and that wall is not named.
    assert not (before and folder == "True")


def test_many_programs_side_by_side():
    programs = [f"assert sum(range({n})) == {n * (n - 1) // 2}" for n in range(40)]
    programs[7] = "assert False"
    start = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(lambda program: run_python(program, timeout_s=20), programs))
    took = time.monotonic() - start
    print(f"{1000 * took / 40:.0f} ms per program, two at a time")
    assert [n for n, outcome in enumerate(outcomes) if outcome.status != "passed"] == [7]
    assert took < 20


@pytest.mark.parametrize("limits", [{"timeout_s": 0}, {"memory_mb": 63}])
def test_limits_out_of_range(limits):
    with pytest.raises(ValueError, match=r"timeout_s=.*, memory_mb=.*: allowed"):
        run_python("", **limits)


def test_the_least_memory_suffices():
    assert run_python("import typing, math, collections", memory_mb=64) == Outcome("passed")


def test_a_system_without_seccomp_is_refused(monkeypatch):
    """The process that finds the walls out cannot install its filter."""
    find_walls.cache_clear()
    monkeypatch.setattr("rewards.sandbox._START", "import sys; sys.exit(3)")
    with pytest.raises(ValueError, match=r"sandbox: .*exit code 3.*needed at least: seccomp"):
        run_python("")
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ValueError, match="on Linux only; this is darwin"):
        run_python("")


def test_a_program_dies_with_the_process_that_started_it(tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from rewards.sandbox import run_python;"
        " run_python(''); print('ready', flush=True);"
        " run_python('import time\\ntime.sleep(99)', timeout_s=99)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    with parent.stdout as pipe:
        assert pipe.readline() == b"ready\n"
    # One that tests, one that is tested.
    while len(children := psutil.Process(parent.pid).children(recursive=True)) < 2:
        time.sleep(0.01)
    # Until it has put up its walls nothing binds it to its parent.
    while children[0].uids().real == os.getuid() == 0:
        time.sleep(0.01)
    time.sleep(0.3)
    parent.kill()
    parent.wait()
    assert not psutil.wait_procs(children, timeout=10)[1]


def test_what_runs_inside_needs_no_packages():
    files = [*(ROOT / "rewards" / "jail").glob("*.py"), ROOT / "rewards" / "__init__.py"]
    names = {name for file in files for name in imported(file.relative_to(ROOT))}
    assert names <= {"rewards", *sys.stdlib_module_names}
