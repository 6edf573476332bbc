"""Modes that compare on held-out prefixes, where several of them are cut from one document."""

import json

import numpy as np
import pytest

from dataloader import LanguageData
from evaluation.continuation_quality import measure
from evaluation.held_out import HeldOut
from modes import continuation_eval, gate_folder, reward_gate, train
from modes.continuation_eval import Side, likelihoods
from modes.gate_folder import read_prefixes
from runtime.validation import validate
from tests.runs import EIGHT_STEPS
from tests.support import compose_config

# Chunks of twelve bytes: of lines of this length three or four follow the first.
TRAINED = (
    "model=tiny_thinker", "model.hidden_size=32", "model.num_hidden_layers=2", "model.length=36",
    "model.num_attention_heads=2", "model.num_key_value_heads=1", "algo=sft_raw",
    "algo.attn_backend=math", "data=prefix_suffix", "data.split_paragraphs=true",
    "data.valid_fraction=0.3", "data.chunking.mode=contiguous", "data.chunking.suffix_len=12",
    "data.chunking.max_len=36", "data.chunking.min_source_tokens=0", *EIGHT_STEPS,
    "trainer.max_steps=1", "trainer.val_check_interval=1", "training.ema=0",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint that has seen one step of lines, delimiters among their words."""
    folder = tmp_path_factory.mktemp("documents")
    lines = (
        f"line {n} <think> {'xy' * (n % 5)} goes on until its end </think>\n\n" for n in range(40)
    )
    (folder / "text.txt").write_text("".join(lines))
    more = (f"data.files={folder}/text.txt", f"paths.cache_dir={folder}/cache")
    train.run(compose_config(*TRAINED, *more, run_dir=folder / "run"))
    return folder


def documents_by_text(folder, split="validation"):
    """The line that every row of a split is from, found by its text."""
    cfg = compose_config(
        *TRAINED, f"data.files={folder}/text.txt", f"paths.cache_dir={folder}/cache"
    )
    data = LanguageData(cfg)
    lines = [document["text"] for document in data.source.documents(split)]
    texts = data.texts_of_rows(split, np.arange(len(data.rows(split))))
    found = [[n for n, line in enumerate(lines) if text in line] for text in texts]
    return texts, found, lines, data


def test_rows_know_the_line_that_they_are_from(folder):
    texts, found, lines, data = documents_by_text(folder)
    origins = data.rows("validation").take(np.arange(len(texts)))["origin"]
    assert origins.shape == (len(texts), 1) and len(texts) > 2 * len(lines)
    assert all(origin in of_text for (origin,), of_text in zip(origins, found, strict=True))
    assert sorted(set(origins[:, 0].tolist())) == list(range(len(lines)))
    report = data.packing_report("validation")
    assert report.added_tokens_in_text == 0 and any("<think>" in text for text in texts)


def configured(folder, run_dir, *overrides):
    cfg = compose_config(
        *overrides, "trainer=cpu", f"paths.cache_dir={folder}/cache", run_dir=run_dir
    )
    validate(cfg)
    return cfg


def test_the_gate_draws_documents(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(gate_folder, "plot_gate", lambda path, gate: path.touch())
    checkpoint = folder / "run/checkpoints/last.ckpt"
    cfg = configured(
        folder, tmp_path, "mode=reward_gate", f"mode.checkpoints={{a:{checkpoint}}}",
        "mode.prefixes=16", "mode.samples=2", "mode.thought_tokens=2", "mode.suffix_tokens=4",
        "mode.batch_size=32", "+reward={_target_:tests.plugins.toy_reward.ByteReward,salt:a}",
    )  # fmt: skip
    metrics = reward_gate.run(cfg)
    _, found, lines, _ = documents_by_text(folder)
    prefixes = read_prefixes(tmp_path)
    for prefix in prefixes:
        assert prefix.document in found[int(prefix.id.removeprefix("validation-"))]
        assert prefix.prefix + prefix.reference in lines[prefix.document]
    documents = len({prefix.document for prefix in prefixes})
    assert metrics["gate/a/documents"] == documents < metrics["gate/a/prefixes"] == 16
    rows = [json.loads(line) for line in (tmp_path / "arms/a.jsonl").open()]
    assert [row["document"] for row in rows] == [p.document for p in prefixes for _ in range(2)]


def test_continuations_are_compared_by_document(folder, tmp_path):
    cfg = configured(
        folder, tmp_path, "mode=continuation_eval", "judge=verifiable", "eval.limit_rows=12",
        f"eval.checkpoint_path={folder}/run/checkpoints/last.ckpt", "mode.max_new_tokens=4",
    )  # fmt: skip
    metrics = continuation_eval.run(cfg)
    _, found, _, _ = documents_by_text(folder)
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").open()]
    assert all(row["document"] in found[int(row["pair"].split("-")[0])] for row in rows)
    assert metrics["documents"] == len({row["document"] for row in rows}) < metrics["pairs"] == 12
    again = measure(rows, cfg.mode.protocol).metrics()
    assert {name: metrics[name] for name in again} == again


def test_the_error_of_a_difference_is_over_documents():
    documents = [HeldOut(str(n), [1], [2, 3], document=n // 2) for n in range(4)]
    ours, theirs = (Side({}, {}, {}, nll) for nll in ([1.0, 3.0, 2.0, 6.0], [0.0] * 4))
    # Sums 4 and 8 of 4 tokens each: r = 1.5, deviations -2 and 2.
    found = likelihoods(documents, ours, theirs)
    assert found["suffix_nll_delta"] == 1.5
    assert found["suffix_nll_delta_se"] == pytest.approx(np.sqrt(2 * 8) / 8)
