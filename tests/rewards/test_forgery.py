"""A program passes by right values only: not by what it writes, changes, breaks or finds."""

import sys

import pytest

from rewards.sandbox import Outcome, find_walls, run_python

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="programs are run on Linux only")

BARE = ("files", "network", "user", "threads")
both = pytest.mark.parametrize("without", [(), BARE], ids=["all walls", "seccomp alone"])

TESTS = "assert candidate(1) == 5\n"
WRONG = "def f(x): return 0\n"
EVERY = "import os, json\nfor fd in range(250):\n  try: os.write(fd, {})\n  except OSError: pass\n"
FORGED = {
    # What gave every verdict away while one process held program, tests and report.
    "take the token": WRONG + "import os\ntoken, outs = b'', []\nfor fd in range(100, 250):\n"
    "  try: os.fstat(fd)\n  except OSError: continue\n"
    "  try: token = os.read(fd, 32)\n  except OSError: outs.append(fd)\n"
    "for fd in outs: os.write(fd, token + b'[\"passed\", \"\", []]')\nos._exit(0)",
    "a report": WRONG + EVERY.format("b'[\"passed\", \"\", []]'") + "os._exit(0)",
    "a report, later": EVERY.replace("\n", "\n  ").replace("import", "def f(x):\n  import", 1)
    .format("b'[\"passed\", \"\", []]'") + "os._exit(0)",
    "ready and the end": WRONG + EVERY.format("b'[\"ready\"]\\n'") + "os._exit(0)",
    "ready and refused": WRONG + EVERY.format("b'[\"ready\"]\\n[\"refused\", \"x\"]\\n'"),
    "refused": WRONG + EVERY.format("b'[\"refused\", \"x\"]\\n'"),
    "values beforehand": WRONG + EVERY.format("b'[\"ready\"]\\n[\"value\", 4]\\n'") + "input()",
    "truth": "def f(x): return True",
    "no plain value": "def f(x):\n  class E:\n    __eq__ = lambda *a: True\n  return E()",
    "a mapping for a value": WRONG + EVERY.format("b'[\"ready\"]\\n[\"value\", {}]\\n'"),
    "no name": WRONG + EVERY.format("b'[\"ready\"]\\n[\"raised\", 7, []]\\n'"),
    "an odd name": WRONG + EVERY.format("b'[\"ready\"]\\n[\"raised\", \"a\\\\u0000\", []]\\n'"),
    "nothing in a list": WRONG + EVERY.format("b'[\"ready\"]\\n[]\\n'"),
    "deep": WRONG + EVERY.format("b'[\"ready\"]\\n' + b'[' * 30000 + b'\\n'"),
    "end in the call": "def f(x):\n  import os\n  os._exit(0)",
    "exit in the call": "def f(x): raise SystemExit(0)",
    "builtins of its own": WRONG + "import builtins\nbuiltins.AssertionError = Warning",
    "frames of the caller": "def f(x):\n  import sys\n  frame = sys._getframe()\n"
    "  while frame.f_back: frame = frame.f_back; frame.f_globals['candidate'] = lambda x: 5\n"
    "  return 0",
    "objects of the tests": WRONG + "import gc\nfor thing in gc.get_objects():\n"
    "  if isinstance(thing, dict) and 'candidate' in thing: thing['candidate'] = lambda x: 5",
}  # fmt: skip


@both
@pytest.mark.parametrize("name", FORGED)
def test_forged_verdicts_fail(name, without):
    outcome = run_python(FORGED[name], tests=TESTS, entry_point="f", timeout_s=20, without=without)
    assert outcome.status == "failed" and outcome.detail.isprintable()


def test_the_same_tests_pass_by_the_right_value():
    right = Outcome("passed")
    assert run_python("def f(x): return 5", tests=TESTS, entry_point="f") == right
    said = WRONG + EVERY.format('b\'["ready"]\\n["value", 5]\\n\'')
    # As good as returning it; what it would say else is not heard any more.
    assert run_python(said, tests=TESTS, entry_point="f") == right


def test_without_tests_a_program_passes_by_its_own_word():
    said = EVERY.format("b'[\"ready\"]\\n'") + "os._exit(0)\nassert False"
    assert run_python(said) == Outcome("passed")


CHANGED = {
    "a function of a module": (
        "import json\njson.dumps = lambda *a: '5'",
        "import json\nassert json.dumps(candidate(1)) == '5'",
    ),
    "a module not imported yet": (
        "import sys, types\nclass Finder:\n  def find_spec(name, *a):\n"
        "    if name == 'fractions':\n      import importlib.util\n"
        "      return importlib.util.spec_from_loader(name, Finder)\n"
        "  def create_module(spec): return None\n"
        "  def exec_module(module): module.Fraction = lambda *a: 5\n"
        "sys.meta_path.insert(0, Finder)\nsys.modules.pop('fractions', None)",
        "from fractions import Fraction\nassert Fraction(candidate(1)) == 5",
    ),
    "an early end of a loop": (
        "def f(x): raise StopIteration",
        "for value, right in zip(map(candidate, [1]), [5]): assert value == right",
    ),
}


@pytest.mark.parametrize("name", CHANGED)
def test_tests_have_builtins_and_modules_of_their_own(name):
    program, tests = CHANGED[name]
    outcome = run_python(WRONG + program, tests=tests, entry_point="f", timeout_s=20)
    assert outcome.status == "failed"
    assert run_python("def f(x): return 5", tests=tests, entry_point="f") == Outcome("passed")


def test_nothing_of_the_tests_is_in_the_program_s_memory():
    """Read where nothing but the filter stands, so that /proc is open."""
    program = """
import re
def f(x):
    import os
    found, seen = [], 0
    with open('/proc/self/maps') as maps, open('/proc/self/mem', 'rb') as memory:
        for line in maps:
            place, rights = line.split()[:2]
            start, end = (int(part, 16) for part in place.split('-'))
            if 'r' in rights and '[v' not in line:
                memory.seek(start)
                text = memory.read(end - start)
                seen += len(re.findall(rb'Own[W]ord', text))
                found += re.findall(rb'Expected[V]alue', text)
    other = []
    for path in ('mem', 'fd/0', 'fd/1', 'environ'):
        try: open(f'/proc/{os.getppid()}/{path}', 'rb').read(1)
        except PermissionError: pass
        else: other.append(path)
    # A word of this text is found, so the search works.
    return 'OwnWord' and (seen > 0, len(found), other)
"""
    tests = "hidden = 'ExpectedValue'\nassert candidate(1) == (True, 0, []), repr(candidate(1))"
    outcome = run_python(
        program, tests=tests, entry_point="f", timeout_s=20, memory_mb=512, without=BARE
    )
    assert outcome == Outcome("passed")


def test_files_of_the_process_that_tests_are_closed():
    if "files" not in find_walls():
        pytest.skip("no Landlock here")
    program = "import os\nos.listdir(f'/proc/{os.getppid()}')"
    assert "Permission denied" in run_python(program).detail


@pytest.mark.parametrize(
    "raised, caught",
    [
        ("ValueError('x', 1)", "ValueError"),
        ("KeyError('x')", "LookupError"),
        ("type('Own', (ValueError,), {})('x')", "Exception"),
        ("ValueError(object())", "ValueError"),
        ("UnicodeDecodeError('utf8', b'a', 0, 1, 'x')", "UnicodeError"),
    ],
)
def test_tests_may_expect_exceptions(raised, caught):
    tests = f"try: candidate()\nexcept {caught}: pass\nelse: assert False"
    program = f"def f(): raise {raised}"
    assert run_python(program, tests=tests, entry_point="f") == Outcome("passed")
    assert run_python("def f(): return 1", tests=tests, entry_point="f").status == "failed"


def test_a_swallowed_end_is_no_success():
    tests = "try: candidate()\nexcept BaseException: pass"
    program = "import os\ndef f(): os._exit(0)"
    assert run_python(program, tests=tests, entry_point="f").status == "failed"


def test_arguments_and_values_are_copies():
    program = "kept = []\ndef f(x): x.append(1); kept.append(x); return kept"
    tests = (
        "a = [0]\nvalue = candidate(a)\nassert a == [0] and value == [[0, 1]]\nvalue.clear()\n"
        "assert candidate(x=[2]) == [[0, 1], [2, 1]]\n"
    )
    assert run_python(program, tests=tests, entry_point="f") == Outcome("passed")
    outcome = run_python(program, tests="candidate(print)", entry_point="f")
    assert outcome.detail == (
        "TypeError: an object of builtin_function_or_method, which is no plain value, cannot be"
        " passed (line 1 of the tests)"
    )


def test_limits_hold_in_calls():
    """And in tests, which values can keep busy."""
    for end, limit, *words in (
        ("while True: pass", 0.5, "timeout", "timed out after 0.5 s"),
        ("__import__('time').sleep(99)", 0.5, "timeout", "timed out after 0.5 s"),
        ("return [bytearray(2**24) for n in range(99)]", 20, "memory", "more than 256 MiB"),
        ("return 'x' * 2**25", 20, "failed", "what the program's process said is no answer"),
        ("__import__('ctypes').string_at(0)", 20, "killed", "killed by SIGSEGV"),
    ):
        outcome = run_python(
            f"def f():\n  {end}", tests="candidate()", entry_point="f", timeout_s=limit,
            memory_mb=256,
        )  # fmt: skip
        assert outcome == Outcome(*words)
    busy = {"for n in range(candidate()): pass": "timeout", "9 ** candidate() ** 9": "timeout"}
    for tests, status in busy.items():
        program = "def f(): return 10**12"
        assert run_python(program, tests=tests, entry_point="f", timeout_s=0.5).status == status
