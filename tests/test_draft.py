"""DFlashDraft: its loss against a slow one, its blocks, its runs, its checkpoints."""

import copy
import dataclasses
import os
import signal

import pytest
import torch
from omegaconf import OmegaConf

import draft
from callbacks.metrics_csv import read_metrics
from data.errors import DataError
from data.feature_cache import check_identity, read_manifest
from dataloader import LanguageData
from draft import DFlashDraft, committed_tokens
from modes import cache_features, export_draft, train
from objectives.acceptance import expected_accepted_length
from objectives.draft_losses import cross_entropy, forward_kl, kd_loss
from opening import build_algorithm
from runtime.dflash.folder import load_draft, write_draft
from runtime.errors import CheckpointError, ConfigError, Interrupted
from runtime.shared_target import open_target
from runtime.validation import validate
from tests.draft_runs import DRAFT, SURVIVAL, configure, fit, tiny_draft
from tests.runs import STATE, last
from tests.support import compose_config, equal

EXACT = (*STATE, "weight_share")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("draft")


def build(folder, *overrides):
    cfg = configure(folder, folder / "unused", *overrides)
    data = LanguageData(cfg)
    algorithm = build_algorithm(cfg, data)
    batch = next(iter(data.train_loader(max_steps=1, accumulate=2)))
    return algorithm, data, batch


def state(run_dir):
    content = last(run_dir)
    return {key: content[key] for key in EXACT if key in content}


def full_logits(algorithm, batch, inputs):
    """The draft's and the target's logits of every slot, the straightforward way."""
    target = algorithm.target
    with torch.no_grad():
        hidden = target.model(
            batch["input_ids"], position_ids=inputs["places"], output_hidden_states=True
        )
    taps = torch.cat([hidden.hidden_states[i + 1] for i in (0, 1)], dim=-1)
    drafted = algorithm.propose(batch["input_ids"], batch["segment"], inputs, taps)
    place = inputs["asked"][inputs["teacher"]]
    teacher = hidden.logits.flatten(0, 1)[place]
    return drafted @ target.head_VD.T, teacher


def slow_kd(student, teacher, labels, valid):
    return kd_loss(student, teacher, labels, valid, gamma=7.0)


def slow_eal(student, teacher, labels, valid):
    """Both sums over the number of slots, which is blocks x K where no block is cut short."""
    length = expected_accepted_length((-cross_entropy(student, labels)).exp(), valid)
    return ((forward_kl(teacher, student) * valid).sum() - length.sum()) / valid.sum()


@pytest.mark.parametrize(("objective", "slow"), [("kd", slow_kd), ("eal", slow_eal)])
def test_the_loss_of_a_step_is_that_of_whole_logits(folder, objective, slow):
    algorithm, _, batch = build(folder, f"objective={objective}")
    inputs = algorithm.draw_blocks(batch, batch["position"], (1, 2, 3))
    terms = algorithm.loss_terms({**batch, "inputs": inputs})
    student, teacher = full_logits(algorithm, batch, inputs)
    expected = slow(student, teacher, inputs["labels"], inputs["valid"])
    assert (terms.loss / terms.weight).item() == pytest.approx(expected.item(), rel=2e-4)
    assert terms.row_losses.sum().item() == pytest.approx(terms.loss.item(), rel=1e-4)


def test_blocks_ask_the_target_where_it_predicts_their_labels(folder):
    algorithm, _, batch = build(folder)
    inputs = algorithm.draw_blocks(batch, batch["position"], (1, 2, 3))
    ids, response = batch["input_ids"].flatten(), batch["response"].flatten()
    place = inputs["asked"][inputs["teacher"]]
    valid = inputs["valid"]
    assert valid.any() and not valid.all()
    assert torch.equal(ids[place + 1][valid], inputs["labels"][valid])
    assert (response[place + 1][valid] == 1).all()
    assert torch.equal(place[:, 0] // 64, inputs["row"])
    assert inputs["slots"] == valid.sum()


def test_anchors_change_with_the_step_and_not_with_the_cut(folder):
    algorithm, _, batch = build(folder)
    whole = algorithm.draw_blocks(batch, batch["position"], (1, 2, 3))
    other = algorithm.draw_blocks(batch, batch["position"], (1, 2, 4))
    assert not torch.equal(whole["labels"], other["labels"])
    part = {name: value[2:] for name, value in batch.items()}
    cut = algorithm.draw_blocks(part, part["position"], (1, 2, 3))
    mine = whole["row"] >= 2
    assert torch.equal(cut["labels"], whole["labels"][mine])


def test_the_target_is_no_part_of_the_draft(folder):
    algorithm, _, _ = build(folder)
    target = {id(p) for p in algorithm.target.model.parameters()}
    assert not target & {id(p) for p in algorithm.parameters()}
    assert all(name.startswith("network.") for name in algorithm.state_dict())
    assert not any(p.requires_grad for p in algorithm.target.model.parameters())


def test_committed_tokens_end_at_the_first_miss_and_with_the_answer():
    hits = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    valid = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]])
    assert committed_tokens(hits.bool(), valid.bool()).tolist() == [3.0, 1.0, 5.0, 2.0, 0.0]


def test_it_learns(folder, tmp_path):
    longer = ("trainer.max_steps=40", "trainer.val_check_interval=40", "training.ema=0")
    metrics = fit(folder, tmp_path, *longer, "algo.anchors=12")
    rows = read_metrics(tmp_path / "metrics.csv")
    first, final = (next(r for r in part if "train/kl" in r) for part in (rows, rows[::-1]))
    assert final["train/kl"] < 0.5 * first["train/kl"]
    assert 1.0 <= metrics["val/tau"] <= 4.0
    assert "unigram_ppl" not in metrics


# A weight that is no power of two shows whether the lagged share comes back as it was.
RESUMED = {
    "kd": ("objective=kd",),
    "survival_eal": ("objective=survival_eal", "objective.kl_weight=0.3"),
    "overlap": ("objective=overlap",),
}


@pytest.mark.parametrize("objective", RESUMED)
def test_a_resumed_run_is_the_unbroken_one(folder, tmp_path, objective, monkeypatch):
    chosen = RESUMED[objective]
    fit(folder, tmp_path / "straight", *chosen)
    original, calls = DFlashDraft.loss_terms, []

    def stopping(self, batch):
        calls.append(1)
        if len(calls) == 9:  # in the middle of step 5
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(DFlashDraft, "loss_terms", stopping)
        with pytest.raises(Interrupted):
            fit(folder, tmp_path / "resumed", *chosen)
    fit(folder, tmp_path / "resumed", *chosen)
    assert equal(state(tmp_path / "resumed"), state(tmp_path / "straight"))
    tables = [read_metrics(tmp_path / name / "metrics.csv") for name in ("straight", "resumed")]
    assert [repr(row) for row in tables[0]] == [repr(row) for row in tables[1]]
    if objective == "survival_eal":
        assert 0 < last(tmp_path / "resumed")["weight_share"] < 1


@pytest.mark.parametrize("objective", ["kd", "survival_eal"])
def test_micro_batches_do_not_change_a_run(folder, tmp_path, objective):
    for size in (2, 8):
        fit(folder, tmp_path / str(size), f"objective={objective}", f"loader.batch_size={size}")
    one, other = (last(tmp_path / str(size))["state_dict"] for size in (2, 8))
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("objective", ["kd", "survival_eal", "ce"])
def test_training_from_a_cache_is_training_online(folder, tmp_path, objective):
    cached = (f"algo.feature_cache={tmp_path}/features", "mode.dtype=float32")
    cfg = configure(folder, tmp_path / "write", "mode=cache_features", *cached)
    metrics = cache_features.run(cfg)
    assert metrics["train/rows_written"] == metrics["train/rows"] > 0
    runs = {"online": "algo.feature_cache=null", "cached": cached[0]}
    for name, where in runs.items():
        fit(folder, tmp_path / name, f"objective={objective}", where)
    tables = [read_metrics(tmp_path / name / "metrics.csv") for name in runs]
    for online, from_cache in zip(*tables, strict=True):
        assert online.keys() == from_cache.keys()
        for key, value in online.items():
            assert from_cache[key] == pytest.approx(value, rel=1e-4, abs=1e-5, nan_ok=True), key
    online, from_cache = (last(tmp_path / name)["state_dict"] for name in runs)
    for name, value in online.items():
        torch.testing.assert_close(from_cache[name], value, rtol=1e-4, atol=1e-5)
    # A second call finds everything there.
    assert cache_features.run(cfg)["train/rows_written"] == 0


def test_a_cache_of_something_else_is_refused(folder, tmp_path):
    cached = f"algo.feature_cache={tmp_path}/features"
    with pytest.raises(DataError, match=r"no features of validation|no features of train"):
        fit(folder, tmp_path / "a", cached)
    cache_features.run(configure(folder, tmp_path / "write", "mode=cache_features", cached))
    with pytest.raises(DataError, match=r"its layers is \[0, 1\], this run has \[0\]"):
        fit(folder, tmp_path / "b", cached, "algo.draft.target_layer_ids=[0]")
    with pytest.raises(DataError, match=r"its target is .*, this run has"):
        fit(folder, tmp_path / "c", cached, "model.seed=1")
    # The weights of a folder have one fingerprint in whatever numbers they are held.
    with pytest.raises(DataError, match="its dtype is float32, this run has bfloat16"):
        check_identity(read_manifest(tmp_path / "features", "train"), {"dtype": "bfloat16"}, folder)
    with pytest.raises(ConfigError, match=r"neither whole distributions"):
        fit(folder, tmp_path / "d", cached, "objective=overlap")
    with pytest.raises(ConfigError, match=r"rows of a stream"):
        fit(folder, tmp_path / "e", cached, "data.streaming=true")


def test_a_broken_off_cache_goes_on(folder, tmp_path, monkeypatch):
    from data.feature_cache import FeatureWriter

    cached = (f"algo.feature_cache={tmp_path}/features", "mode.batch_size=4")
    cfg = configure(folder, tmp_path / "write", "mode=cache_features", *cached)
    monkeypatch.setattr(cache_features, "_BATCHES_PER_FLUSH", 2)
    original, calls = FeatureWriter.write, []

    def failing(self, *values):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        original(self, *values)

    with monkeypatch.context() as patch:
        patch.setattr(FeatureWriter, "write", failing)
        with pytest.raises(KeyboardInterrupt):
            cache_features.run(cfg)
    with pytest.raises(DataError, match=r"has 8 of \d+ rows; run mode=cache_features again"):
        fit(folder, tmp_path / "run", cached[0])
    metrics = cache_features.run(cfg)
    assert metrics["train/rows_written"] == metrics["train/rows"] - 8
    whole = configure(
        folder, tmp_path / "w2", "mode=cache_features", f"algo.feature_cache={tmp_path}/whole",
        cached[1],
    )  # fmt: skip
    cache_features.run(whole)
    for name in ("train.taps.bin", "train.expected.bin", "validation.entropy.bin"):
        one, other = ((tmp_path / place / name).read_bytes() for place in ("features", "whole"))
        assert one == other and any(one)


def test_warm_starts_take_the_weights_and_nothing_else(folder, tmp_path):
    fit(folder, tmp_path / "m1")
    start = f"training.from_pretrained={tmp_path}/m1/checkpoints/last.ckpt"
    algorithm, _, _ = build(folder, start, *SURVIVAL)
    before = last(tmp_path / "m1")["state_dict"]
    assert all(torch.equal(value, before[name]) for name, value in algorithm.state_dict().items())
    assert algorithm.weight_share == 1.0
    metrics = fit(folder, tmp_path / "m1_5", start, *SURVIVAL)
    assert metrics["steps"] == 8


def test_what_is_exported_is_what_was_trained(folder, tmp_path):
    fit(folder, tmp_path / "run", "training.ema=0")
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    cfg = compose_config(
        "mode=export_draft", f"eval.checkpoint_path={checkpoint}", "mode.dtype=float32",
        f"mode.folder={tmp_path}/z", run_dir=tmp_path / "export",
    )  # fmt: skip
    assert export_draft.run(cfg)["steps"] == 8
    exported = load_draft(tmp_path / "z").state_dict()
    weights = last(tmp_path / "run")["state_dict"]
    assert {f"network.{name}" for name in exported} == set(weights)
    assert all(torch.equal(value, weights[f"network.{name}"]) for name, value in exported.items())
    card = (tmp_path / "z" / "README.md").read_text()
    assert 'num_speculative_tokens": 3' in card and "| target | tiny_causal (" in card
    assert "not measured" not in card
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "README.md").write_text("mine")
    cfg.mode.folder = f"{tmp_path}/notes"
    with pytest.raises(CheckpointError, match=r"notes: holds something else \(README\.md\)"):
        export_draft.run(cfg)
    assert (tmp_path / "notes" / "README.md").read_text() == "mine"


def test_a_published_folder_is_a_warm_start(folder, tmp_path):
    first, _, _ = build(folder, "seed=5")
    write_draft(tmp_path / "z", first.network.config, first.network.state_dict(), "float32")
    second, _, _ = build(folder, f"training.from_pretrained={tmp_path}/z")
    assert equal(dict(second.state_dict()), dict(first.state_dict()))
    with pytest.raises(CheckpointError, match=r"target_layer_ids=\[0, 1\], this run has \[0\]"):
        build(folder, f"training.from_pretrained={tmp_path}/z", "algo.draft.target_layer_ids=[0]")


def test_a_checkpoint_opens_without_its_target(folder, tmp_path, monkeypatch):
    fit(folder, tmp_path, "training.ema=0")

    def refuse(model):
        raise AssertionError("the target was loaded")

    monkeypatch.setattr(draft, "open_target", refuse)
    opened = DFlashDraft.load_from_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    weights = last(tmp_path)["state_dict"]
    assert all(torch.equal(value, weights[name]) for name, value in opened.state_dict().items())
    assert opened.network.config.block_size == 4
    assert last(tmp_path)["target"]["name"] == "tiny_causal"


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_target_in_half_precision(folder, tmp_path, precision, monkeypatch):
    """Training and the validation in fp32, as with targets of the hub."""
    monkeypatch.setattr(draft, "open_target", half_precision)
    metrics = fit(folder, tmp_path, f"trainer.precision={precision}")
    assert metrics["steps"] == 8 and metrics["val/tau"] >= 1.0
    weights = last(tmp_path)["state_dict"]
    assert all(value.dtype == torch.float32 for value in weights.values())


def half_precision(model):
    target = open_target(model)
    return dataclasses.replace(target, model=copy.deepcopy(target.model).bfloat16())


def test_a_run_goes_on_with_its_own_objective_and_target(folder, tmp_path):
    fit(folder, tmp_path, "trainer.max_steps=4")
    with pytest.raises(CheckpointError, match=r"objective\.\w+=.*trained with"):
        fit(folder, tmp_path, "objective=eal")
    with pytest.raises(CheckpointError, match=r"cannot resume: its target is tiny_causal"):
        fit(folder, tmp_path, "model.seed=1")
    assert fit(folder, tmp_path, "algo.attn_backend=sdpa")["steps"] == 8


def test_a_warm_start_on_other_layers_is_refused(folder, tmp_path):
    fit(folder, tmp_path, "trainer.max_steps=4")
    start = f"training.from_pretrained={tmp_path}/checkpoints/last.ckpt"
    with pytest.raises(CheckpointError, match=r"target_layer_ids=\[0, 1\], this run has \[1, 2\]"):
        build(folder, start, "algo.draft.target_layer_ids=[1,2]")
    smaller, _, _ = build(folder, start, "block_size=3")
    assert smaller.network.config.block_size == 3


def test_best_is_the_largest_tau(folder, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step4.ckpt").write_text("of an earlier run")
    metrics = fit(
        folder, tmp_path, "trainer.val_check_interval=1", "checkpointing.keep_every_n_steps=4"
    )
    rows = [row for row in read_metrics(tmp_path / "metrics.csv") if "val/tau" in row]
    best = torch.load(tmp_path / "checkpoints" / "best.ckpt", weights_only=True)
    found = next(row["val/tau"] for row in rows if row["step"] == best["global_step"])
    assert found == max(row["val/tau"] for row in rows)
    assert metrics["best/val/tau"] == found
    kept = sorted(path.name for path in (tmp_path / "checkpoints").glob("step*.ckpt"))
    assert kept == ["step4.ckpt", "step8.ckpt"]
    step4 = torch.load(tmp_path / "checkpoints" / "step4.ckpt", weights_only=True)
    assert step4["global_step"] == 4


def test_a_run_stopped_at_a_step_that_stays_keeps_it_when_it_goes_on(folder, tmp_path):
    fit(folder, tmp_path, "trainer.max_steps=4", "checkpointing.keep_every_n_steps=null")
    fit(folder, tmp_path, "checkpointing.keep_every_n_steps=4")
    kept = sorted(path.name for path in (tmp_path / "checkpoints").glob("step*.ckpt"))
    assert kept == ["step4.ckpt", "step8.ckpt"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("algo=dflash", "model=nano"),
            r"model=nano: .*algo=dflash needs another kind.*model=tiny_causal",
        ),
        (("model=tiny_causal",), r"model=tiny_causal: .*algo=mdlm needs another kind.*model=nano"),
        ((*DRAFT, "algo.anchors=0"), r"algo\.anchors=0: wrong value; allowed: an integer >= 1"),
        ((*DRAFT, "algo.draft.num_hidden_layers=none"), r"num_hidden_layers=none: wrong value"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_built(overrides, message):
    with pytest.raises(ConfigError, match=message):
        validate(compose_config(*overrides))


def test_data_without_answers_is_refused(folder, tmp_path):
    chosen = [text for text in tiny_draft(folder) if not text.startswith("data.")]
    cfg = compose_config(
        *chosen, "data=pydocs", "data.tokenizer_name_or_path=target", run_dir=tmp_path
    )
    with pytest.raises(DataError, match=r"data=pydocs: rows without answers.*data=chat"):
        train.run(cfg)


def test_one_conversation_to_a_row_is_a_batch_of_conversations(folder):
    _, data, batch = build(folder, "data.documents_per_row=1", "model.length=256")
    assert (batch["segment"].max(-1).values == 0).all()
    _, packed, _ = build(folder, "model.length=256")
    assert len(packed.rows("train")) < len(data.rows("train"))
    assert OmegaConf.select(data.config, "data.documents_per_row") == 1
