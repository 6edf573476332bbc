"""Whole runs of a scorer: a frozen backbone, what is logged, checkpoints, what is refused."""

import itertools
import math

import pytest
import torch

from algorithm import Algorithm
from callbacks.metrics_csv import read_metrics
from decoding.generate import GenerationRequest, GenerationSettings
from decoding.refine import RefineGenerator
from models.scorer import ScoreHead
from refine import DraftRefine
from runtime.config import to_plain
from runtime.errors import CheckpointError
from scorer import CandidateScorer
from tests.block_runs import build, configure, fit, tiny_blocks
from tests.runs import call_main, last
from tests.scorer_runs import (
    KINDS,
    SAMPLES,
    learned,
    rounds_of,
    scorer_of,
    slow_loss,
    slow_rows,
    start,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return learned(tmp_path_factory.mktemp("scorer"))


@pytest.fixture(scope="module")
def trained(folder):
    """A finished run, what it has logged, and the algorithm as it left it."""
    caught = []
    original = CandidateScorer.on_train_end

    def on_train_end(self):
        original(self)
        caught.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CandidateScorer, "on_train_end", on_train_end)
        metrics = fit(folder, folder / "nce", "nce", start(folder), "trainer.max_steps=6")
    return caught[0], metrics, read_metrics(folder / "nce" / "metrics.csv")


def test_the_backbone_is_frozen(folder, trained):
    algorithm, _, _ = trained
    fresh, _, _ = scorer_of(folder)
    assert algorithm.weights_fingerprint == fresh.weights_fingerprint
    assert not any(p.requires_grad for p in algorithm.backbone.parameters())
    assert all(p.grad is None for p in algorithm.backbone.parameters())
    assert not algorithm.train().backbone.training and algorithm.head.training
    moved = {
        name
        for name, value in algorithm.state_dict().items()
        if name.startswith("backbone.") and not torch.equal(value, fresh.state_dict()[name])
    }
    assert not moved
    optimizer = last(folder / "nce")["optimizer_states"][0]
    assert len(optimizer["state"]) == len(list(algorithm.head.parameters()))


def test_it_is_the_model_that_the_draft_run_was_measured_by(folder, trained):
    """The moving average: at alpha = 0 the answers are those of the draft's own checkpoint."""
    algorithm, _, _ = trained
    draft = DraftRefine.load_from_checkpoint(folder / "draft" / "checkpoints" / "last.ckpt")
    for ours, theirs in zip(
        algorithm.backbone.parameters(), draft.backbone.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs)
    raw = last(folder / "draft")["state_dict"]["backbone.model.lm_head.weight"]
    assert not torch.equal(raw, algorithm.backbone.head_VD)
    settings = GenerationSettings(max_new_tokens=16, stop_ids=())
    prompts = [[1, 50, 60], list(range(40, 55)), [9] * 8]
    requests = [GenerationRequest(str(n), prompt_ids=p) for n, p in enumerate(prompts)]
    greedy = {r.id: r.token_ids for r in draft.generator(settings, device="cpu").generate(requests)}
    found = {}
    for alpha in (0.0, 20.0):
        changed = algorithm.config | {"bon": algorithm.config["bon"] | {"alpha": alpha}}
        opened = Algorithm.load_from_checkpoint(
            folder / "nce" / "checkpoints" / "last.ckpt", config=changed
        )
        with torch.no_grad():
            opened.head.mlp[2].weight.neg_()  # it has learned that greedy is best
        generator = opened.generator(settings, device="cpu")
        assert isinstance(generator, RefineGenerator)
        found[alpha] = {r.id: r for r in generator.generate(requests)}
    assert {key: r.token_ids for key, r in found[0.0].items()} == greedy
    assert not any(r.work["flips"] for r in found[0.0].values())
    assert sum(r.work["flips"] for r in found[20.0].values()) > 2


def test_another_scorer_starts_from_this_one(folder, trained):
    algorithm, _, _ = trained
    path = folder / "nce" / "checkpoints" / "last.ckpt"
    again, _, _ = build(folder, "nce", f"training.from_pretrained={path}")
    raw = last(folder / "nce")
    assert all(torch.equal(v, raw["state_dict"][k]) for k, v in again.state_dict().items())
    assert again.weights_fingerprint == algorithm.weights_fingerprint
    for shadow, wanted in zip(again.ema.shadow, raw["ema"]["shadow_params"], strict=True):
        assert torch.equal(shadow, wanted)


def test_what_a_step_logs(folder, trained):
    algorithm, _, table = trained
    steps = [row for row in table if "train/nce_loss" in row]
    assert len(steps) == 6
    for row in steps:
        assert all(math.isfinite(value) for value in row.values()), row
        assert row["train/loss"] == pytest.approx(row["train/nce_loss"], rel=1e-5)
        assert row["train/score_peak"] <= row["train/gamma"] * (1 + 1e-5)
        # Of n negatives, less where some of them are the truth.
        floor = math.log1p(algorithm.best_of.count * math.exp(-2 * row["train/gamma"]))
        assert 0.5 * floor < row["train/scale_floor"] < floor
        assert 0 < row["train/duplicate_rate"] < 1
        assert row["train/scale_floor"] < row["train/nce_loss"]
        assert 0 < row["train/rank_accuracy"] <= row["train/mrr"] <= 1
    # gamma is the one that the step was made with, what it moved by is seen in the next one.
    for row, after in itertools.pairwise(steps):
        moved = abs(after["train/gamma"] - row["train/gamma"])
        assert row["train/gamma_moved"] == pytest.approx(moved, abs=1e-6) and moved > 0
    assert (
        algorithm.head.scale().item()
        == pytest.approx(steps[-1]["train/gamma"] + steps[-1]["train/gamma_moved"], abs=1e-5)
        or algorithm.head.scale().item() < steps[-1]["train/gamma"]
    )


def test_validation_measures_the_average(folder, trained):
    """Every number from the slots of the checkpoint's averaged scorer, block by block."""
    _, metrics, table = trained
    model = CandidateScorer.load_from_checkpoint(folder / "nce" / "checkpoints" / "last.ckpt")
    assert metrics["val/gamma"] == pytest.approx(model.head.scale().item(), rel=1e-6)
    raw = last(folder / "nce")["state_dict"]["head.scale.log_scale"].exp().item()
    assert abs(raw - metrics["val/gamma"]) > 1e-4
    _, data, _ = build(folder, "nce", start(folder))
    losses, first, reciprocal, spread, floor, there, copies = [], 0, 0.0, 0.0, 0.0, 0, 0
    gamma = model.head.scale().item()
    for rows in data.eval_loader("validation"):
        batch = {**rows, "layout": model.layout(rows)}
        with torch.no_grad():
            _, _, [(slots, score)] = rounds_of(model, batch)
        for x, counted, same, scores, log_q in slow_rows(slots, score, True):
            copies += same
            there += int(slots.exists_XJ[x, 1:].sum())
            if len(counted) < 2:
                continue
            losses.append(slow_loss("ranking", counted, scores, log_q))
            rank = 1 + sum(scores[j] > scores[0] for j in counted[1:])
            first, reciprocal = first + (rank == 1), reciprocal + 1 / rank
            floor += math.log1p((len(counted) - 1) * math.exp(-2 * gamma))
            spread += float(torch.tensor([scores[j] for j in counted]).std(correction=0))
    blocks = len(losses)
    wanted = {
        "nce_loss": sum(losses) / blocks, "nll": sum(losses) / blocks,
        "rank_accuracy": first / blocks, "mrr": reciprocal / blocks,
        "score_spread": spread / blocks, "duplicate_rate": copies / there,
        "scale_floor": floor / blocks,
    }  # fmt: skip
    for name, value in wanted.items():
        assert metrics[f"val/{name}"] == pytest.approx(value, rel=1e-4), name
    assert metrics["best/val/nce_loss"] == min(r["val/nce_loss"] for r in table if "val/nll" in r)
    assert "unigram_ppl" not in metrics


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_run_shows_whether_gamma_can_move(folder, tmp_path, dtype):
    """Steps of 5e-5 at gamma = 2.7: lost in half precision although its gradient is there."""
    fit(
        folder, tmp_path, "nce", start(folder), "trainer.max_steps=3", "optim.lr=5e-5",
        "scorer.scale.init=2.7", "scorer.scale.lr_mult=1", f"scorer.scale.dtype={dtype}",
        "lr_scheduler=constant_warmup", "lr_scheduler.warmup_steps=0",
    )  # fmt: skip
    rows = [r for r in read_metrics(tmp_path / "metrics.csv") if "train/gamma" in r]
    assert all(abs(row["train/gamma_gradient"]) > 1e-3 for row in rows)
    moved = [row["train/gamma_moved"] for row in rows]
    if dtype == "bfloat16":
        assert moved == [0.0] * 3
    else:
        assert moved == pytest.approx([2.7 * 5e-5] * 3, rel=0.1)


def test_gamma_stays_between_its_bounds(folder, tmp_path):
    fit(
        folder, tmp_path, "nce", start(folder), "trainer.max_steps=3", "optim.lr=0.1",
        "scorer.scale.max=1.2", "scorer.scale.min=0.9",
    )  # fmt: skip
    gamma = last(tmp_path)["state_dict"]["head.scale.log_scale"].exp().item()
    assert gamma == pytest.approx(1.2) or gamma == pytest.approx(0.9)


def test_the_average_and_the_blocks_it_is_measured_on_are_kept(folder, trained):
    algorithm, _, _ = trained
    content = last(folder / "nce")
    shapes = [p.shape for p in algorithm.head.parameters()]
    assert [s.shape for s in content["ema"]["shadow_params"]] == shapes
    _, data, _ = build(folder, "nce", start(folder))
    wanted = list(data.drawn_loader("validation", 4, (algorithm.seed, 0x13)))
    assert len(content["eval_batches"]) == len(wanted) > 0
    for kept, batch in zip(content["eval_batches"], wanted, strict=True):
        assert set(kept) == {"input_ids", "segment", "response", "index"}
        assert all(torch.equal(kept[name], batch[name]) for name in kept)
    opened = Algorithm.load_from_checkpoint(folder / "nce" / "checkpoints" / "last.ckpt")
    assert isinstance(opened, CandidateScorer) and isinstance(opened.head, ScoreHead)
    assert len(opened.eval_batches) == len(wanted)
    assert opened.config["nce"]["trained_with"]["name"] == "beam_bayes"


def test_a_run_that_goes_on_keeps_the_blocks_it_began_with(folder, tmp_path):
    chosen = ("nce", start(folder), "loader.eval_batch_size=2")
    fit(folder, tmp_path, *chosen, "trainer.max_steps=1", "nce.eval_batches=1")
    before = last(tmp_path)["eval_batches"]
    fit(folder, tmp_path, *chosen, "trainer.max_steps=2", "nce.eval_batches=2")
    after = last(tmp_path)["eval_batches"]
    assert len(before) == len(after) == 1 and torch.equal(*(b[0]["index"] for b in (before, after)))


def test_a_checkpoint_opens_with_nothing_else(folder, trained, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("the target was asked for")

    for name in ("runtime.shared_target.open_target", "pretrained.take_target"):
        monkeypatch.setattr(name, fail)
    path = folder / "nce" / "checkpoints" / "last.ckpt"
    assert Algorithm.load_from_checkpoint(path).best_of.count == 4


WRONG = [
    (("nce/loss=ranking_corrected",), "nce/loss=ranking_corrected with bon/proposal=beam_bayes"),
    (("nce/loss=binary",), "nce/loss=binary with bon/proposal=beam_bayes: a deterministic beam"),
    (("nce/loss=ranking_corrected", *SAMPLES), "bon.form=additive with bon.alpha=0.1: nce/loss="),
    ((*SAMPLES, "bon.form=scorer_only"), "bon.form=scorer_only"),
    (
        (*KINDS["corrected"], "bon.score_agg=select_each"),
        "bon.score_agg=select_each: every pass has a q of its own",
    ),
    (
        (*KINDS["corrected"], "refine/commit=threshold"),
        "refine.commit=Threshold: places committed before the last pass have one token",
    ),
    ((*KINDS["binary"], "bon.rounds=2"), "bon.rounds=2: from the second round on candidates are"),
    ((*SAMPLES, "bon.proposal.include_greedy=false"), "bon.proposal.include_greedy=false: "),
    (("bon.form=convex", "bon.alpha=2"), "bon.alpha=2: allowed 0 <= alpha <= 1"),
    (("bon.score_agg=select_each", "bon.rounds=2"), "bon.rounds=2: allowed with bon.score_agg="),
    (("scorer.scale.init=200",), "scorer.scale.init=200: allowed"),
    (("nce.positive=worst",), "nce.positive=worst: wrong value"),
]


@pytest.mark.parametrize(("overrides", "message"), WRONG, ids=[m for _, m in WRONG])
def test_contradictions_end_in_one_line(folder, tmp_path, capfd, overrides, message):
    capfd.readouterr()
    chosen = ("algo=nce", *tiny_blocks(folder), *overrides, f"paths.run_dir={tmp_path}")
    assert call_main(chosen) == 2
    [line] = capfd.readouterr().err.strip().splitlines()
    assert message in line


def test_other_candidates_than_those_of_training_are_refused(folder, trained):
    path = folder / "nce" / "checkpoints" / "last.ckpt"
    config = trained[0].config
    other = configure(folder, folder / "unused", "nce", *SAMPLES)
    changed = config | {"bon": to_plain(other)["bon"]}
    with pytest.raises(CheckpointError, match=r"bon/proposal=softmax_sampling: the scorer was tr"):
        Algorithm.load_from_checkpoint(path, config=changed)
    # Nor does a configuration that was composed anew forget what the scorer was trained with.
    with pytest.raises(CheckpointError, match=r"the scorer was trained on beam_bayes"):
        Algorithm.load_from_checkpoint(path, config=other)
    greedy = changed | {"bon": changed["bon"] | {"alpha": 0.0}}
    assert Algorithm.load_from_checkpoint(path, config=greedy).best_of.alpha == 0.0
