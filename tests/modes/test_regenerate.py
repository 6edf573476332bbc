"""mode=regenerate: every prompt answered once, whatever happens on the way."""

import hashlib
import json
import re
import time

import pytest

from data.chat import read_chat
from data.errors import DataError
from data.journal import Journal
from decoding.generate import GenerationRequest, GenerationResult, GenerationSettings
from decoding.local import LocalGenerator
from decoding.server_protocol import ServerError
from evaluation.statistics import wilson_interval
from models.tiny_causal import tiny_causal
from modes.regenerate import answered, run
from runtime.errors import ConfigError
from runtime.run import load_summary
from runtime.validation import validate
from tests.decoding.servers import answer_server
from tests.forks import start_main
from tests.support import compose_config

TINY = ("model=tiny_causal", "model.num_hidden_layers=2", "model.dtype=float64", "trainer=cpu")


def write_prompts(path, count=20, **more):
    rows = [
        {"id": f"p{n}", "source": "ab"[n % 2], "prompt": f"question {n} " * (1 + n % 4), "n": n}
        for n in range(count)
    ]
    path.write_text("".join(json.dumps({**row, **more}) + "\n" for row in rows))
    return rows


def options(folder, *overrides, prompts="p.jsonl"):
    return (
        "mode=regenerate", f"mode.input={folder}/{prompts}", f"mode.output={folder}/out",
        "mode.max_new_tokens=20", "mode.batch_size=4", f"paths.cache_dir={folder}/cache",
        *overrides,
    )  # fmt: skip


def local(folder, *overrides, **which):
    return compose_config(*options(folder, *TINY, *overrides, **which), run_dir=folder / "run")


def at_server(folder, server, *overrides, **which):
    backend = (
        "mode/backend=server", f"mode.backend.base_url={server.url}", "mode.backend.model=toy",
        "mode.backend.backoff_s=0", "mode.backend.retries=1", "trainer=cpu",
    )  # fmt: skip
    return options(folder, *backend, *overrides, **which)


def rows_of(path):
    return list(read_chat(path, answered=True))


def manifest(folder, name="manifest.json"):
    return json.loads((folder / "out" / name).read_text())


def test_answers_are_those_of_the_target_in_the_order_of_the_prompts(tmp_path, capsys):
    prompts = write_prompts(tmp_path / "p.jsonl")
    # Some of its answers end by themselves.
    cfg = local(tmp_path, "mode.max_new_tokens=80", "model.num_hidden_layers=4")
    validate(cfg)
    metrics = run(cfg)
    rows = rows_of(tmp_path / "out" / "answers.jsonl")
    assert [{key: row[key] for key in prompts[0]} for row in rows] == prompts
    target = tiny_causal(dtype="float64")
    generator = LocalGenerator(target, GenerationSettings(max_new_tokens=80))
    for row in rows[:5]:
        (expected,) = generator.generate(
            [GenerationRequest(row["id"], [{"role": "user", "content": row["prompt"]}])]
        )
        assert row["response_ids"] == expected.token_ids and row["response"] == expected.text
        assert row["finish"] == expected.finish and row["num_tokens"] == expected.num_tokens
        assert row["thinking"] is False and row["target"] == "tiny_causal"
        assert "retokenised" not in row
    capped = sum(row["finish"] == "length" for row in rows)
    assert 0 < capped < 20
    low, high = wilson_interval(capped, 20)
    assert metrics.pop("tokens_per_s") > 0
    assert metrics == {
        "rows": 20, "answered": 20, "failed": 0, "capped": capped, "capped_rate": capped / 20,
        "capped_low": low, "capped_high": high,
        "tokens": sum(len(row["response_ids"]) for row in rows),
    }  # fmt: skip
    assert "capped_rate" in capsys.readouterr().out
    assert (tmp_path / "out" / "failed.jsonl").read_bytes() == b""


def test_the_manifest_says_what_was_asked_and_what_came_out(tmp_path):
    write_prompts(tmp_path / "p.jsonl")
    run(local(tmp_path))
    content = (tmp_path / "out" / "answers.jsonl").read_bytes()
    found = manifest(tmp_path)
    rows = rows_of(tmp_path / "out" / "answers.jsonl")
    assert found["status"] == "done"
    digest = hashlib.sha256(content).hexdigest()
    assert found["output"] == {"file": "answers.jsonl", "sha256": digest}
    assert found["options"]["backend fingerprint"] == (
        tiny_causal(num_hidden_layers=2, dtype="float64").fingerprint
    )
    digest = hashlib.sha256((tmp_path / "p.jsonl").read_bytes()).hexdigest()
    assert found["options"]["mode.input"] == [{"file": "p.jsonl", "sha256": digest}]
    for source in "ab":
        of_source = [row for row in rows if row["source"] == source]
        assert found["counts"][source] == {
            "rows": 10, "answered": 10, "failed": 0,
            "capped": sum(row["finish"] == "length" for row in of_source),
            "tokens": sum(len(row["response_ids"]) for row in of_source),
        }  # fmt: skip


def test_done_is_done(tmp_path):
    write_prompts(tmp_path / "p.jsonl")
    first = run(local(tmp_path))
    content = (tmp_path / "out" / "answers.jsonl").read_bytes()
    again = run(local(tmp_path))
    assert "tokens_per_s" in first and "tokens_per_s" not in again
    assert {key: first[key] for key in again} == again
    assert (tmp_path / "out" / "answers.jsonl").read_bytes() == content


def test_an_earlier_answer_is_replaced_whole(tmp_path):
    stale = {"response": "old", "response_ids": [1], "logprobs": [0.0], "retokenised": True}
    write_prompts(tmp_path / "p.jsonl", 3, **stale)
    run(local(tmp_path))
    for row in rows_of(tmp_path / "out" / "answers.jsonl"):
        assert row["response"] != "old" and len(row["response_ids"]) > 1
        assert "logprobs" not in row and "retokenised" not in row and row["n"] >= 0
    row = {"id": "a", "source": "s", "prompt": "p", "response_ids": [1], "finish": "stop"}
    bare = answered(row, GenerationResult("a", "text", finish="length"), "t", True)
    assert bare == {
        "id": "a", "source": "s", "prompt": "p", "response": "text", "finish": "length",
        "thinking": True, "target": "t", "num_tokens": 0,
    }  # fmt: skip


def test_shards_share_the_prompts(tmp_path):
    write_prompts(tmp_path / "p.jsonl", 11)
    run(local(tmp_path, "mode.output=" + str(tmp_path / "whole"), "mode.limit=10"))
    for number in range(3):
        run(local(tmp_path, f"mode.shard={number}", "mode.num_shards=3", "mode.limit=10"))
    shards = [rows_of(tmp_path / "out" / f"answers-{n}-of-3.jsonl") for n in range(3)]
    assert [[row["n"] for row in rows] for rows in shards] == [[0, 3, 6, 9], [1, 4, 7], [2, 5, 8]]
    together = sorted((row for rows in shards for row in rows), key=lambda row: row["n"])
    assert together == rows_of(tmp_path / "whole" / "answers.jsonl")
    assert manifest(tmp_path, "manifest-1-of-3.json")["counts"]["b"]["rows"] == 2


def test_a_higher_limit_goes_on(tmp_path):
    write_prompts(tmp_path / "p.jsonl", 6)
    assert run(local(tmp_path, "mode.limit=2"))["rows"] == 2
    before = rows_of(tmp_path / "out" / "answers.jsonl")
    metrics = run(local(tmp_path))
    assert metrics["rows"] == 6
    assert rows_of(tmp_path / "out" / "answers.jsonl")[:2] == before


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ("mode.max_new_tokens=21", r"mode\.max_new_tokens=21: .* begun with 20; allowed: that"),
        ("mode.temperature=0.5", r"mode\.temperature=0\.5: .* begun with 0"),
        ("mode.thinking=true", r"mode\.thinking=true: .* begun with false"),
        ("mode.top_p=0.9", r"mode\.top_p=0\.9"),
        ("model.seed=1", r"backend fingerprint=\"\w+\": .* begun with \"\w+\""),
        ("model.name=x", r"backend target=\"x\": .* begun with \"tiny_causal\""),
    ],
)
def test_other_options_are_refused(tmp_path, change, name):
    write_prompts(tmp_path / "p.jsonl", 2)
    run(local(tmp_path))
    with pytest.raises(ConfigError, match=name):
        run(local(tmp_path, change))
    assert manifest(tmp_path)["status"] == "done"


def test_other_prompts_are_refused_and_the_seed_only_where_it_matters(tmp_path):
    write_prompts(tmp_path / "p.jsonl", 2)
    run(local(tmp_path))
    run(local(tmp_path, "seed=2", "mode.batch_size=1"))
    write_prompts(tmp_path / "p.jsonl", 3)
    with pytest.raises(ConfigError, match=r"mode\.input=p\.jsonl \(\w{8}\): .*p\.jsonl \(\w{8}\)"):
        run(local(tmp_path))
    sampled = (f"mode.output={tmp_path}/sampled", "mode.temperature=1")
    run(local(tmp_path, *sampled))
    with pytest.raises(ConfigError, match=r"seed=2: .* begun with 1"):
        run(local(tmp_path, *sampled, "seed=2"))
    (tmp_path / "out" / "manifest.json").write_text("{")
    with pytest.raises(ConfigError, match=r"mode\.output=.*: manifest\.json is damaged"):
        run(local(tmp_path))


def test_the_same_id_twice(tmp_path):
    write_prompts(tmp_path / "p.jsonl", 3)
    write_prompts(tmp_path / "q.jsonl", 1)
    with pytest.raises(DataError, match=r"q\.jsonl: id 'p0' is there twice \(before in .*p\.jsonl"):
        run(local(tmp_path, prompts="*.jsonl"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "{", r"a\.jsonl:1: not JSON"),
        ("a.jsonl", '{"id": "a", "source": "s"}', r"a\.jsonl:1: .* needs either"),
        ("a.txt", "x", r"a\.txt: unknown type; allowed are \.jsonl, plain or \.gz"),
        ("a.jsonl", "\n", r"a\.jsonl: no prompts for shard 0 of 1"),
    ],
)
def test_bad_prompts(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        run(local(tmp_path, prompts=name))
    with pytest.raises(DataError, match=r"nothing\.jsonl: no such file"):
        run(local(tmp_path, prompts="nothing.jsonl"))


def test_a_model_that_does_not_answer(tmp_path):
    write_prompts(tmp_path / "p.jsonl", 1)
    cfg = compose_config(*options(tmp_path), run_dir=tmp_path / "run")
    with pytest.raises(ConfigError, match="model=nano: not a model that answers; allowed: tiny"):
        run(cfg)


@pytest.mark.parametrize(
    "bad",
    [
        "mode.max_new_tokens=0", "mode.temperature=-1", "mode.top_p=0", "mode.top_k=1.5",
        "mode.thinking=1", "mode.limit=0", "mode.batch_size=null", "mode.input=[]",
        "mode.output=''",
    ],
)  # fmt: skip
def test_wrong_values(tmp_path, bad):
    key = bad.partition("=")[0]
    overrides = [text for text in options(tmp_path, *TINY) if not text.startswith(f"{key}=")]
    with pytest.raises(ConfigError, match=key):
        validate(compose_config(*overrides, bad, run_dir=tmp_path / "run"))


def test_failures_are_listed_and_tried_again(tmp_path):
    write_prompts(tmp_path / "p.jsonl", 6)
    with (tmp_path / "p.jsonl").open("a") as file:
        long = {"id": "long", "source": "c", "prompt": "x" * 2000}
        file.write(json.dumps(long) + "\n")
    cfg = local(tmp_path)
    metrics = run(cfg)
    assert (metrics["rows"], metrics["answered"], metrics["failed"]) == (7, 6, 1)
    (failed,) = map(json.loads, (tmp_path / "out" / "failed.jsonl").read_text().splitlines())
    assert (failed["id"], failed["source"]) == ("long", "c")
    assert re.search(r"a prompt of \d+ tokens; allowed 1 \.\. 1023", failed["error"])
    assert manifest(tmp_path)["counts"]["c"] == {
        "rows": 1, "answered": 0, "capped": 0, "failed": 1, "tokens": 0,
    }  # fmt: skip
    assert len(rows_of(tmp_path / "out" / "answers.jsonl")) == 6


def test_a_server_that_recovers_answers_what_it_had_failed(tmp_path):
    rows = write_prompts(tmp_path / "p.jsonl", 6)
    bad = {"id": "bad", "source": "a", "prompt": "busy indeed"}
    with (tmp_path / "p.jsonl").open("a") as file:
        file.write(json.dumps(bad) + "\n")
    with answer_server(tmp_path) as server:
        cfg = compose_config(*at_server(tmp_path, server), run_dir=tmp_path / "run")
        validate(cfg)
        # Two attempts, and the third would succeed.
        assert run(cfg)["failed"] == 1
        assert "HTTP 429" in (tmp_path / "out" / "failed.jsonl").read_text()
        metrics = run(cfg)
        attempts = server.seen("attempts")
    assert (metrics["answered"], metrics["failed"]) == (7, 0)
    assert (tmp_path / "out" / "failed.jsonl").read_bytes() == b""
    assert attempts.pop("busy indeed") == 3 and set(attempts.values()) == {1}
    found = rows_of(tmp_path / "out" / "answers.jsonl")
    assert [row["id"] for row in found] == [*(row["id"] for row in rows), "bad"]
    assert found[0]["response"] == rows[0]["prompt"].upper()[:20]
    assert found[0]["response_ids"] == list(found[0]["response"].encode())


def kill_in_the_middle(arguments, partial, at_least):
    """SIGKILL while the journal stands still behind a number of rows: it always comes in time."""

    def stall():
        append, rows = Journal.append, []

        def append_or_stall(self, row):
            append(self, row)
            rows.append(row)
            if len(rows) == at_least + 3:
                time.sleep(600)

        Journal.append = append_or_stall

    process = start_main(*arguments, said=partial.parent.parent / "said.txt", before=stall)
    deadline = time.monotonic() + 120
    while not partial.is_file() or partial.read_bytes().count(b"\n") < at_least:
        assert process.is_alive() and time.monotonic() < deadline, process.errors()
        time.sleep(0.01)
    process.kill()
    process.wait()
    return partial.read_bytes().count(b"\n")


def check_resumed(folder, arguments, unbroken, kept):
    """Break the last line as a kill inside a write would, then go on."""
    partial = folder / "out" / "partial.jsonl"
    assert not (folder / "out" / "answers.jsonl").exists()
    assert manifest(folder)["status"] == "running"
    partial.write_bytes(partial.read_bytes()[:-7])
    kept -= 1
    done_before = partial.read_bytes().splitlines(keepends=True)[:kept]
    run(compose_config(*arguments, run_dir=folder / "run"))
    assert (folder / "out" / "answers.jsonl").read_bytes() == unbroken
    lines = partial.read_bytes().splitlines(keepends=True)
    assert lines[:kept] == done_before
    ids = [json.loads(line)["id"] for line in lines]
    assert len(ids) == len(set(ids)) == unbroken.count(b"\n")


def test_killed_and_restarted_with_the_local_backend(tmp_path):
    write_prompts(tmp_path / "p.jsonl", 30)
    run(local(tmp_path, f"mode.output={tmp_path}/unbroken"))
    unbroken = (tmp_path / "unbroken" / "answers.jsonl").read_bytes()
    arguments = options(tmp_path, *TINY, "mode.batch_size=2")
    run_dir = f"paths.run_dir={tmp_path}/killed"
    kept = kill_in_the_middle([*arguments, run_dir], tmp_path / "out" / "partial.jsonl", 8)
    assert 8 <= kept <= 11
    check_resumed(tmp_path, arguments, unbroken, kept)


def test_killed_and_restarted_with_the_server_backend(tmp_path):
    write_prompts(tmp_path / "p.jsonl", 30)
    with answer_server(tmp_path) as server:
        whole = at_server(tmp_path, server, f"mode.output={tmp_path}/unbroken")
        run(compose_config(*whole, "mode.batch_size=40", run_dir=tmp_path / "run"))
        unbroken = (tmp_path / "unbroken" / "answers.jsonl").read_bytes()
        arguments = at_server(tmp_path, server, "mode.batch_size=2")
        run_dir = f"paths.run_dir={tmp_path}/killed"
        kept = kill_in_the_middle([*arguments, run_dir], tmp_path / "out" / "partial.jsonl", 8)
        assert 8 <= kept <= 11
        check_resumed(tmp_path, arguments, unbroken, kept)


def test_a_server_that_dies_leaves_what_it_answered(tmp_path):
    write_prompts(tmp_path / "p.jsonl", 40)
    with answer_server(tmp_path, die_after=15) as mortal:
        arguments = at_server(tmp_path, mortal, "mode.backend.max_failures=3")
        with pytest.raises(ServerError, match=r"\d requests in a row .* after \d+ that did"):
            run(compose_config(*arguments, run_dir=tmp_path / "run"))
    kept = len(rows_of(tmp_path / "out" / "partial.jsonl"))
    assert 10 <= kept <= 15
    with answer_server(tmp_path) as alive:
        arguments = at_server(tmp_path, alive)
        assert run(compose_config(*arguments, run_dir=tmp_path / "run"))["answered"] == 40
        assert len(alive.seen("attempts")) == 40 - kept


def test_a_signal_keeps_the_answers(tmp_path):
    write_prompts(tmp_path / "p.jsonl", 60)
    with answer_server(tmp_path, delay_s=0.1) as server:
        arguments = at_server(tmp_path, server, "mode.batch_size=2")
        stopped = f"paths.run_dir={tmp_path}/stopped"
        process = start_main(*arguments, stopped, said=tmp_path / "said.txt")
        partial = tmp_path / "out" / "partial.jsonl"
        while not partial.is_file() or partial.read_bytes().count(b"\n") < 4:
            assert process.is_alive()
            time.sleep(0.01)
        process.terminate()
        assert process.wait() == 143 and "Traceback" not in process.errors()
    assert load_summary(tmp_path / "stopped")["status"] == "interrupted"
    assert partial.read_bytes().endswith(b"\n") and len(rows_of(partial)) >= 4


def test_nobody_at_the_address(tmp_path):
    write_prompts(tmp_path / "p.jsonl", 4)
    with answer_server(tmp_path) as server:
        pass
    cfg = compose_config(
        *at_server(tmp_path, server, "mode.backend.max_failures=2"), run_dir=tmp_path / "run"
    )
    with pytest.raises(ServerError, match=r"\d requests in a row got no answer, after 0"):
        run(cfg)
    # Nothing was answered, so there is nothing that other options could be mixed with.
    with answer_server(tmp_path) as server:
        cfg = compose_config(
            *at_server(tmp_path, server, "mode.max_new_tokens=5"), run_dir=tmp_path / "run"
        )
        assert run(cfg)["answered"] == 4
