"""The client of OpenAI-compatible servers, against real ones: this one's own, and transformers'."""

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import closing
from pathlib import Path

import pytest

from decoding.generate import GenerationRequest, GenerationResult, GenerationSettings
from decoding.local import LocalGenerator
from decoding.server import ServerGenerator, _Outcome
from decoding.server_protocol import ServerError
from models.tiny_causal import byte_tokenizer, tiny_causal
from tests.decoding.servers import answer_server

FAST = {"retries": 2, "backoff_s": 0.0, "concurrency": 4, "timeout_s": 20.0, "max_failures": 100}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with answer_server(tmp_path_factory.mktemp("server")) as running:
        yield running


def chat(*contents):
    return [GenerationRequest(c, messages=[{"role": "user", "content": c}]) for c in contents]


def ask(server, requests, settings=None, **options):
    settings = settings or GenerationSettings(max_new_tokens=50)
    generator = ServerGenerator(settings, server.url, "toy", **{**FAST, **options})
    return {result.id: result for result in generator.generate(requests)}


def test_every_request_has_one_answer(server):
    contents = [f"question {number}" for number in range(50)]
    results = ask(server, chat(*contents))
    assert sorted(results) == sorted(contents)
    for content, result in results.items():
        assert (result.text, result.finish, result.error) == (content.upper(), "stop", None)
        assert result.token_ids == list(content.upper().encode())
        assert result.num_tokens == len(content) and not result.retokenised


def test_an_answer_at_the_limit_is_capped(server):
    (result,) = ask(server, chat("abcdefgh"), GenerationSettings(max_new_tokens=3)).values()
    assert (result.text, result.finish, result.num_tokens) == ("ABC", "length", 3)


@pytest.mark.parametrize("concurrency", [1, 3])
def test_no_more_requests_than_allowed_are_under_way(tmp_path, concurrency):
    with answer_server(tmp_path) as server:
        meeting = [f"meet {concurrency} {name}" for name in "abcdef"]
        results = ask(server, chat(*meeting), concurrency=concurrency)
        assert all(result.error is None for result in results.values())
        assert server.seen("state")["most"] == concurrency


def test_requests_are_read_as_they_are_needed(server):
    taken = []

    def requests():
        for request in chat(*[f"r{n}" for n in range(40)]):
            taken.append(request.id)
            yield request

    generator = ServerGenerator(GenerationSettings(), server.url, "toy", **FAST)
    results = generator.generate(requests())
    next(results)
    assert len(taken) <= 2 * FAST["concurrency"]
    results.close()


def test_what_is_sent(server):
    settings = GenerationSettings(
        max_new_tokens=7, temperature=0.5, top_p=0.9, top_k=3, thinking=True, stop_ids=(4, 5)
    )
    ask(server, chat("sent"), settings, extra_body={"min_p": 0.1, "presence_penalty": None})
    body = server.seen("bodies")["sent"]
    seed = body.pop("seed")
    assert 0 <= seed < 2**31 and body == {
        "model": "toy", "max_tokens": 7, "temperature": 0.5, "top_k": 3, "stream": False,
        "top_p": 0.9, "repetition_penalty": 1.0, "frequency_penalty": 0.0,
        "messages": [{"role": "user", "content": "sent"}], "stop_token_ids": [4, 5], "min_p": 0.1,
        "chat_template_kwargs": {"enable_thinking": True}, "return_token_ids": True,
    }  # fmt: skip
    ask(server, chat("greedy"), token_ids="none")
    assert set(server.seen("bodies")["greedy"]) == {
        "model", "max_tokens", "temperature", "stream", "messages", "chat_template_kwargs",
    }  # fmt: skip


def test_greedy_is_greedy_whatever_the_model_recommends(server):
    """A penalty of its generation_config.json would change answers even at temperature 0."""
    ask(server, chat("plain"))
    body = server.seen("bodies")["plain"]
    assert body["temperature"] == 0.0 and "seed" not in body
    neutral = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0,
               "presence_penalty": 0.0, "frequency_penalty": 0.0}  # fmt: skip
    assert {name: body[name] for name in neutral} == neutral


def test_prompts_of_tokens_go_to_the_other_door(server):
    request = GenerationRequest("x", prompt_ids=list(b"tokens"))
    (result,) = ask(server, [request], GenerationSettings(logprobs=True)).values()
    assert (result.text, result.logprobs) == ("TOKENS", [-0.5] * 6)
    assert "messages" not in server.seen("bodies")["tokens"]


def test_a_text_to_go_on_with_goes_as_it_is(server):
    (result,) = ask(server, [GenerationRequest("x", prompt="a text")]).values()
    assert result.text == "A TEXT" and server.seen("bodies")["a text"]["prompt"] == "a text"


def test_stop_strings_are_sent_and_looked_for(server):
    """This server does not heed them."""
    settings = GenerationSettings(max_new_tokens=9, stop_strings=("LONG", "AND"))
    found = ask(server, chat("stop and long", "at once", "longer at first"), settings)
    assert server.seen("bodies")["stop and long"]["stop"] == ["LONG", "AND"]
    ends = {name: (one.text, one.finish) for name, one in found.items()}
    assert ends == {
        "stop and long": ("STOP ", "stop"),
        "at once": ("AT ONCE", "stop"),
        "longer at first": ("", "stop"),
    }
    assert found["stop and long"].num_tokens == 9
    assert "stop" not in server.seen("bodies").get("plain", {})


def test_retokenised_answers_have_no_end_token_where_a_string_may_have_ended_them(server, tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    options = {"token_ids": "retokenise", "tokenizer": str(tmp_path)}
    settings = GenerationSettings(max_new_tokens=50, stop_strings=("ND",))
    (plain,) = ask(server, chat("this and that"), **options).values()
    (result,) = ask(server, chat("this and that"), settings, **options).values()
    assert result.text == "THIS A" and result.token_ids == plain.token_ids[:6]
    assert plain.token_ids[-1] == byte_tokenizer().eos_token_id


def test_logprobs_of_a_chat(server):
    (result,) = ask(server, chat("abc"), GenerationSettings(logprobs=True)).values()
    assert result.logprobs == [-0.5] * 3


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("html a", "not an answer of this protocol: <html>Welcome</html> (3 attempts)"),
        ("half a", "not an answer of this protocol"),
        ("array a", "not an answer of this protocol"),
        ("deep a", "not an answer of this protocol"),
        ("empty a", "not an answer of this protocol"),
        ("null a", "no text"),
        ("noids a", "no token ids (allowed: token_ids=retokenise, or none)"),
        ("badids a", "no token ids"),
        ("tool a", "finish_reason='tool_calls'"),
        ("reasoning a", "thoughts apart from the text"),
        ("500 a", 'HTTP 500: {"error": "no"} (3 attempts)'),
        ("503 a", "HTTP 503"),
        ("drop a", "RemoteProtocolError"),
        ("endless a", "completion_tokens=inf, which is no count"),
        ("negative a", "completion_tokens=-3, which is no count"),
        ("lengthy a", "completion_tokens='many', which is no count"),
    ],
)
def test_what_is_no_answer_fails_after_retries(server, content, reason):
    results = ask(server, chat(content, "good"))
    assert results["good"].text == "GOOD"
    failed = results[content]
    assert reason in failed.error and "\n" not in failed.error
    assert failed.text == "" and failed.token_ids is None
    assert server.seen("attempts")[content] == 3


def test_logprobs_that_are_no_numbers(server):
    settings = GenerationSettings(logprobs=True)
    results = ask(server, chat("nan a", "good"), settings)
    assert "logprobs that are no numbers" in results["nan a"].error and not results["good"].error


def test_a_reply_without_end_is_cut_off(server):
    results = ask(server, chat("huge a", "good"), retries=0)
    assert "a reply of more than 67108864 bytes" in results["huge a"].error
    assert results["good"].error is None


def test_half_a_surrogate_pair_fails_alone(server):
    results = ask(server, chat("\ud83d broken", "good"))
    assert results["\ud83d broken"].error == "the prompt is no Unicode text"
    assert results["good"].error is None


def test_time_runs_out(server):
    started = time.monotonic()
    results = ask(server, chat("hang a", "good"), timeout_s=0.3, retries=1)
    assert results["hang a"].error == "no answer within 0.3 s (2 attempts)"
    assert results["good"].error is None and time.monotonic() - started < 4


def test_a_busy_server_is_asked_again(server):
    (result,) = ask(server, chat("busy a")).values()
    assert result.error is None and server.seen("attempts")["busy a"] == 3


def test_a_refusal_is_not_repeated(server):
    results = ask(server, chat("400 a", "good"))
    assert results["400 a"].error == 'HTTP 400: {"error": "no"}'
    assert server.seen("attempts")["400 a"] == 1


def test_refusals_do_not_kill_a_server_that_answers(server):
    contents = ["first", *(f"400 {n}" for n in range(9)), "last"]
    results = ask(server, chat(*contents), max_failures=3, concurrency=1)
    assert results["last"].error is None and len(results) == 11


def test_a_server_that_refuses_everything_is_left(server):
    with pytest.raises(ServerError, match=r"4 requests in a row .*, after 0 .*HTTP 400"):
        ask(server, chat(*(f"400 x{n}" for n in range(9))), max_failures=3, concurrency=1)


def test_quick_refusals_do_not_kill_a_server_that_is_still_thinking(server):
    """Six refusals come back before the first answer does."""
    contents = ["slow a", "slow b", *(f"400 q{n}" for n in range(6)), "late"]
    results = ask(server, chat(*contents), max_failures=3, concurrency=4)
    assert len(results) == 9
    assert [results[name].error for name in ("slow a", "slow b", "late")] == [None] * 3


def test_all_that_has_ended_comes_before_the_error():
    """Four outcomes arrive together; already two of them make the server dead."""
    options = {**FAST, "max_failures": 2}
    generator = ServerGenerator(GenerationSettings(), "http://127.0.0.1:1/v1", "toy", **options)

    async def answer(client, request):
        return _Outcome(GenerationResult(request.id, error="no"))

    generator._answer = answer
    kept = []
    with pytest.raises(ServerError, match="4 requests in a row got no answer, after 0"):
        for result in generator.generate(chat(*"abcdef")):
            kept.append(result.id)
    assert sorted(kept) == list("abcd")


def test_a_server_that_dies_keeps_what_it_answered(tmp_path):
    contents = [f"q{number}" for number in range(30)]
    kept = []
    with answer_server(tmp_path, die_after=10) as mortal:
        settings = GenerationSettings(max_new_tokens=50)
        options = {**FAST, "concurrency": 1, "max_failures": 4}
        generator = ServerGenerator(settings, mortal.url, "toy", **options)
        with pytest.raises(ServerError) as stop:
            for result in generator.generate(chat(*contents)):
                kept.append(result)
    assert [result.error is None for result in kept] == [True] * 10 + [False] * 4
    message = str(stop.value)
    assert message.startswith(f"{mortal.url}: 4 requests in a row got no answer, after 10 that did")
    assert "\n" not in message


class Signal(BaseException):
    """What a signal handler raises."""


def test_a_signal_inside_of_a_callback_ends_the_requests():
    """The loop only logs what callbacks raise, and the callback that was to end a wait is lost."""
    generator = ServerGenerator(GenerationSettings(), "http://127.0.0.1:1/v1", "toy", **FAST)

    async def answer(client, request):
        def interrupt():
            raise Signal

        asyncio.get_running_loop().call_soon(interrupt)
        await asyncio.sleep(60)

    generator._answer = answer
    started = time.monotonic()
    with pytest.raises(Signal):
        list(generator.generate(chat(*"abcdef")))
    assert time.monotonic() - started < 10


def test_nobody_there():
    with closing(socket.socket()) as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
        options = {**FAST, "max_failures": 2}
        generator = ServerGenerator(GenerationSettings(), url, "toy", **options)
        with pytest.raises(ServerError, match=r"requests in a row got no answer, .*ConnectError"):
            list(generator.generate(chat(*"abcdef")))


def test_tokens_made_from_the_text(server, tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    options = {"token_ids": "retokenise", "tokenizer": str(tmp_path)}
    results = ask(
        server, chat("abc", "long " * 9), GenerationSettings(max_new_tokens=10), **options
    )
    tokenizer = byte_tokenizer()
    expected = [*tokenizer.encode("ABC", add_special_tokens=False), tokenizer.eos_token_id]
    assert results["abc"].token_ids == expected and results["abc"].retokenised
    assert len(results["long " * 9].token_ids) == 10
    assert "return_token_ids" not in server.seen("bodies")["abc"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token_ids": "guess"}, "token_ids=guess: allowed server, retokenise, none"),
        ({"token_ids": "retokenise"}, "needs tokenizer=FOLDER"),
        ({"token_ids": "retokenise", "tokenizer": "/nowhere/at/all"}, "tokenizer=/nowhere/at/all"),
        ({"concurrency": 0}, "concurrency=0"),
        ({"extra_body": {"top_k": 5}}, r"extra_body\.top_k: decided by the settings of mode"),
        ({"extra_body": {"temperature": None}}, r"extra_body\.temperature"),
        ({"retries": -1}, "retries=-1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        ServerGenerator(GenerationSettings(), "http://127.0.0.1:1/v1", "toy", **options)


def test_the_key_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("TOY_KEY", "sesame")
    options = {"api_key_variable": "TOY_KEY"}
    generator = ServerGenerator(GenerationSettings(), "http://127.0.0.1:1/v1", "toy", **options)
    assert "sesame" not in json.dumps(generator.identity())
    assert generator._headers["Authorization"] == "Bearer sesame"


def test_a_password_in_the_address_is_refused_and_not_shown():
    with pytest.raises(ValueError, match="base_url: has a user or a password") as stop:
        ServerGenerator(GenerationSettings(), "http://me:secret@127.0.0.1:1/v1", "toy")
    assert "secret" not in str(stop.value)


def test_the_identity_has_all_that_decides_answers(tmp_path):
    where, settings = "http://127.0.0.1:1/v1", GenerationSettings()
    byte_tokenizer().save_pretrained(tmp_path)
    options = {"token_ids": "retokenise", "tokenizer": str(tmp_path)}
    one = ServerGenerator(settings, where, "toy", **options).identity()
    other = byte_tokenizer()
    other.chat_template = "{{ messages }}"
    other.save_pretrained(tmp_path)
    two = ServerGenerator(settings, where, "toy", **options, extra_body={"min_p": 0.1}).identity()
    assert {key for key in one if one[key] != two[key]} == {"tokenizer", "extra_body"}
    assert ServerGenerator(settings, where, "toy").identity()["tokenizer"] is None


def test_retokenising_needs_an_end_token(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    options = {"token_ids": "retokenise", "tokenizer": str(tmp_path)}
    with pytest.raises(ValueError, match="has no end token"):
        ServerGenerator(GenerationSettings(), "http://127.0.0.1:1/v1", "toy", **options)


@pytest.mark.slow
def test_the_server_of_transformers(tmp_path):
    """Half a minute: it answers as the same model does here, without token ids."""
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    pytest.importorskip("openai")
    target = tiny_causal()
    target.model.save_pretrained(tmp_path / "target")
    target.tokenizer.save_pretrained(tmp_path / "target")
    requests = chat(*(f"hello {'you ' * n}" for n in range(6)))
    settings = GenerationSettings(max_new_tokens=40)
    local = LocalGenerator(target, settings).generate(requests)
    expected = {result.id: result for result in local}
    with closing(socket.socket()) as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    program = Path(sys.executable).with_name("transformers")
    where = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    process = subprocess.Popen(
        [str(program), "serve", str(tmp_path / "target"), *where],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process)
        url, name = f"http://127.0.0.1:{port}/v1", str(tmp_path / "target")
        options = {**FAST, "token_ids": "retokenise", "tokenizer": name, "timeout_s": 120.0}
        found = {
            r.id: r for r in ServerGenerator(settings, url, name, **options).generate(requests)
        }
        strict = ServerGenerator(settings, url, name, **{**FAST, "max_failures": 2})
        with pytest.raises(ServerError, match=r"HTTP 422.*return_token_ids"):
            list(strict.generate(requests))
    finally:
        process.terminate()
        process.wait(60)
    assert set(found) == set(expected)
    special = {0, 1, 3}
    # It strips texts, and takes thoughts and calls of tools out of those with special tokens.
    plain = [i for i, result in expected.items() if not special & set(result.token_ids)]
    assert len(plain) >= 2
    for request_id in plain:
        assert found[request_id].error is None
        assert found[request_id].text.strip() == expected[request_id].text.strip()
        assert found[request_id].finish == expected[request_id].finish


def wait_for(url, process, seconds=180):
    deadline = time.monotonic() + seconds
    while True:
        assert process.poll() is None and time.monotonic() < deadline, "did not start"
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
