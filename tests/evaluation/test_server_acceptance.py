"""Acceptance told by servers, against small ones that answer in the documented formats."""

import importlib
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from data.errors import DataError
from decoding.server_protocol import ServerError
from evaluation.acceptance import read_answer
from evaluation.acceptance_log import read_rows
from evaluation.answering import Question, Reply, answer_row
from evaluation.server_acceptance import SglangServer, VllmServer
from evaluation.server_client import known_finish
from evaluation.server_counters import Counters, acceptance_of_counters, parse_counters
from models.tiny_causal import byte_tokenizer
from modes import acceptance_eval, acceptance_table
from runtime.errors import ConfigError
from tests.forks import Fork
from tests.support import ROOT, compose_config

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
        self.asked, self.failures, self.status, self.headers = [], 0, 500, []
        self.counted = dict(drafts=0, accepted=0, first=0, second=0)
        self.info = {"speculative_draft_model_path": "some/draft"}
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.append((self.path, body))
                outer.headers.append(self.headers["Authorization"])
                if outer.failures:
                    outer.failures -= 1
                    return self.reply(outer.status, "no")
                self.reply(200, json.dumps(outer.answer(self.path, body)))

            def do_GET(self):
                if self.path == "/get_server_info":
                    return self.reply(200, json.dumps(outer.info))
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
    assert body["sampling_params"] == {
        "temperature": 0.0, "max_new_tokens": 64, "top_p": 1.0, "top_k": -1, "min_p": 0.0,
        "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
    }  # fmt: skip
    row = answer_row("draft", "b", {"id": "p0", "source": "s"}, 0, replies[0], sglang.drafted)
    answer = read_answer(row, "row")
    assert (answer.committed, answer.cycles, answer.accepted) == (6, 2, None)


def test_a_request_is_tried_again_and_then_an_error(server, tokenizer, monkeypatch):
    monkeypatch.setattr("evaluation.server_client.time.sleep", lambda _: None)
    sglang = SglangServer(server.url, str(tokenizer), 15, max_new_tokens=64)
    server.failures = 2
    assert sglang.answer([question()])[0].tokens == 7 and len(server.asked) == 3
    server.failures = 3
    (reply,) = sglang.answer([question()])
    assert reply.tokens == 0 and "500" in reply.error and server.url in reply.error


def test_a_server_without_a_draft_is_told(server, tokenizer, monkeypatch):
    monkeypatch.setattr("evaluation.server_client.time.sleep", lambda _: None)
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
    # 27 tokens behind the first ones, as many as 12 + 15: nothing was cut.
    assert found.tau == found.tau_uncut == pytest.approx(27 / 12)
    assert found.tau_served == pytest.approx(30 / 12) and found.without_cycles == 0
    assert [slot.cumulative for slot in found.slots] == pytest.approx([9 / 12, 6 / 12])
    assert [slot.conditional for slot in found.slots] == pytest.approx([9 / 12, 6 / 9])
    assert found.tau == pytest.approx(1 + sum(slot.cumulative for slot in found.slots))
    assert (found.tau_low, found.tau_macro, found.capped, found.ceiling) == (None, None, 3, 3)
    body = server.asked[0][1]
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    assert (body["top_k"], body["repetition_penalty"]) == (-1, 1.0)
    with pytest.raises(DataError, match="15 accepted in 12 drafts of 1"):
        acceptance_of_counters(counted, replies, 3, 1)


def prompts(folder):
    rows = [{"id": f"p{n}", "source": "s", "prompt": "hi"} for n in range(3)]
    (folder / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"mode.prompts={{b: {folder}/p.jsonl}}"


def served(folder, name, url, *more, out="out"):
    options = ("mode=acceptance_eval", f"mode/server={name}", f"mode.server.base_url={url}")
    named = ("mode.server.target=m", *(["mode.server.draft=d"] if name == "vllm" else []))
    cfg = compose_config(*options, prompts(folder), *named, *more, run_dir=folder / out)
    return acceptance_eval.run(cfg)


def test_the_mode_measures_sglang(server, tokenizer, tmp_path):
    option = f"mode.server.tokenizer={tokenizer}"
    metrics = served(tmp_path, "sglang", server.url, option)
    assert metrics["tau/b"] == 3.0 and metrics["tau_served/b"] == 3.5 and metrics["answers/b"] == 3
    result = json.loads((tmp_path / "out" / "acceptance.json").read_text())
    assert result["conditions"]["backend"] == "sglang" and result["conditions"]["target"] == "m"
    assert result["acceptance"]["draft"]["b"]["slots"] is None
    assert result["identity"] == {"draft": "some/draft", "drafted": 15}
    assert result["conditions"]["tokenizer"] is not None
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
    with pytest.raises(ValueError, match=r"mode\.server\.tokenizer=/nowhere: cannot be loaded"):
        served(tmp_path, "sglang", server.url, "mode.server.tokenizer=/nowhere")


@pytest.mark.parametrize("reason", ["abort", None, "tool_calls", "content_filter", 3, {}])
def test_only_a_stop_and_the_limit_end_an_answer(server, tokenizer, monkeypatch, reason):
    monkeypatch.setattr("evaluation.server_client.time.sleep", lambda _: None)
    with pytest.raises(ValueError, match="no answer, which ends with stop or length"):
        known_finish(reason)
    good = server.answer("/generate", {"input_ids": []})
    good["meta_info"]["finish_reason"] = {"type": reason} if isinstance(reason, str) else reason
    server.answer = lambda path, body: good
    (reply,) = SglangServer(server.url, str(tokenizer), 15, 64).answer([question()])
    assert "finish_reason=" in reply.error and reply.tokens == 0
    chat = {"choices": [{"message": {"content": "x"}, "finish_reason": reason}],
            "usage": {"completion_tokens": 3}}  # fmt: skip
    server.answer = lambda path, body: chat
    (reply,) = VllmServer(server.url, "m", 2, 64).answer([question()])
    assert "finish_reason=" in reply.error and reply.tokens == 0


@pytest.mark.parametrize("count", [-1, float("inf"), "7", None, 1.5])
def test_what_is_no_count_is_a_failure(server, monkeypatch, count):
    monkeypatch.setattr("evaluation.server_client.time.sleep", lambda _: None)
    chat = {"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}],
            "usage": {"completion_tokens": count}}  # fmt: skip
    server.answer = lambda path, body: chat
    (reply,) = VllmServer(server.url, "m", 2, 64).answer([question()])
    assert "which is no count" in reply.error


def test_a_refusal_is_not_repeated(server):
    server.failures, server.status = 1, 400
    (reply,) = VllmServer(server.url, "m", 2, 64).answer([question()])
    assert "HTTP 400: no" in reply.error and len(server.asked) == 1


def test_half_a_surrogate_pair_and_a_template_that_refuses_fail_alone(server, tokenizer, tmp_path):
    broken = Question("b", "\ud83d", 0, [{"role": "user", "content": "\ud83d"}])
    assert isinstance(broken.key, int)
    replies = VllmServer(server.url, "m", 2, 64).answer([broken, question()])
    assert "the prompt is no Unicode text" in replies[0].error and replies[1].error is None
    strict = byte_tokenizer()
    strict.chat_template = "{{ raise_exception('no turns') if messages[0].content == 'bad' }}x"
    strict.save_pretrained(tmp_path)
    sglang = SglangServer(server.url, str(tmp_path), 15, 64)
    bad = Question("b", "bad", 0, [{"role": "user", "content": "bad"}])
    replies = sglang.answer([bad, question()])
    assert "the chat template refuses (no turns)" in replies[0].error
    assert replies[1].error is None


def test_a_dead_server_ends_the_run_and_what_it_answered_is_kept(server, tokenizer, tmp_path):
    """It refuses everything behind the fourth prompt; the next run goes on there."""
    original, seen = server.answer, []

    def answer(path, body):
        seen.append(body)
        if len(seen) == 4:
            server.failures = 1000
        return original(path, body)

    server.answer, server.status = answer, 500
    rows = [{"id": f"p{n}", "source": "s", "prompt": "hi " * n} for n in range(1, 21)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    named = (
        "mode=acceptance_eval", "mode/server=sglang", f"mode.server.base_url={server.url}",
        f"mode.prompts={{b: {tmp_path}/p.jsonl}}", "mode.server.target=m", "mode.batch_size=2",
        f"mode.server.tokenizer={tokenizer}", "mode.server.max_failures=3",
        "mode.server.concurrency=1",
    )  # fmt: skip
    with pytest.raises(ServerError, match="3 requests in a row got no answer, after 4 that did"):
        acceptance_eval.run(compose_config(*named, run_dir=tmp_path / "out"))
    kept = read_rows(tmp_path / "out" / "acceptance.jsonl")[0]
    assert len(kept) == 4 and len((tmp_path / "out" / "failed.jsonl").read_text().splitlines()) == 4
    assert [row["id"] for row in kept] != ["p1", "p2", "p3", "p4"], "not the shortest ones"
    server.failures = 0
    asked = len(server.asked)
    metrics = acceptance_eval.run(compose_config(*named, run_dir=tmp_path / "out"))
    assert metrics["answers/b"] == 20 and metrics["failed"] == 0
    assert len(server.asked) == asked + 16


def test_a_reply_that_does_not_add_up_fails_alone(server, tokenizer, tmp_path):
    """Kept as a row, it would stop this run and every later one in the folder."""
    original = server.answer

    def answer(path, body):
        found = original(path, body)
        if len(server.asked) == 1:
            found["meta_info"]["completion_tokens"] = 0
        return found

    server.answer = answer
    option = f"mode.server.tokenizer={tokenizer}"
    metrics = served(tmp_path, "sglang", server.url, option)
    assert metrics["answers/b"] == 2 and metrics["failed"] == 1
    failed = json.loads((tmp_path / "out" / "failed.jsonl").read_text())
    assert "tokens must be at least 1" in failed["error"]
    metrics = served(tmp_path, "sglang", server.url, option)
    assert metrics["answers/b"] == 3 and metrics["failed"] == 0


def reply(tokens):
    return Reply(text="a b", tokens=tokens, finish="stop")


def test_counters_of_cut_answers():
    """Cycles of 3 and 3, the last one cut to 1; an answer that ended with the prefill's token."""
    counted = Counters(2, 4, (2, 2))
    found = acceptance_of_counters(counted, [reply(5), reply(1)], 2, 2)
    assert (found.tau, found.tau_uncut, found.without_cycles) == (2.0, 3.0, 1)
    assert (found.tokens, found.tau_served) == (6, 2.5)


@pytest.mark.parametrize(
    ("counted", "tokens"),
    [
        (Counters(10, 20, (10, 10)), 11),  # 30 tokens of cycles, 10 of them told: somebody else's
        (Counters(4, 0, (0, 0)), 11),  # four tokens of cycles, ten told
        (Counters(4, 5, (3, 5)), 10),  # more accepted behind a position than before
        (Counters(0, 0, ()), 10),
    ],
)
def test_counters_of_something_else_are_refused(counted, tokens):
    with pytest.raises(DataError, match="do not belong to this measurement"):
        acceptance_of_counters(counted, [reply(tokens)], 1, 2)


def test_a_draft_without_a_name_is_refused(server, tokenizer, tmp_path):
    server.info = {}
    with pytest.raises(ConfigError, match=r"mode\.server\.draft=null: the server does not tell"):
        served(tmp_path, "sglang", server.url, f"mode.server.tokenizer={tokenizer}")


def test_the_key_comes_from_the_environment_and_no_password_from_the_address(server, monkeypatch):
    monkeypatch.setenv("TOY_KEY", "sesame")
    vllm = VllmServer(server.url, "m", 2, 64, api_key_variable="TOY_KEY")
    vllm.answer([question()])
    vllm.close()
    assert server.headers == ["Bearer sesame"]
    with pytest.raises(ValueError, match="base_url: has a user or a password") as stop:
        VllmServer("http://me:secret@127.0.0.1:1", "m", 2, 64)
    assert "secret" not in str(stop.value)


def import_without_httpx():
    for name, module in list(sys.modules.items()):
        path = getattr(module, "__file__", None) or ""
        if Path(path).is_relative_to(ROOT) and "site-packages" not in path:
            del sys.modules[name]
    sys.modules["httpx"] = None
    for name in ("evaluation.server_acceptance", "modes.acceptance_eval", "modes.acceptance_table",
                 "modes.regenerate", "decoding.server"):  # fmt: skip
        importlib.import_module(name)


def test_no_part_of_a_measurement_needs_httpx(tmp_path):
    """It is not among the requirements; `httpx2` is."""
    child = Fork(import_without_httpx, tmp_path / "said.txt")
    assert child.wait() == 0, child.errors()
