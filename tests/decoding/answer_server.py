"""A small HTTP server in the shape of OpenAI's, which does what the last message tells it to.

Run as a process: `python answer_server.py PORT_FILE DELAY_S DIE_AFTER`. A message "500 a" is
answered by the status 500, "html b" by a page, "hang c" too late, any other by itself in capitals.
"""

import json
import os
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PORT_FILE, DELAY_S, DIE_AFTER = Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
ATTEMPTS: Counter[str] = Counter()
BODIES: dict[str, dict] = {}
LOCK = threading.Lock()
STATE = {"answered": 0, "under_way": 0, "most": 0}

# What Python reads 1e999 as, and writes as Infinity.
TOLD_LENGTHS = {"endless": float("inf"), "negative": -3, "lengthy": "many"}

BARRIERS: dict[int, threading.Barrier] = {}


def barrier_of(count: int) -> threading.Barrier:
    """ "meet 3 a" is answered when three such requests are under way."""
    with LOCK:
        return BARRIERS.setdefault(count, threading.Barrier(count))


def reply_to(content: str, body: dict) -> dict:
    command = content.split()[0] if content.split() else ""
    text = content.upper()[: body["max_tokens"]]
    ids = list(text.encode())
    finish = "length" if len(content) > body["max_tokens"] else "stop"
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "finish_reason": finish}
    if body.get("return_token_ids") and command != "noids":
        choice["token_ids"] = ["a"] if command == "badids" else ids
    if body.get("logprobs"):
        values = [float("nan") if command == "nan" else -0.5] * len(ids)
        content_of = {"content": [{"token": "x", "logprob": value} for value in values]}
        choice["logprobs"] = content_of if "messages" in body else {"token_logprobs": values}
    if command == "tool":
        choice["finish_reason"] = "tool_calls"
    if command == "reasoning":
        message["reasoning_content"] = "hm"
    if command == "null":
        message["content"] = None
    choice |= {"message": message} if "messages" in body else {"text": text}
    if command in TOLD_LENGTHS:
        return {"choices": [choice], "usage": {"completion_tokens": TOLD_LENGTHS[command]}}
    return {"choices": [choice], "usage": {"completion_tokens": len(ids)}}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def send(self, status, content, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self):
        found = {"attempts": ATTEMPTS, "bodies": BODIES, "state": STATE}
        self.send(200, json.dumps(found).encode())

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        content = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
        content = content if isinstance(content, str) else bytes(content).decode()
        with LOCK:
            ATTEMPTS[content] += 1
            BODIES[content] = body
            STATE["answered"] += 1
            STATE["under_way"] += 1
            STATE["most"] = max(STATE["most"], STATE["under_way"])
            if DIE_AFTER and STATE["answered"] > DIE_AFTER:
                os._exit(1)
            attempt = ATTEMPTS[content]
        if content.startswith("meet"):
            barrier_of(int(content.split()[1])).wait(20)
        time.sleep(0.5 if content.startswith("slow") else DELAY_S)
        with LOCK:
            STATE["under_way"] -= 1
        command = content.split()[0] if content.split() else ""
        if command == "drop":
            self.close_connection = True
        elif command == "hang":
            time.sleep(5)
        elif command == "huge":
            self.send(200, b" " * (65 << 20))
        elif command == "html":
            self.send(200, b"<html>Welcome</html>")
        elif command == "half":
            self.send(200, b'{"choices": [{"mess')
        elif command == "array":
            self.send(200, b"[1, 2]")
        elif command == "deep":
            self.send(200, b"[" * 100_000)
        elif command == "empty":
            self.send(200, b'{"choices": []}')
        elif command in ("400", "500", "503"):
            self.send(int(command), b'{"error": "no"}')
        elif command == "busy" and attempt < 3:
            self.send(429, b"slow down", Retry_After="0")
        else:
            self.send(200, json.dumps(reply_to(content, body)).encode())


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    temporary = PORT_FILE.with_suffix(".tmp")
    temporary.write_text(str(server.server_address[1]))
    temporary.replace(PORT_FILE)
    server.serve_forever()
