"""A judge that does what it is asked to, good or bad."""

import os
import time
from pathlib import Path

WARM_UP = [{"action": "count"}]
counted = 0


def judge(action: str, value: int = 0) -> object:
    global counted
    if action == "count":
        counted += 1
    elif action == "hang":
        time.sleep(1000)
    elif action == "end":
        os._exit(value)
    elif action == "hog":
        return len([bytearray(2**24) for _ in range(10**6)])
    elif action == "raise":
        raise LookupError("first line\nsecond line")
    elif action == "fork":
        os.fork()
    elif action == "read":
        return Path(__file__).parents[2].joinpath("README.md").read_text()
    elif action == "write":
        os.closerange(0, 4096)
    elif action == "long":
        return "x" * value
    return [counted, value, os.environ.get("HOME")]
