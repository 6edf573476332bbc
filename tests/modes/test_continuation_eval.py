"""mode=continuation_eval: real checkpoints, real rows, every verdict kept; killed and resumed."""

import json

import pytest
import torch

from decoding.generate import GenerationRequest, GenerationSettings
from decoding.local import LocalGenerator
from evaluation.continuation_quality import measure
from evaluation.held_out import HeldOut
from modes import continuation_eval
from modes.continuation_eval import Side, likelihoods, run
from opening import evaluation_data, open_to_answer
from rewards.continuation import Preference
from runtime.errors import ConfigError
from runtime.validation import validate
from tests.block_runs import configure, fit
from tests.runs import best
from tests.support import compose_config

ROWS = 2
TWO_STEPS = ("trainer.max_steps=2", "trainer.val_check_interval=2", "lr_scheduler.warmup_steps=1")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two checkpoints of short trainings."""
    folder = tmp_path_factory.mktemp("continuation")
    for name, rate in (("one", "1e-2"), ("two", "1e-4")):
        fit(folder, folder / name, "sft_raw", f"optim.lr={rate}", *TWO_STEPS)
    return folder


def configured(trained, run_dir, *overrides):
    cfg = configure(
        trained, run_dir, "sft_raw", "mode=continuation_eval", "judge=verifiable",
        f"eval.checkpoint_path={best(trained / 'one')}", f"eval.limit_rows={ROWS}",
        "mode.max_new_tokens=12", "mode.batch_size=4", *overrides,
    )  # fmt: skip
    validate(cfg)
    return cfg


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_two_checkpoints(trained, tmp_path):
    against = best(trained / "two")
    cfg = configured(trained, tmp_path, f"mode.against={against}")
    metrics = run(cfg)
    rows = rows_of(tmp_path / "pairs.jsonl")
    assert metrics["pairs"] == len(rows) / 2 >= ROWS
    said = {}
    for path in (cfg.eval.checkpoint_path, against):
        one = cfg.copy()
        one.eval.checkpoint_path = str(path)
        model, merged = open_to_answer(one)
        data = evaluation_data(merged, model.tokenizer, named=False)
        said[str(path)] = expected(model, data, cfg.eval.split)
    (ours, nll), (theirs, nll_against) = said.values()
    forward = [row for row in rows if row["order"] == "forward"]
    assert [(row["prefix"], row["reference"], row["first"]) for row in forward] == ours
    assert [(row["prefix"], row["reference"], row["second"]) for row in forward] == theirs
    assert ours != theirs
    for one, other in zip(forward, rows[1::2], strict=True):
        assert (other["order"], other["first"], other["second"]) == (
            "backward", one["second"], one["first"],
        )  # fmt: skip
        right = [one[part].split("\n")[0] == one["reference"] for part in ("first", "second")]
        winner = "tie" if right[0] == right[1] else "first" if right[0] else "second"
        assert one["winner"] == winner
    assert metrics["suffix_nll"] == pytest.approx(nll, rel=1e-5)
    assert metrics["suffix_nll_against"] == pytest.approx(nll_against, rel=1e-5)
    assert metrics["suffix_nll_delta"] == pytest.approx(nll - nll_against, abs=1e-5)
    found = measure(rows, "both_orders").metrics()
    assert {name: metrics[name] for name in found} == found
    written = json.loads((tmp_path / "continuation.json").read_text())
    assert written["metrics"] == metrics and written["quality"]["protocol"] == "both_orders"
    assert f"| win_rate | {metrics['win_rate']:.4f} |" in (tmp_path / "continuation.md").read_text()


def test_of_one_document_no_error_is_said():
    """nan would enter summary.json as a text."""
    document, one = HeldOut("0-0", [1], [2, 3]), Side({}, {}, {}, [3.0])
    assert likelihoods([document], one, None) == {"suffix_nll": 1.5}


def expected(model, data, split):
    """Texts and nats per token of every document, one after the other."""
    generator = LocalGenerator(
        model.as_target(), GenerationSettings(max_new_tokens=12), device="cpu"
    )
    texts, nats, tokens = [], 0.0, 0
    for batch in data.eval_loader(split, ROWS):
        for ids, segment, response in zip(
            *(batch[name] for name in ("input_ids", "segment", "response")), strict=True
        ):
            for number in range(int(segment.max()) + 1):
                mine, written = ids[segment == number], response[segment == number] == 1
                start, length = int(written.int().argmax()), int(written.sum())
                # Behind a suffix there may be padding up to the next block.
                mine = mine[: start + length]
                prefix, suffix = mine[:start], mine[start:]
                request = GenerationRequest("x", prompt_ids=prefix.tolist())
                (result,) = generator.generate([request])
                decoded = [model.tokenizer.decode(part, skip_special_tokens=True)
                           for part in (prefix, suffix)]  # fmt: skip
                texts.append((*decoded, result.text))
                with torch.no_grad():
                    logits = model.backbone.model(input_ids=mine[None]).logits[0, :-1]
                own = logits.log_softmax(-1).gather(-1, mine[1:, None])[len(prefix) - 1 :]
                nats, tokens = nats - float(own.sum()), tokens + len(suffix)
    return texts, nats / tokens


def test_a_model_against_itself_is_even(trained, tmp_path):
    itself = f"mode.against={best(trained / 'one')}"
    metrics = run(configured(trained, tmp_path, itself, "mode.protocol=seed_random_swap"))
    assert (metrics["win_rate"], metrics["tie"]) == (0.5, metrics["pairs"])
    assert metrics["suffix_nll_delta"] == 0.0 and "order_flip_rate" not in metrics
    assert len(rows_of(tmp_path / "pairs.jsonl")) == metrics["pairs"]


class Failing:
    """Says "first" some times, then nothing, or breaks down."""

    def __init__(self, valid, broken=False):
        self.valid, self.broken, self.asked = valid, broken, []

    def compare(self, pairs):
        if self.broken and len(self.asked) >= self.valid:
            raise ValueError("the judge is gone")
        self.asked += [pair.id for pair in pairs]
        kept = self.valid - len(self.asked) + len(pairs)
        return [
            Preference("first") if n < kept else Preference(None, "no answer: HTTP 500")
            for n in range(len(pairs))
        ]

    def identity(self):
        return {"judge": "failing"}


def test_what_was_said_is_not_asked_again_and_what_was_invalid_is(trained, tmp_path, monkeypatch):
    judges = [Failing(4, broken=True), Failing(3), Failing(100), Failing(100)]
    left = iter(judges)
    monkeypatch.setattr(continuation_eval, "judge_of", lambda cfg: next(left))
    cfg = configured(trained, tmp_path)
    with pytest.raises(ValueError, match="the judge is gone"):
        run(cfg)
    assert len(rows_of(tmp_path / "verdicts.jsonl")) == 4
    written = (tmp_path / "continuations.jsonl").read_bytes()
    first = run(cfg)
    questions = 2 * first["pairs"]
    assert len(judges[1].asked) == questions - 4
    assert first["invalid"] > 0 and first["invalid_rate"] == first["invalid"] / first["pairs"]
    invalid = [row for row in rows_of(tmp_path / "pairs.jsonl") if row["winner"] is None]
    assert len(invalid) == questions - 7
    assert {row["reason"] for row in invalid} == {"no answer: HTTP 500"}
    second = run(cfg)
    assert len(judges[2].asked) == questions - 7 and second["invalid"] == 0
    assert (second["win_rate"], second["first_position_rate"]) == (0.5, 1.0)
    run(cfg)
    assert judges[3].asked == [] and (tmp_path / "continuations.jsonl").read_bytes() == written


def test_a_folder_belongs_to_its_conditions(trained, tmp_path):
    run(configured(trained, tmp_path))
    for changed, reason in {
        "mode.max_new_tokens=13": "settings.max_new_tokens=12, now 13",
        f"eval.checkpoint_path={best(trained / 'two')}": "model.fingerprint=",
        f"mode.against={best(trained / 'two')}": "against.dtype=null, now",
    }.items():
        with pytest.raises(ConfigError, match=f"was begun with .*{reason}"):
            run(configured(trained, tmp_path, changed))


def test_a_judge_in_this_process_is_counted(trained, tmp_path):
    cfg = configured(
        trained, tmp_path, "judge=local", "model@judge.backend.target=tiny_causal",
        "judge.backend.target.hidden_size=32", "judge.backend.target.num_hidden_layers=2",
        "judge.backend.target.max_position_embeddings=2048",
    )  # fmt: skip
    metrics = run(cfg)
    assert metrics["judge/asked"] == 2 * metrics["pairs"] and metrics["judge/invalid"] == 0
    assert len(rows_of(tmp_path / "judge_answers.jsonl")) == metrics["judge/asked"]
    assert "suffix_nll_against" not in metrics, "the documents have no likelihood of their own"


def test_a_prompt_without_room_is_invalid_not_forgotten(trained, tmp_path, monkeypatch):
    read = continuation_eval.read_held_out

    def longer(batches, data):
        first, *rest = read(batches, data)
        return [type(first)(first.id, first.prefix_ids * 400, first.suffix_ids), *rest]

    monkeypatch.setattr(continuation_eval, "read_held_out", longer)
    metrics = run(configured(trained, tmp_path))
    rows = rows_of(tmp_path / "pairs.jsonl")
    assert metrics["invalid"] == 1 and metrics["valid"] == metrics["pairs"] - 1
    assert rows[0]["reason"].startswith("no continuation: a prompt of ")


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (["~judge"], "judge=null: nobody to ask; allowed: one of local, server, verifiable"),
        (["mode.against=nowhere.ckpt"], "mode.against=nowhere.ckpt: no such file"),
    ],
    ids=["judge", "against"],
)
def test_bad_options(trained, tmp_path, changed, reason):
    cfg = configured(trained, tmp_path, *[one for one in changed if "~" not in one])
    if "~judge" in changed:
        cfg.judge = None
    with pytest.raises(ConfigError, match=reason):
        run(cfg)


def test_keys_are_checked(trained, tmp_path):
    for bad in ("mode.protocol=once", "mode.against=[a,b]", "judge._target_=3"):
        with pytest.raises(ConfigError):
            configured(trained, tmp_path, bad)
    server = ("judge=server", "judge.backend.generator.model=x")
    for bad in ("judge.repeats=0", "judge.window=0", "judge.max_invalid_rate=2", "judge.cache=3"):
        with pytest.raises(ConfigError, match=f"{bad.split('=')[0]}="):
            configured(trained, tmp_path, *server, bad)


def test_other_modes_keep_their_against():
    with pytest.raises(ConfigError, match=r"mode.against=null: wrong value"):
        validate(compose_config("mode=subtract", "mode.input=a.jsonl", "mode.against=null"))
