"""Acceptance told by servers, against small ones that answer in the documented formats."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from data.errors import DataError
from evaluation.acceptance import read_answer
from evaluation.answering import Question, answer_row
from evaluation.server_acceptance import (
    Counters,
    SglangServer,
    VllmServer,
    acceptance_of_counters,
    parse_counters,
)
from models.tiny_causal import byte_tokenizer
from modes import acceptance_eval, acceptance_table
from runtime.errors import ConfigError
from tests.support import compose_config

# Two engines, as vLLM writes them; other metrics and comments between.
METRICS = """\
# HELP vllm:spec_decode_num_drafts_total Number of spec decoding drafts.
# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{{engine="0",model_name="m"}} {drafts}.0
vllm:spec_decode_num_drafts_total{{engine="1",model_name="m"}} 1.0
vllm:spec_decode_num_drafts_created{{engine="0",model_name="m"}} 1.7e+09
vllm:spec_decode_num_draft_tokens_total{{engine="0",model_name="m"}} 300.0
vllm:spec_decode_num_accepted_tokens_total{{engine="0",model_name="m"}} {accepted}.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{{engine="0",position="0"}} {first}.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{{engine="0",position="1"}} {second}.0
vllm:num_requests_running{{engine="0"}} 0.0
"""


class FakeServer:
    """Answers after a plan; keeps what it was asked."""

    def __init__(self):
        self.asked, self.failures, self.counted = (
            [],
            0,
            dict(drafts=0, accepted=0, first=0, second=0),
        )
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.append((self.path, body))
                if outer.failures:
                    outer.failures -= 1
                    return self.reply(500, "no")
                self.reply(200, json.dumps(outer.answer(self.path, body)))

            def do_GET(self):
                self.reply(200, METRICS.format(**outer.counted))

            def reply(self, code, text):
                self.send_response(code)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        serve = self.server.serve_forever
        threading.Thread(target=serve, args=(0.02,), daemon=True).start()

    def answer(self, path, body):
        if path == "/generate":
            return {
                "text": "fine",
                "output_ids": [5, 6, 7, 8, 9, 10, 11],
                "meta_info": {
                    "id": "x", "finish_reason": {"type": "stop", "matched": 2},
                    "prompt_tokens": len(body["input_ids"]), "completion_tokens": 7,
                    "spec_verify_ct": 2, "spec_accept_length": 3.5,
                },
            }  # fmt: skip
        # Each request: four cycles, of 1, 2, 3 and 3 tokens.
        for key, more in dict(drafts=4, accepted=5, first=3, second=2).items():
            self.counted[key] += more
        message = {"role": "assistant", "content": "fine"}
        return {
            "choices": [{"message": message, "finish_reason": "length"}],
            "usage": {"completion_tokens": 10},
        }


@pytest.fixture
def server():
    fake = FakeServer()
    yield fake
    fake.server.shutdown()
    fake.server.server_close()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer().save_pretrained(folder)
    return folder


def question(number=0):
    return Question("b", f"p{number}", 0, [{"role": "user", "content": "hi"}])


def test_sglang_tells_every_request(server, tokenizer):
    sglang = SglangServer(f"{server.url}/", str(tokenizer), 15, max_new_tokens=64)
    replies = sglang.answer([question(number) for number in range(5)])
    assert [(r.tokens, r.cycles, r.finish, r.error) for r in replies] == [(7, 2, "stop", None)] * 5
    path, body = server.asked[0]
    ids = byte_tokenizer().apply_chat_template(
        question().messages, add_generation_prompt=True, enable_thinking=False, return_dict=False
    )
    assert path == "/generate" and body["input_ids"] == ids
    assert body["sampling_params"] == {"temperature": 0.0, "max_new_tokens": 64}
    row = answer_row("draft", "b", {"id": "p0", "source": "s"}, 0, replies[0], sglang.drafted)
    answer = read_answer(row, "row")
    assert (answer.committed, answer.cycles, answer.accepted) == (6, 2, None)


def test_a_request_is_tried_again_and_then_an_error(server, tokenizer, monkeypatch):
    monkeypatch.setattr("evaluation.server_acceptance.time.sleep", lambda _: None)
    sglang = SglangServer(server.url, str(tokenizer), 15, max_new_tokens=64)
    server.failures = 2
    assert sglang.answer([question()])[0].tokens == 7 and len(server.asked) == 3
    server.failures = 3
    (reply,) = sglang.answer([question()])
    assert reply.tokens == 0 and "500" in reply.error and server.url in reply.error


def test_a_server_without_a_draft_is_told(server, tokenizer, monkeypatch):
    monkeypatch.setattr("evaluation.server_acceptance.time.sleep", lambda _: None)
    plain = server.answer("/generate", {"input_ids": []})
    del plain["meta_info"]["spec_verify_ct"]
    server.answer = lambda path, body: plain
    (reply,) = SglangServer(server.url, str(tokenizer), 15, 64).answer([question()])
    assert "the server runs without a draft" in reply.error
    with pytest.raises(DataError, match=r"here/metrics: no vllm:spec_decode_num_drafts_total"):
        parse_counters("vllm:num_requests_running 0.0\n", "here")
    with pytest.raises(DataError, match=r"mode\.server\.base_url=http://127\.0\.0\.1:9/metrics"):
        VllmServer("http://127.0.0.1:9", "m", 2, 64).counters()


def test_vllm_counts(server):
    vllm = VllmServer(server.url, "m", drafted=2, max_new_tokens=64)
    before = vllm.counters()
    assert before == Counters(1, 0, (0, 0))
    replies = vllm.answer([question(number) for number in range(3)])
    counted = vllm.counters().since(before)
    assert counted == Counters(12, 15, (9, 6))
    found = acceptance_of_counters(counted, replies, 3, vllm.drafted)
    assert found.tau == pytest.approx(1 + 15 / 12) and found.tau_served == pytest.approx(30 / 12)
    assert [slot.cumulative for slot in found.slots] == pytest.approx([9 / 12, 6 / 12])
    assert [slot.conditional for slot in found.slots] == pytest.approx([9 / 12, 6 / 9])
    assert found.tau == pytest.approx(1 + sum(slot.cumulative for slot in found.slots))
    assert (found.tau_low, found.tau_macro, found.capped, found.ceiling) == (None, None, 3, 3)
    assert server.asked[0][1]["chat_template_kwargs"] == {"enable_thinking": False}
    with pytest.raises(DataError, match="15 accepted in 12 drafts of 1"):
        acceptance_of_counters(counted, replies, 3, 1)


def prompts(folder):
    rows = [{"id": f"p{n}", "source": "s", "prompt": "hi"} for n in range(3)]
    (folder / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"mode.prompts={{b: {folder}/p.jsonl}}"


def served(folder, name, url, *more, out="out"):
    options = ("mode=acceptance_eval", f"mode/server={name}", f"mode.server.base_url={url}")
    cfg = compose_config(
        *options, prompts(folder), "mode.server.target=m", *more, run_dir=folder / out
    )
    return acceptance_eval.run(cfg)


def test_the_mode_measures_sglang(server, tokenizer, tmp_path):
    option = f"mode.server.tokenizer={tokenizer}"
    metrics = served(tmp_path, "sglang", server.url, option)
    assert metrics["tau/b"] == 3.0 and metrics["tau_served/b"] == 3.5 and metrics["answers/b"] == 3
    result = json.loads((tmp_path / "out" / "acceptance.json").read_text())
    assert result["conditions"]["backend"] == "sglang" and result["conditions"]["target"] == "m"
    assert result["acceptance"]["draft"]["b"]["slots"] is None
    table = compose_config(
        "mode=acceptance_table", f"mode.runs={tmp_path}/out", run_dir=tmp_path / "t"
    )
    assert acceptance_table.run(table)["tau/out"] == 3.0


def test_the_mode_measures_vllm_without_rows(server, tmp_path):
    metrics = served(tmp_path, "vllm", server.url, "mode.server.drafted=2")
    assert metrics["tau/b"] == pytest.approx(2.25) and "tau_low/b" not in metrics
    table = compose_config(
        "mode=acceptance_table", f"mode.runs={tmp_path}/out", run_dir=tmp_path / "t"
    )
    with pytest.raises(ConfigError, match="a server that only counts leaves no rows"):
        acceptance_table.run(table)


def test_what_a_server_cannot_do_is_refused(server, tmp_path):
    for more in ("mode.reference_draft=x", "mode/verification=rejection"):
        with pytest.raises(ConfigError, match="the server has the draft and verifies greedily"):
            served(tmp_path, "vllm", server.url, more)
    with pytest.raises(DataError, match=r"mode\.server\.tokenizer=m: cannot be loaded"):
        served(tmp_path, "sglang", server.url)
