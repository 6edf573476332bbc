import json
import math
from collections import Counter

import numpy as np
import pytest
import torch

from algorithm import Algorithm
from evaluation.scorer import ALPHAS, picked
from evaluation.scorer_rows import read_blocks
from evaluation.scorer_run import _probed, probe_leak, scored_blocks
from modes import scorer_eval
from runtime.errors import ConfigError
from scorer import CandidateScorer
from tests.block_runs import build, fit
from tests.scorer_runs import KINDS, SAMPLES
from tests.support import compose_config


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A chain of two tiny runs, and where its scorer's best.ckpt is."""
    folder = tmp_path_factory.mktemp("scorer")
    fit(folder, folder / "refined", "draft_refine", "trainer.max_steps=8")
    start = f"training.from_pretrained={folder / 'refined' / 'checkpoints' / 'last.ckpt'}"
    fit(folder, folder / "nce", "nce", start, "bon.rounds=2", "bon.score_agg=perround")
    return folder


def checkpoint(folder, run="nce"):
    return folder / run / "checkpoints" / "last.ckpt"


def evaluate(folder, run_dir, *overrides, path=None):
    """The mode as main.py runs it, which takes the sections that were named from the command."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("opening.overridden_keys", lambda: [o.partition("=")[0] for o in overrides])
        return evaluated(folder, run_dir, *overrides, path=path)


def evaluated(folder, run_dir, *overrides, path=None):
    cfg = compose_config(
        "mode=scorer_eval", f"eval.checkpoint_path={path or checkpoint(folder)}",
        f"paths.cache_dir={folder}/cache", *overrides, run_dir=run_dir,
    )  # fmt: skip
    return scorer_eval.run(cfg)


def test_the_mode_writes_rows_tables_and_plots(trained, tmp_path):
    metrics = evaluate(trained, tmp_path)
    assert {"oracle", "greedy", "bon", "gain", "ships", "leak/rate"} <= metrics.keys()
    blocks = read_blocks(tmp_path / "blocks.jsonl")
    assert metrics["blocks"] == len(blocks.valid_MC)
    assert metrics["greedy"] == pytest.approx((blocks.errors_MC[:, 0] == 0).mean())
    chosen = picked(blocks, metrics["alpha"])
    right = blocks.is_truth_MC[np.arange(len(chosen)), chosen].mean()
    assert metrics["bon"] == pytest.approx(right)
    assert len(blocks.score_RMC) == 2
    np.testing.assert_allclose(blocks.score_RMC.mean(0)[blocks.valid_MC],
                               blocks.score_MC[blocks.valid_MC], rtol=1e-5)  # fmt: skip
    for name in ("scorer.md", "scorer_alpha.png", "scorer_reliability.png", "config.yaml"):
        assert (tmp_path / name).stat().st_size > 0
    assert json.loads((tmp_path / "scorer.json").read_text())["blocks"] == metrics["blocks"]


def test_the_blocks_of_the_data_and_tuned_alpha(trained, tmp_path):
    """The validation rows here are the batches that the checkpoint keeps."""
    kept = evaluate(trained, tmp_path / "kept")
    data = evaluate(trained, tmp_path / "data", "mode.blocks=data")
    assert kept["blocks"] == data["blocks"] and kept["oracle"] == data["oracle"]
    assert kept["tuned/alpha"] in ALPHAS
    assert kept["tuned/gain_seen"] >= 0.0


def test_a_judge_picks_by_its_log_probability(trained, tmp_path):
    """Against the likelihood of every candidate by itself, in a plain pass of the network."""
    fit(trained, tmp_path / "ar", "sft_raw", "trainer.max_steps=6")
    path = tmp_path / "ar" / "checkpoints" / "last.ckpt"
    metrics = evaluate(trained, tmp_path / "eval", f"mode.judge={path}")
    assert metrics["judge/gain"] == pytest.approx(metrics["judge/bon"] - metrics["judge/greedy"])
    assert metrics["judge/greedy"] == metrics["greedy"]
    model, judge = (Algorithm.load_from_checkpoint(p) for p in (checkpoint(trained), path))
    judged = scored_blocks(model, model.eval_batches[:1], judge)
    batch = model.eval_batches[0]
    layout = model.layout(batch)
    _, _, rounds = model.candidates({**batch, "layout": layout}, layout, model.best_of)
    number = 0
    for x in layout.exists_BM.flatten().nonzero()[:, 0].tolist():
        row, block = x // layout.block_BM.shape[1], int(layout.block_BM.flatten()[x])
        scored = layout.scored_BMS.flatten(0, 1)[x].nonzero()[:, 0]
        begin, first = int(layout.start_BN[row, block]), block * model.block_size + int(scored[0])
        for j in range(model.best_of.count):
            text = rounds[-1].tokens_XCS[x, j, scored]
            read = torch.cat([batch["input_ids"][row, begin:first], text])[None]
            logits = judge.backbone.model(read).logits[0, -len(text) - 1 : -1]
            wanted = logits.log_softmax(-1).gather(1, text[:, None]).sum()
            assert judged.score_MC[number, j] == pytest.approx(wanted.item(), rel=1e-4, abs=1e-4)
        number += 1
    assert number == len(judged.score_MC) > 5


def test_what_is_no_scorer_is_refused(trained, tmp_path):
    with pytest.raises(ConfigError, match="algo=draft_refine, which scores no candidates"):
        evaluate(trained, tmp_path, path=checkpoint(trained, "refined"))


def test_candidates_that_follow_the_scorer_are_refused(trained, tmp_path):
    with pytest.raises(ConfigError, match=r"bon\.score_agg=select_each: its chain follows"):
        evaluate(trained, tmp_path, "bon.score_agg=select_each", "bon.rounds=1")


def test_a_probe_without_sets_is_not_measured(trained, tmp_path, capsys):
    """One candidate leaves nothing to rank; what was measured is written all the same."""
    metrics = evaluate(trained, tmp_path, "bon.proposal.max_swap=0")
    assert "leak/rate" not in metrics and metrics["gain"] == 0.0
    assert "leak probe: not measured (" in capsys.readouterr().out
    assert (tmp_path / "scorer.md").is_file() and (tmp_path / "scorer.json").is_file()


def test_alphas_that_decoding_refuses_are_not_tuned(tmp_path):
    beam, _, _ = build(tmp_path, "nce")
    samples, _, _ = build(tmp_path, "nce", *SAMPLES)
    corrected, _, _ = build(tmp_path, "nce", *KINDS["corrected"])
    assert scorer_eval.allowed_alphas(beam) == list(ALPHAS)
    assert scorer_eval.allowed_alphas(samples) == list(ALPHAS[:-1])
    assert scorer_eval.allowed_alphas(corrected) == [0.0, math.inf]


def test_alpha_0_picks_what_greedy_refinement_writes(trained):
    model = CandidateScorer.load_from_checkpoint(checkpoint(trained))
    blocks = scored_blocks(model, model.eval_batches)
    assert (picked(blocks, 0.0) == 0).all()
    exact = 0
    for batch in model.eval_batches:
        layout = model.layout(batch)
        refined = model.refine(model.reader({**batch, "layout": layout}), layout)
        wrong = (refined.token_XS != layout.target_BMS.flatten(0, 1)) & layout.predict_BMS.flatten(
            0, 1
        )
        exact += int((~wrong.any(-1) & layout.exists_BM.flatten()).sum())
    assert exact == (blocks.errors_MC[:, 0] == 0).sum()


def test_the_probe_is_at_chance_and_can_fail(tmp_path):
    """What looks at the content of a slot is at chance; what knows its place is not."""
    model, data, _ = build(tmp_path, "nce")
    batches = list(data.eval_loader("train", rank=0, world=1))
    content = probe_leak(model.eval(), batches)
    assert content.sets >= 15 and content.at_chance
    honest = model.scores

    def cheating(hidden_XCSD, tokens_XCS, written_XS):
        """The truth's path scores one candidate at a time."""
        return honest(hidden_XCSD, tokens_XCS, written_XS) + 5.0 * (tokens_XCS.shape[1] == 1)

    model.scores = cheating
    leaky = probe_leak(model, batches)
    assert leaky.rate == 1.0 and not leaky.at_chance


def test_the_moved_candidate_is_read_as_the_truth_is(tmp_path):
    """It scores there what it scores as a candidate, and its own slot is empty."""
    model, data, _ = build(tmp_path, "nce")
    batch = next(iter(data.eval_loader("train", rank=0, world=1)))
    score_BJ, valid_BJ = _probed(model.eval(), batch)
    assert valid_BJ[:, 0].all() and not valid_BJ[:, 1:].all()
    moved = []
    for scores, valid in zip(score_BJ, valid_BJ, strict=True):
        empty = [j for j in range(1, len(scores)) if not valid[j]]
        match = [j for j in empty if abs(scores[j] - scores[0]) < 1e-4]
        assert match, "one of the empty slots held what stands in slot 0 now"
        moved.append(match[0])
    assert len(Counter(moved)) > 1 or len(moved) < 4


def test_the_truth_scores_the_same_wherever_it_stands(tmp_path):
    """A candidate that is the truth has the score of the clean text's hidden states."""
    model, data, _ = build(tmp_path, "nce", "bon.count=4")
    found = 0
    for batch in data.eval_loader("train", rank=0, world=1):
        layout = model.layout(batch)
        reader = model.reader({**batch, "layout": layout}, only_keys=False)
        truth = layout.target_BMS.flatten(0, 1)
        with torch.no_grad():
            inputs = model.backbone.embed(truth)
            hidden = reader.run(inputs)[:, None]
        written = layout.predict_BMS.flatten(0, 1)
        clean = layout.of_blocks(reader.clean_BLD).flatten(0, 1)[:, None]
        exists = layout.exists_BM.flatten()
        as_candidate = model.scores(hidden, truth[:, None], written)[exists]
        as_truth = model.scores(clean, truth[:, None], written)[exists]
        torch.testing.assert_close(as_candidate, as_truth, atol=1e-4, rtol=1e-4)
        found += len(as_truth)
    assert found > 20
