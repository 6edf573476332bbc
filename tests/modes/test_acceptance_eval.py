"""mode=acceptance_eval and mode=acceptance_table with a tiny target, random drafts and a server."""

import json

import pytest
import torch
from filelock import FileLock, Timeout

from data.errors import DataError
from data.journal import encode_row
from decoding.drafts import NetworkDraft, NoDraft, OracleDraft
from decoding.speculate import speculate
from decoding.verification import Greedy
from evaluation.acceptance import read_answer
from evaluation.acceptance_log import RowLog, read_rows
from evaluation.acceptance_run import draft_run
from models.causal import CausalTarget
from models.dflash import DFlashConfig, DFlashNetwork
from models.tiny_causal import tiny_causal
from modes import acceptance_eval, acceptance_table
from runtime.dflash.folder import load_draft, write_draft
from runtime.errors import ConfigError
from runtime.run import load_summary
from tests.draft_runs import answered_rows, fit
from tests.runs import call_main
from tests.support import compose_config

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "seed": 1}
MODEL = ("model=tiny_causal", *(f"model.{key}={value}" for key, value in SMALL.items()))


def save_draft(folder, seed=0, block_size=6, **changes):
    """A random draft for the tiny target, in its folder."""
    target = tiny_causal(**SMALL | changes)
    config = DFlashConfig.from_target(
        target.model.config, block_size=block_size, num_hidden_layers=1,
        mask_token_id=target.mask_token_id, target_layer_ids=(0,),
    )  # fmt: skip
    torch.manual_seed(seed)
    write_draft(folder, config, DFlashNetwork(config).state_dict(), dtype="float32")
    return folder


class Knowing(OracleDraft):
    """In place of the network an oracle that errs, more or less as the network's weights are."""

    def __init__(self, network, embedding_VD, head, block_size):
        size, share = block_size or network.config.block_size, network.fc.weight[0, 0].item() % 1.0
        super().__init__({}, size - 1, head.out_features, 0.2 + 0.4 * share, seed=int(1000 * share))

    def begin(self, prompts):
        model, count = tiny_causal(**SMALL).model, 12 + self.drafted
        plain = speculate(model, NoDraft(), prompts, Greedy(), max_new_tokens=count)
        self.answers |= {
            tuple(prompt): result.token_ids for prompt, result in zip(prompts, plain, strict=True)
        }
        return super().begin(prompts)


@pytest.fixture
def knowing(monkeypatch):
    """A random network is never right, which makes for dull acceptance."""
    monkeypatch.setattr(acceptance_eval, "NetworkDraft", Knowing)


def save_prompts(path, count=4, turns=1):
    rows = []
    for number in range(count):
        row = {"id": f"p{number}", "source": "test", "prompt": "word " * (number + 1)}
        if turns > 1:
            row["turns"] = [row["prompt"], "and then?"]
        rows.append(json.dumps(row))
    path.write_text("\n".join(rows) + "\n")
    return path


@pytest.fixture
def files(tmp_path):
    save_draft(tmp_path / "draft")
    save_prompts(tmp_path / "one.jsonl")
    save_prompts(tmp_path / "talk.jsonl", count=2, turns=2)
    return tmp_path


def overrides(files, *more, draft="draft"):
    prompts = f"mode.prompts={{one: {files}/one.jsonl, talk: {files}/talk.jsonl}}"
    return (
        "mode=acceptance_eval", *MODEL, f"mode.draft={files / draft}", prompts, "trainer=cpu",
        "mode.max_new_tokens=12", "mode.batch_size=3", "mode.timed_prompts=2", *more,
    )  # fmt: skip


def evaluate(files, *more, out="out", draft="draft"):
    cfg = compose_config(*overrides(files, *more, draft=draft), run_dir=files / out)
    return acceptance_eval.run(cfg)


def rows_of(folder):
    return [json.loads(line) for line in (folder / "acceptance.jsonl").read_text().splitlines()]


def test_a_draft_is_measured(files, capsys, knowing):
    metrics = evaluate(files, "mode.label=mine")
    assert metrics["tau_low/one"] < metrics["tau/one"] < metrics["tau_high/one"]
    assert 1.2 < metrics["tau/one"] < 6 and metrics["tau/one"] != metrics["tau_macro/one"]
    rows = rows_of(files / "out")
    assert len(rows) == 4 + 2 * 2 and {row["draft"] for row in rows} == {"draft"}
    answers = [read_answer(row, "row") for row in rows]
    one = [answer for answer in answers if answer.benchmark == "one"]
    assert metrics["tau/one"] == pytest.approx(
        sum(a.tokens - 1 for a in one) / sum(a.cycles for a in one)
    )
    assert metrics["answers/talk"] == 4 and metrics["prompts/talk"] == 2
    assert metrics["tau/average"] == pytest.approx((metrics["tau/one"] + metrics["tau/talk"]) / 2)
    assert metrics["failed"] == 0 and metrics["speedup_different/one"] == 0
    assert metrics["speedup/one"] > 0 and metrics["speedup/talk"] > 0
    result = json.loads((files / "out" / "acceptance.json").read_text())
    assert result["label"] == "mine" and result["against_reference"] is None
    assert result["conditions"]["max_new_tokens"] == 12
    assert result["acceptance"]["draft"]["one"]["ceiling"] == 6
    assert len((files / "out" / "timing.jsonl").read_text().splitlines()) == 4
    text = (files / "out" / "acceptance.md").read_text()
    assert (
        "# mine" in text
        and "## Speed at batch 1" in text
        and text.strip() in capsys.readouterr().out
    )
    assert (files / "out" / "acceptance.png").read_bytes().startswith(b"\x89PNG")


def test_answers_are_the_targets_and_a_second_turn_hears_the_first_reply(files):
    evaluate(files)
    target = tiny_causal(**SMALL)
    rows = {(row["benchmark"], row["id"], row["turn"]): row for row in rows_of(files / "out")}

    def answer(messages):
        ids = target.chat_ids(messages)
        found = speculate(target.model, NoDraft(), [ids], Greedy(), max_new_tokens=12,
                          stop_ids=target.stop_ids)[0]  # fmt: skip
        return target.tokenizer.decode(found.token_ids, skip_special_tokens=True)

    talk = [{"role": "user", "content": "word "}]
    first = answer(talk)
    assert rows["one", "p0", 0]["text"] == rows["talk", "p0", 0]["text"] == first
    talk += [{"role": "assistant", "content": first}, {"role": "user", "content": "and then?"}]
    assert rows["talk", "p0", 1]["text"] == answer(talk)


def test_a_killed_run_goes_on(files, monkeypatch):
    """Rows on disk are kept, a line that was cut off and half a conversation are asked again."""
    whole = evaluate(files, out="whole")
    evaluate(files)
    path = files / "out" / "acceptance.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    talk = next(place for place, line in enumerate(lines) if b'"talk"' in line)
    path.write_bytes(b"".join(lines[: talk + 1]) + lines[talk + 1][:20])
    asked = []
    original = NetworkDraft.begin

    def begin(self, prompts):
        asked.append(len(prompts))
        return original(self, prompts)

    monkeypatch.setattr(NetworkDraft, "begin", begin)
    again = evaluate(files, "mode.timed_prompts=0")
    assert asked == [2, 2], "both turns of the two conversations, nothing else"
    assert {k: v for k, v in whole.items() if "speedup" not in k} == again
    key = lambda row: (row["benchmark"], row["id"], row["turn"])  # noqa: E731
    kept = sorted(rows_of(files / "out"), key=key)
    assert kept == sorted(rows_of(files / "whole"), key=key)


def test_another_measurement_in_the_same_folder_is_refused(files):
    evaluate(files)
    with pytest.raises(ConfigError, match=r"begun with max_new_tokens=12, now 13"):
        evaluate(files, "mode.max_new_tokens=13")
    save_draft(files / "other", seed=7)
    with pytest.raises(ConfigError, match="begun with draft="):
        evaluate(files, draft="other")
    save_prompts(files / "one.jsonl", count=5)
    with pytest.raises(ConfigError, match=r"begun with prompts\.one="):
        evaluate(files)


def test_a_reference_beside_the_draft(files, knowing):
    save_draft(files / "other", seed=7)
    metrics = evaluate(files, f"mode.reference_draft={files / 'other'}")
    rows = rows_of(files / "out")
    texts = {
        draft: [row["text"] for row in rows if row["draft"] == draft]
        for draft in ("draft", "reference")
    }
    assert texts["draft"] == texts["reference"], "with any draft the answers are the target's"
    table = json.loads((files / "out" / "acceptance.json").read_text())["against_reference"]
    assert metrics["tau/one"] != metrics["reference/tau/one"]
    gap = table["rows"][0]["average_gap"]["value"]
    assert gap == pytest.approx(metrics["reference/tau/average"] - metrics["tau/average"])
    assert "Against the reference" in (files / "out" / "acceptance.md").read_text()


def test_smaller_blocks_and_sampled_verification(files):
    small = evaluate(files, "mode.block_size=2", "mode.timed_prompts=0", out="small")
    assert 1 <= small["tau/one"] <= 2
    sampled = evaluate(
        files, "mode/verification=exact_match", "mode.verification.temperature=0.8", out="sampled"
    )
    assert sampled["speedup_different/one"] == 0, "plain sampling draws the same tokens"
    conditions = json.loads((files / "sampled" / "conditions.json").read_text())
    assert conditions["verification"]["temperature"] == 0.8 and conditions["seed"] == 1
    rejected = evaluate(files, "mode/verification=rejection", out="rejected")
    assert rejected["speedup/one"] > 0


def test_prompts_without_room_are_counted(files):
    with (files / "one.jsonl").open("a") as file:
        file.write(json.dumps({"id": "long", "source": "x", "prompt": "word " * 300}) + "\n")
    metrics = evaluate(files, "model.max_position_embeddings=256")
    assert metrics["failed"] == 1 and metrics["answers/one"] == 4
    failed = json.loads((files / "out" / "failed.jsonl").read_text())
    assert failed["id"] == "long" and "the target has room for 256" in failed["error"]
    (files / "one.jsonl").write_text((files / "one.jsonl").read_text().splitlines()[-1] + "\n")
    with pytest.raises(DataError, match="one: no prompt was answered; prompt of"):
        evaluate(files, "model.max_position_embeddings=256", out="none")


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        (["mode.draft=null"], ConfigError, "no draft given; allowed: one of eval.checkpoint_path"),
        (["eval.checkpoint_path=a.ckpt"], ConfigError, "draft and checkpoint given"),
        (["mode.block_size=7"], ConfigError, r"mode\.draft: mode\.block_size=7: allowed 2 \.\. 6"),
        (["model.hidden_size=48"], ConfigError, r"mode\.draft: hidden_size=32, but"),
    ],
)
def test_what_cannot_be_measured_is_refused(files, more, error, message):
    with pytest.raises(error, match=message):
        evaluate(files, *more)


def test_a_network_is_no_target(files):
    more = [text for text in overrides(files) if not text.startswith("model")]
    with pytest.raises(ConfigError, match="model=nano: is no target of a draft"):
        acceptance_eval.run(compose_config(*more, run_dir=files / "out"))


def test_bad_prompts_are_refused(files):
    (files / "talk.jsonl").write_text("")
    with pytest.raises(DataError, match=r"talk\.jsonl: no prompts"):
        evaluate(files)
    line = json.dumps({"id": "a", "source": "x", "prompt": "b"}) + "\n"
    (files / "talk.jsonl").write_text(line * 2)
    with pytest.raises(DataError, match=r"talk\.jsonl: id 'a' occurs twice"):
        evaluate(files)
    (files / "talk.jsonl").write_text(line.replace('"prompt"', '"turns": 3, "prompt"'))
    with pytest.raises(DataError, match="row 'a': 'turns' must be a list of texts"):
        evaluate(files)


def compared(files, *more):
    cfg = compose_config("mode=acceptance_table", *more, run_dir=files / "table")
    return acceptance_table.run(cfg)


def test_a_table_of_runs(files, knowing):
    for seed, name in enumerate(("m1", "m2", "bar")):
        save_draft(files / name, seed=seed)
        evaluate(files, "mode.timed_prompts=0", out=f"run_{name}", draft=name)
    runs = f"mode.runs=[{files}/run_m1,{files}/run_m2]"
    metrics = compared(files, runs, f"mode.reference_run={files}/run_bar", "mode.remarks=[Noted.]")
    assert metrics["runs"] == 3 and metrics["delta/run_m2"] != 0
    assert metrics["delta/run_m2"] == pytest.approx(metrics["tau/run_m2"] - metrics["tau/run_m1"])
    text = (files / "table" / "acceptance_table.md").read_text()
    assert "| run | one | talk | average | step | p | gap closed |" in text
    assert "| run_bar (reference) |" in text and "- Noted." in text
    assert "what the reference was trained on is not known here" in text
    assert (files / "table" / "acceptance_table.png").is_file()
    table = json.loads((files / "table" / "acceptance_table.json").read_text())
    assert table["prompts"] == {"one": 4, "talk": 2}

    evaluate(files, "mode.timed_prompts=0", "mode.max_new_tokens=5", out="short")
    with pytest.raises(
        DataError, match="run_m1 and short cannot be compared: max_new_tokens is 12"
    ):
        compared(files, f"mode.runs=[{files}/run_m1,{files}/short]")
    with pytest.raises(ConfigError, match=r"acceptance\.json: cannot be read"):
        compared(files, f"mode.runs=[{files}/draft]")


def test_a_reference_measured_beside_the_last_run_is_the_tables(files):
    save_draft(files / "other", seed=7)
    evaluate(files, f"mode.reference_draft={files / 'other'}", out="both")
    metrics = compared(files, f"mode.runs={files}/both")
    assert set(metrics) >= {"runs", "tau/both", "tau/both reference"}


def test_the_command_line(files):
    code = call_main([*overrides(files), f"paths.run_dir={files}/cli"])
    assert code == 0
    summary = load_summary(files / "cli")
    assert summary["status"] == "done" and summary["metrics"]["tau/one"] >= 1
    assert load_draft(files / "draft").config.block_size == 6


def test_a_trained_checkpoint_is_opened_with_its_target(tmp_path):
    """What mode=train wrote is measured, and drafts its target's answers better than chance."""
    fit(tmp_path, tmp_path / "train", "trainer.max_steps=60", "trainer.val_check_interval=60")
    rows = [json.loads(line) for line in answered_rows(tmp_path).read_text().splitlines()]
    kept = [{key: row[key] for key in ("id", "source", "messages")} for row in rows[:6]]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    cfg = compose_config(
        "mode=acceptance_eval", f"eval.checkpoint_path={tmp_path}/train/checkpoints/last.ckpt",
        f"mode.prompts={{seen: {tmp_path}/p.jsonl}}", "mode.max_new_tokens=24", "trainer=cpu",
        "mode.timed_prompts=1", run_dir=tmp_path / "out",
    )  # fmt: skip
    metrics = acceptance_eval.run(cfg)
    assert 1.05 < metrics["tau/seen"] <= 4 and metrics["speedup_different/seen"] == 0
    said = {row["id"]: row["response"] for row in rows}
    assert all(row["text"] == said[row["id"]] for row in rows_of(tmp_path / "out"))


def test_what_an_answer_holds_does_not_cut_its_row(files):
    """U+2028, U+2029 and U+0085 end lines for Python's texts, not for JSON; half a surrogate pair
    has no UTF-8."""
    evaluate(files, "mode.timed_prompts=0")
    path = files / "out" / "acceptance.jsonl"
    odd = "one\u2028two\u2029three\u0085four"
    rows = rows_of(files / "out")
    rows[0]["text"] = odd
    path.write_bytes(b"".join(map(encode_row, rows)) + b'{"cut off')
    found = draft_run(files / "out", "label", "draft", {})
    assert len(found.answers) == len(rows)
    log = RowLog(
        path, {("one", f"p{n}"): 1 for n in range(4)} | {("talk", f"p{n}"): 2 for n in (0, 1)}
    )
    assert log.rows()[0]["text"] == odd and len(log.rows()) == len(rows)
    log.append([[{**rows[0], "draft": "\ud83d", "text": "\ud83d"}]])
    assert read_rows(path)[0][-1]["text"] == "\ud83d"


def test_a_row_twice_is_refused(files):
    evaluate(files, "mode.timed_prompts=0")
    path = files / "out" / "acceptance.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines, lines[2]]))
    with pytest.raises(DataError, match=rf"acceptance\.jsonl:{len(lines) + 1}: draft, .* twice"):
        draft_run(files / "out", "label", "draft", {})
    with pytest.raises(DataError, match="is there twice; remove one"):
        evaluate(files, "mode.timed_prompts=0")


def test_a_folder_belongs_to_one_run_at_a_time(files, monkeypatch):
    """The second waits at the door: the lock is held from before the claim to after the report."""
    held = []

    def look(*_):
        lock = FileLock(files / "out" / "acceptance.jsonl.lock", timeout=0)
        with pytest.raises(Timeout):
            lock.acquire()
        held.append(True)
        return ""

    for name in ("claim_folder", "write_report"):
        monkeypatch.setattr(acceptance_eval, name, look)
    evaluate(files, "mode.timed_prompts=0")
    assert held == [True, True]


def test_failures_of_two_drafts_are_one_prompt_and_are_told_by_their_benchmark(files):
    save_draft(files / "other", seed=7)
    long = json.dumps({"id": "long", "source": "x", "prompt": "word " * 300}) + "\n"
    with (files / "one.jsonl").open("a") as file:
        file.write(long)
    reference = f"mode.reference_draft={files / 'other'}"
    small = ("model.max_position_embeddings=256", "mode.timed_prompts=1")
    metrics = evaluate(files, reference, *small)
    assert metrics["failed"] == 1 and metrics["speedup/one"] > 0
    lines = (files / "out" / "failed.jsonl").read_text().splitlines()
    assert [json.loads(line)["draft"] for line in lines] == ["draft", "reference"]
    (files / "talk.jsonl").write_text(long.replace("word ", "other words "))
    with pytest.raises(DataError, match="talk: no prompt was answered; prompt of 3") as stop:
        evaluate(files, *small, out="none")
    failed = [
        json.loads(line) for line in (files / "none" / "failed.jsonl").read_text().splitlines()
    ]
    assert [row["benchmark"] for row in failed] == ["one", "talk"]
    assert failed[1]["error"] in str(stop.value) and failed[0]["error"] not in str(stop.value)


def test_a_chat_template_that_refuses_is_one_failed_prompt(files, monkeypatch):
    original = CausalTarget.chat_ids

    def chat_ids(self, messages, thinking=False):
        if messages[0]["content"] == "word ":
            raise DataError("its chat template refuses (no)")
        return original(self, messages, thinking)

    monkeypatch.setattr(CausalTarget, "chat_ids", chat_ids)
    metrics = evaluate(files)
    assert metrics["failed"] == 2 and metrics["answers/one"] == 3 and metrics["speedup/one"] > 0


def test_the_conditions_tell_numbers_and_texts(files):
    evaluate(files, "mode.timed_prompts=0")
    conditions = json.loads((files / "out" / "conditions.json").read_text())
    assert conditions["backend"] == "local float32"
    assert conditions["tokenizer"] == tiny_causal(**SMALL).text_fingerprint
