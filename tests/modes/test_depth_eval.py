"""mode=depth_eval: what tokens add to the bound, by class, and the order in which they come."""

import json
import math

import pytest
import torch

from data.grammar import Grammar
from dataloader import LanguageData
from evaluation.breakdown import PADDING, ClassRatios
from evaluation.unmasking import by_words, tau_metrics
from modes import ppl_eval
from modes.depth_eval import Scores, add_batch, run, sample_orders, tree_parser
from runtime.errors import ConfigError
from runtime.run import load_summary
from tests.grammar_runs import LENGTH, save_checkpoint
from tests.runs import best, call_main, fit
from tests.small import small_batch, small_model
from tests.support import compose_config

ALGORITHMS = {"mdlm": ["algo=mdlm"], "bd3lm": ["algo=bd3lm", "block_size=4"], "ar": ["algo=ar"]}


def evaluation(tmp_path, mode, out, *overrides):
    """The configuration of an evaluation of the checkpoint in `tmp_path`."""
    return compose_config(
        f"mode={mode}", f"eval.checkpoint_path={tmp_path / 'best.ckpt'}", "trainer=cpu",
        "loader.eval_global_batch_size=7", "eval.num_draws=2", "eval.limit_rows=20",
        f"paths.cache_dir={tmp_path}", *overrides, run_dir=tmp_path / out,
    )  # fmt: skip


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def totals(lines):
    """Nats of all classes, and tokens of those that are text."""
    text = [line for line in lines if "padding" not in line.values()]
    return math.fsum(line["nats"] for line in lines), sum(line["tokens"] for line in text)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_classes_sum_to_the_bound_of_ppl_eval(tmp_path, capsys, name):
    """By depth, by position, by place in the block: the same nats and tokens, no more and less."""
    # Sentences that fit into a row have a probability, which mode=ppl_eval looks up.
    save_checkpoint(tmp_path, *ALGORITHMS[name], "data.source.max_words=14")
    found = run(evaluation(tmp_path, "depth_eval", "depth", "mode.num_samples=5"))
    bound = ppl_eval.run(evaluation(tmp_path, "ppl_eval", "ppl"))
    for key in ("nll", "nll_se", "tokens", "rows"):
        assert found[key] == pytest.approx(bound[key], rel=1e-6), key
    position = lines_of(tmp_path / "depth" / "nll_by_position.jsonl")
    parts = [[line for line in position if line["of"] == of] for of in ("row", "block")]
    assert bool(parts[1]) == (name == "bd3lm"), "other blocks are a token or the row"
    by_depth = lines_of(tmp_path / "depth" / "nll_by_depth.jsonl")
    for lines in filter(None, [by_depth, *parts]):
        nats, tokens = totals(lines)
        assert tokens == found["tokens"]
        assert nats == pytest.approx(found["nll"] * found["tokens"], rel=1e-12)
    assert found["nll/depth_0"] == next(x["nll"] for x in by_depth if x["depth"] == 0)
    assert (tmp_path / "depth" / "breakdown.png").read_bytes().startswith(b"\x89PNG")
    assert found["samples"] == 5
    assert len(lines_of(tmp_path / "depth" / "unmasking_order.jsonl")) == 5
    printed = capsys.readouterr().out
    assert "share of nats" in printed and "of 5 samples have a tree" in printed


def test_counts_are_those_of_the_trees(tmp_path):
    """As many tokens of each depth as the sentences of the split have words of it."""
    save_checkpoint(tmp_path)
    run(evaluation(tmp_path, "depth_eval", "out", "mode.num_samples=0"))
    grammar = Grammar(num_train=200)
    sentences = [document["features"]["depth"] for document in grammar.documents("validation")]
    kept = [depth for words in sentences[:20] for depth in words[: LENGTH - 2]]
    counted = {
        line["depth"]: line["tokens"] for line in lines_of(tmp_path / "out/nll_by_depth.jsonl")
    }
    for depth in range(max(kept) + 1):
        assert counted[depth] == kept.count(depth)
    assert counted["no word"] == 20, "one end of text per row"


def scores_of(model, batches, draws=1):
    scores = Scores(ClassRatios(model.length), None)
    with torch.no_grad():
        for batch in batches:
            add_batch(scores, model, batch, draws)
    return scores


def with_depth(batch, seed=0):
    generator = torch.Generator().manual_seed(seed)
    depth = torch.randint(0, 3, batch["input_ids"].shape, generator=generator)
    return {**batch, "depth": depth.masked_fill(batch["input_ids"] == 1, -1)}


@pytest.mark.parametrize("options", [["algo=ar"], ["algo=bd3lm", "block_size=1"]])
def test_a_model_that_knows_nothing_finds_every_depth_as_hard(options):
    """Uniform predictions: log(V - 1) nats (the mask is no token) at every depth and position."""
    model, batch = small_model(*options), with_depth(small_batch(20))
    for parameter in model.backbone.output_layer.parameters():
        torch.nn.init.zeros_(parameter)
    scores = scores_of(model, [batch])
    expected = math.log(model.special.vocab_size - 1)
    for ratios in (scores.nll_by_depth, scores.nll_by_position):
        for found in ratios.estimates().values():
            assert found.value == pytest.approx(expected, rel=1e-6)
            assert found.standard_error == pytest.approx(0.0, abs=1e-6)


def test_the_same_of_masked_diffusion_in_expectation():
    """Single draws scatter with m/n; the estimates agree with log(V - 1) within their errors."""
    model, batch = small_model(), with_depth(small_batch(400))
    for parameter in model.backbone.output_layer.parameters():
        torch.nn.init.zeros_(parameter)
    scores = scores_of(model, [batch], draws=4)
    expected = math.log(model.special.vocab_size - 1)
    estimates = [*scores.nll_by_depth.estimates().values(),
                 *scores.nll_by_position.estimates().values()]  # fmt: skip
    assert len(estimates) == 3 + 7
    for found in estimates:
        assert 0 < found.standard_error < 0.1 * expected
        assert abs(found.value - expected) < 4 * found.standard_error


def test_padding_has_its_own_class():
    model, batch = small_model(), with_depth(small_batch(6))
    batch["token_mask"][:, 5:] = False
    scores = scores_of(model, [batch])
    for ratios in (scores.nll_by_depth, scores.nll_by_position):
        assert ratios.estimates()[PADDING].tokens == 6 * 3
    assert set(scores.nll_by_position.estimates()) == {PADDING, 1, 2, 3, 4}


def test_weights_by_depth_are_those_of_the_training(tmp_path):
    """masking=dependency: mean 1 over the words, rising with the depth; none: all 1."""
    options = ("masking=dependency", "masking.mix_alpha=1")
    save_checkpoint(tmp_path, "algo=bd3lm", "block_size=8", *options)
    found = run(evaluation(tmp_path, "depth_eval", "out", "mode.num_samples=0"))
    lines = lines_of(tmp_path / "out" / "weight_by_depth.jsonl")
    words = [line for line in lines if isinstance(line["depth"], int)]
    assert found["weight/depth_0"] < found["weight/depth_1"] < found["weight/depth_2"]
    assert found["weight/depth_no_word"] == found["weight/depth_padding"] == 1.0
    mean = sum(w["weight"] * w["tokens"] for w in words) / sum(w["tokens"] for w in words)
    assert mean == pytest.approx(1.0, rel=1e-6)
    save_checkpoint(tmp_path, "algo=bd3lm", "block_size=8")
    plain = run(evaluation(tmp_path, "depth_eval", "plain", "mode.num_samples=0"))
    assert plain["weight/depth_0"] == plain["weight/depth_2"] == 1.0
    assert plain["nll"] == found["nll"], "the bound knows nothing of weights"


def orders(rule, parser, *options, num_samples=60):
    """tau and samples of a small random model, whose every text has the trees of `parser`."""
    cfg = compose_config(
        "trainer=cpu", "mode=depth_eval", f"mode.num_samples={num_samples}",
        "sampling.batch_size=50", *options,
        *([f"sampling.strategy={{_target_:{rule}}}"] if rule else []),
    )  # fmt: skip
    return tau_metrics(sample_orders(small_model(*options), cfg, by_words(parser)))


def chain(words):
    """Each word hangs on the one before it."""
    return range(len(words)) if len(words) > 1 else None


def reverse_chain(words):
    return None if chain(words) is None else [*chain(words)][::-1]


@pytest.mark.parametrize("options", [["algo=mdlm"], ["algo=bd3lm", "block_size=4"], ["algo=ar"]])
@pytest.mark.parametrize(("parser", "sign"), [(chain, 1), (reverse_chain, -1)])
def test_left_to_right_has_the_sign_of_the_trees(options, parser, sign):
    rule = None if options == ["algo=ar"] else "tests.plugins.toy_rule.LeftToRight"
    found = orders(rule, parser, *options)
    assert found["samples"] == 60 and found["tau_samples"] > 20
    assert found["tau"] == sign
    counted = [found[f"samples_{name}"] for name in ("used", "not_parsed", "other_tokens")]
    assert sum(counted) == 60


@pytest.mark.parametrize("options", [["algo=mdlm"], ["algo=bd3lm", "block_size=4"]])
def test_first_hitting_does_not_look_at_trees(options):
    """tau 0 within four standard errors, of hundreds of samples."""
    found = orders(None, chain, *options, num_samples=400)
    error = (found["tau_high"] - found["tau_low"]) / (2 * 1.96)
    assert found["tau_samples"] > 150 and error < 0.1
    assert abs(found["tau"]) < 4 * error


def test_the_order_does_not_depend_on_the_batch_size():
    base = ("trainer=cpu", "mode=depth_eval", "mode.num_samples=6")
    sizes = [compose_config(*base, f"sampling.batch_size={size}") for size in (6, 2)]
    whole, parts = (sample_orders(small_model(), cfg, by_words(chain)) for cfg in sizes)
    assert [sample.line() for sample in whole] == [
        {**sample.line(), "step": same.line()["step"]}
        for sample, same in zip(parts, whole, strict=True)
    ]


@pytest.fixture(scope="module")
def text_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    fit(folder, folder / "run", "trainer.max_steps=2", "trainer.val_check_interval=2")
    return folder


def test_text_without_trees_has_positions_only(text_run, tmp_path, capsys):
    """Through main.py, as a user calls it."""
    code = call_main([
        "mode=depth_eval", f"eval.checkpoint_path={best(text_run / 'run')}", "trainer=cpu",
        f"paths.cache_dir={text_run}/cache", f"paths.run_dir={tmp_path}/out",
    ])  # fmt: skip
    assert code == 0
    said = capsys.readouterr().out
    assert "no depths: this data has no dependency trees" in said
    assert "order of unmasking: no samples" in said and "position" in said
    metrics = load_summary(tmp_path / "out")["metrics"]
    assert metrics["samples"] == 0 and metrics["nll"] > 0
    assert not any(key.startswith(("nll/depth", "weight/", "rank/")) for key in metrics)
    files = {path.name for path in (tmp_path / "out").glob("*.jsonl")}
    assert files == {"nll_by_position.jsonl"}


def test_trees_through_main(tmp_path):
    save_checkpoint(tmp_path, "algo=bd3lm", "block_size=4")
    code = call_main([
        "mode=depth_eval", f"eval.checkpoint_path={tmp_path}/best.ckpt", "trainer=cpu",
        f"paths.cache_dir={tmp_path}", f"paths.run_dir={tmp_path}/out", "mode.num_samples=3",
        "eval.limit_rows=4",
    ])  # fmt: skip
    assert code == 0
    summary = load_summary(tmp_path / "out")
    assert summary["algo"] == "bd3lm" and summary["metrics"]["weight/depth_0"] == 1.0


def test_samples_longer_than_a_row_are_refused(tmp_path):
    save_checkpoint(tmp_path, "algo=bd3lm", "block_size=4")
    with pytest.raises(
        ConfigError, match=r"sampling\.length=32: .* allowed: up to model.length=16"
    ):
        run(evaluation(tmp_path, "depth_eval", "out", "sampling.length=32"))


def test_an_algorithm_without_tokens_is_refused(tmp_path, monkeypatch):
    save_checkpoint(tmp_path)
    monkeypatch.setattr("modes.depth_eval.Diffusion", type("Other", (), {}))
    with pytest.raises(ConfigError, match="algo=mdlm: mode=depth_eval has no likelihood"):
        run(evaluation(tmp_path, "depth_eval", "out"))


def test_samples_of_parsed_data_get_their_trees_from_its_parser():
    parse = "{parser:{_target_:tests.plugins.toy_parser.ToyParser},folder:x,documents_per_part:4}"
    cfg = compose_config("data=pydocs", f"+data.parse={parse}")
    parser = tree_parser(LanguageData(cfg))
    first, second = parser(["a dog", "FAIL"])
    assert first == {
        "text": "a dog", "spans": [(0, 1), (2, 5)], "features": {"depth": [0, 2], "height": [2, 2]},
    }  # fmt: skip
    assert second is None
    assert tree_parser(LanguageData(compose_config("data=pydocs"))) is None
