"""Servers that tests start as processes of their own and end again."""

import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PROGRAM = Path(__file__).with_name("answer_server.py")


@dataclass
class AnswerServer:
    process: subprocess.Popen
    url: str

    def seen(self, what: str) -> dict:
        """`attempts` or `bodies` by the content of the last message, or the `state`."""
        with urllib.request.urlopen(self.url) as reply:
            return json.load(reply)[what]


@contextmanager
def answer_server(folder: Path, delay_s: float = 0.0, die_after: int = 0) -> Iterator[AnswerServer]:
    """Run `answer_server.py`."""
    port_file = folder / f"port-{time.monotonic_ns()}"
    arguments = [str(PROGRAM), str(port_file), str(delay_s), str(die_after)]
    process = subprocess.Popen([sys.executable, "-I", *arguments])
    try:
        deadline = time.monotonic() + 60
        while not port_file.is_file():
            assert process.poll() is None and time.monotonic() < deadline, "did not start"
            time.sleep(0.02)
        yield AnswerServer(process, f"http://127.0.0.1:{port_file.read_text()}/v1")
    finally:
        process.kill()
        process.wait()
