"""Freed memory stays with the process."""

import json
import subprocess
import sys

import pytest

PROGRAM = """
import json, resource, sys, torch
from runtime.memory import keep_freed_memory

told = keep_freed_memory() if sys.argv[1] == "keep" else None
head, faults = torch.nn.Linear(768, 20_000), []
for step in range(12):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    head(torch.randn(128 + step, 768)).logsumexp(-1).sum().backward()
    head.zero_grad()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(json.dumps([told, sum(faults[6:])]))
"""


def faults_of_late_steps(what: str) -> tuple[bool | None, int]:
    command = [sys.executable, "-c", PROGRAM, what]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return tuple(json.loads(done.stdout))


@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone has mallopt")
def test_later_steps_touch_few_new_pages():
    """Page faults of training steps of varying shape, once the first ones have been made."""
    told, kept = faults_of_late_steps("keep")
    if not told:
        pytest.skip("this C library has no mallopt")
    _, default = faults_of_late_steps("default")
    assert default > 50_000 and kept < default / 5
