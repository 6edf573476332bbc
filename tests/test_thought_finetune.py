"""ThoughtFinetune: weights by kind of token, validation by format and kind, what training cost."""

import json

import pytest
import torch
import torch.nn.functional as F

from callbacks.metrics_csv import read_metrics
from evaluation.kind_likelihood import PARTS
from runtime.errors import ConfigError
from runtime.validation import validate
from tests.block_runs import build, configure, fit, interrupt
from tests.support import compose_config
from tests.test_two_ranks import DDP, launch
from tests.thoughts import rows, thoughts

ROWS = ("tt<hhh>ttt<h>tt", "t<hh>tttttttttttttttttt", "tttttt")
PLAIN = {name: column for name, column in rows("ttttt", "tttttttt").items() if name != "kind"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("thoughts")


@pytest.fixture(scope="module")
def built(folder):
    return build(folder, "sft_thoughts", data=thoughts)[0]


def weighted(built, **weights):
    """The algorithm with other weights."""
    built.zero_grad()
    built.config["algo"]["weights"] = {"text": 1.0, "thought": 1.0, "delimiter": 1.0} | weights
    built._weight_K.copy_(torch.tensor(list(built.config["algo"]["weights"].values())))
    return built


def own_nll(algorithm, tokens):
    """transformers' cross-entropy of every token but the first of a document alone."""
    logits_LV = algorithm.backbone.model(input_ids=tokens[None]).logits[0, :-1]
    logits_LV = logits_LV.index_fill(-1, torch.tensor(algorithm.special.mask), -torch.inf)
    return F.cross_entropy(logits_LV, tokens[1:], reduction="none")


def of_rows(algorithm, batch):
    """Cross-entropies and kinds of the predicted tokens of every row."""
    for row in range(len(batch["index"])):
        real = batch["segment"][row] >= 0
        yield own_nll(algorithm, batch["input_ids"][row, real]), batch["kind"][row, real][1:]


def test_tokens_weigh_what_their_kind_does(built):
    batch, weight_K = rows(*ROWS), torch.tensor([1.0, 0.25, 2.0])
    terms = weighted(built, thought=0.25, delimiter=2.0).loss_terms(batch)
    parts = list(of_rows(built, batch))
    total = sum((weight_K[kind] * nll).sum() for nll, kind in parts)
    torch.testing.assert_close(terms.loss, total, rtol=1e-5, atol=0)
    # 15 + 23 + 6 tokens, of which three have nothing before them; 4 + 2 of thoughts, 4 + 2 around.
    assert terms.weight == (41 - 12) * 1.0 + 6 * 0.25 + 6 * 2.0
    each = torch.stack([(weight_K[kind] * nll).sum() for nll, kind in parts])
    torch.testing.assert_close(terms.row_losses.float(), each, rtol=1e-5, atol=0)


def gradient_of(algorithm, loss):
    algorithm.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in algorithm.parameters() if p.requires_grad]


def test_without_weight_nothing_is_learned_of_predicting_thoughts(built):
    batch = rows(*ROWS)
    terms = weighted(built, thought=0.0, delimiter=0.0).loss_terms(batch)
    assert terms.weight == 29
    found = gradient_of(built, terms.loss)
    # Thoughts are read, but the loss is that of the text alone.
    wanted = gradient_of(built, sum(nll[kind == 0].sum() for nll, kind in of_rows(built, batch)))
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    only = rows("t<hhhhh")
    only["response"][0, 1] = 0
    loss = weighted(built, thought=0.0, delimiter=0.0).loss_terms(only).loss
    assert all(not part.any() for part in gradient_of(built, loss))


def test_rows_without_kinds_are_text(built):
    terms = weighted(built, thought=0.5, delimiter=7.0).loss_terms(PLAIN)
    assert terms.weight == 4 + 7
    for nothing in ({"text": 0.0, "thought": 1.0}, {"text": 0.0}):
        with pytest.raises(ConfigError, match=r"algo\.weights\.text=0: data=text has no thoughts"):
            weighted(built, **nothing).on_before_batch_transfer(dict(PLAIN), 0)


def parts_of(built, batch):
    """Nats and tokens of every part of every row, as validation keeps them."""
    built._tables = []
    with torch.no_grad():
        likelihood = weighted(built, thought=0.0).evaluate(batch, 0)
    table = built._tables[0]
    count = len(PARTS)
    nll, tokens = table[:, 1 : 1 + count], table[:, 1 + count :]
    torch.testing.assert_close(likelihood.nll, nll[:, 0])
    return {name: (nll[:, at], tokens[:, at]) for at, name in enumerate(PARTS)}


def test_validation_by_kind_is_unweighted(built):
    batch = rows(*ROWS)
    found, own = parts_of(built, batch), list(of_rows(built, batch))
    masks = {
        "selected": lambda kind: kind >= 0, "text": lambda kind: kind == 0,
        "thought": lambda kind: kind == 1, "delimiter": lambda kind: kind == 2,
    }  # fmt: skip
    for name, mask in masks.items():
        wanted = torch.stack([nll[mask(kind)].sum() for nll, kind in own])
        torch.testing.assert_close(found[name][0].float(), wanted, rtol=1e-4, atol=1e-4)
        assert found[name][1].tolist() == [int(mask(kind).sum()) for _, kind in own]
    # Of the 18 tokens behind the thought of the second row the first 16.
    assert found["after_thought"][1].tolist() == [3 + 2, 16, 0]
    (nll, _), second = own[1], found["after_thought"][0][1]
    torch.testing.assert_close(second.float(), nll[4:20].sum(), rtol=1e-5, atol=0)


def test_raw_is_the_text_alone(built):
    batch = rows(*ROWS)
    nll, tokens = parts_of(built, batch)["raw"]
    texts = [batch["input_ids"][row][batch["kind"][row] == 0] for row in range(3)]
    assert tokens.tolist() == [len(text) - 1 for text in texts] == [6, 18, 5]
    wanted = torch.stack([own_nll(built, text).sum() for text in texts])
    torch.testing.assert_close(nll.float(), wanted, rtol=1e-5, atol=0)


def test_of_rows_without_thoughts_both_losses_are_the_same(built):
    found = parts_of(built, PLAIN)
    assert torch.equal(torch.stack(found["raw"]), torch.stack(found["selected"]))
    # The same rows whose kinds say so, beside a row with thoughts.
    both = parts_of(built, rows("ttttt", "t<h>tttttt"))
    torch.testing.assert_close(both["raw"][0][0], both["selected"][0][0])
    assert both["raw"][0][1] != both["selected"][0][1]


def test_weights_are_checked(folder, tmp_path):
    zero = "algo.weights={text: 0, thought: 0, delimiter: 0}"
    with pytest.raises(ConfigError, match=r"algo\.weights=.*nothing would be learned"):
        build(folder, "sft_thoughts", zero, data=thoughts)
    cfg = configure(folder, tmp_path, "sft_thoughts", "algo.weights.thought=-1", data=thoughts)
    with pytest.raises(ConfigError, match=r"algo\.weights\.thought=-1: wrong value; allowed: a nu"):
        validate(cfg)
    other = "+algo.weights.foo=2"
    with pytest.raises(ConfigError, match=r"weights\.foo=2: .*allowed: text, thought, delimiter"):
        build(folder, "sft_thoughts", other, data=thoughts)
    cfg = configure(folder, tmp_path, "sft_thoughts", other, data=thoughts)
    with pytest.raises(ConfigError, match=r"algo\.weights=\{.*'foo': 2\}: wrong value; allowed"):
        validate(cfg)


def test_prefixes_have_no_thoughts_to_learn():
    base = ("model=tiny_thinker", "data=thoughts", "data.files=rows.jsonl", "trainer=cpu")
    cut = (*base, "data.form=prefixes")
    with pytest.raises(ConfigError, match=r"data\.form=prefixes: .*allowed: interleaved, raw .*or"):
        validate(compose_config("algo=sft_thoughts", *cut))
    # The raw arm is asked for; others learn from prefixes, and such a model writes on from them.
    validate(compose_config("algo=sft_thoughts", *base, "data.form=raw"))
    validate(compose_config("algo=sft_raw", *cut))
    validate(compose_config("algo=sft_thoughts", "mode=reward_gate", *cut))


def cost(run_dir):
    return json.loads((run_dir / "throughput.json").read_text())


# Two micro-batches per step on one rank, one on each of two.
SHORT = ("trainer.max_steps=4", "trainer.val_check_interval=2")


def on_two_ranks(rank, folder):
    fit(folder, folder / "two", "sft_thoughts", *DDP, *SHORT, data=thoughts)


def test_resumed_and_on_two_ranks_it_is_the_same_run(folder):
    metrics = fit(folder, folder / "one", "sft_thoughts", *SHORT, data=thoughts)
    assert metrics["val/loss_selected"] == metrics["val/nll"] != metrics["val/loss_raw"]
    interrupt(folder, folder / "again", "sft_thoughts", 3, *SHORT, data=thoughts)
    fit(folder, folder / "again", "sft_thoughts", *SHORT, data=thoughts)
    table = (folder / "one" / "metrics.csv").read_text()
    assert (folder / "again" / "metrics.csv").read_text() == table
    launch(on_two_ranks, folder)
    tables = [read_metrics(folder / name / "metrics.csv") for name in ("one", "two")]
    for mine, theirs in zip(*tables, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)
    _, data, _ = build(folder, "sft_thoughts", data=thoughts)
    seen = sum(int(b["token_mask"].sum()) for b in data.train_loader(max_steps=4, accumulate=2))
    for name in ("one", "again", "two"):
        found = cost(folder / name)
        assert found["tokens_seen"] == seen > 500
        assert found["tok_per_sec"] == pytest.approx(seen / found["wall_s"])
        assert found["available_mem_gib_min"] > 0.01 and found["available_mem_of"] == "host"


def test_the_arm_of_raw_text_has_one_loss(folder, tmp_path):
    def plain(folder):
        return thoughts(folder, marked=False)

    metrics = fit(folder, tmp_path, "sft_thoughts", *SHORT, data=plain)
    for ending in ("", "_batch_mean"):
        assert metrics[f"val/loss_raw{ending}"] == metrics[f"val/loss_selected{ending}"]
    assert metrics["val/nll_text"] == metrics["val/nll"] and "val/nll_thought" not in metrics
