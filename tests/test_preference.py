"""algo=online_dpo and algo=rf_nll step by step, against slow computations with the libraries' own
log-softmax.

Legend: N candidates, T tokens of one, V vocabulary.
"""

import copy
import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from callbacks.metrics_csv import read_metrics
from dataloader import LanguageData
from models.reference import ReferenceWeights
from modes import train
from opening import build_algorithm
from preference import BestContinuation, OnlinePreference
from rewards.continuation import Preference
from rewards.tournament import Tournament
from runtime.errors import ConfigError, Interrupted
from tests.online_runs import UNLIKE, signalled, state, sums
from tests.runs import last
from tests.support import compose_config, equal

BETA = 0.1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("preference")


JUDGE = ("judge=verifiable",)


def overrides(folder, name, judge=JUDGE):
    """A run of six steps with four rollouts of each of four prefixes."""
    return (
        f"algo={name}", "model=tiny_causal", "model.hidden_size=32", "model.num_hidden_layers=2",
        "model.num_attention_heads=2", "model.num_key_value_heads=1", "model.length=64",
        "data=prefix_suffix", f"data.files={sums(folder)}", "data.valid_fraction=0.2",
        "data.chunking.mode=marker", "data.chunking.marker=Answer:",
        "data.chunking.suffix_len=12", *judge, "algo.suffix_tokens=4",
        "algo.samples=4", "algo.attn_backend=math", "loader.global_batch_size=4",
        "training.ema=0", "optim.lr=1e-2", "lr_scheduler=constant_warmup",
        "lr_scheduler.warmup_steps=0", "trainer=cpu", "trainer.max_steps=6",
        "trainer.val_check_interval=6", "trainer.log_every_n_steps=1",
        "trainer.enable_progress_bar=false", "+trainer.enable_model_summary=false",
        f"paths.cache_dir={folder}/cache",
    )  # fmt: skip


def configure(folder, run_dir, *more, name="online_dpo", judge=JUDGE):
    return compose_config(*overrides(folder, name, judge), *more, run_dir=run_dir)


def fit(folder, run_dir, *more, name="online_dpo", judge=JUDGE):
    return train.run(configure(folder, run_dir, *more, name=name, judge=judge))


def value(text):
    """What the scripted judge goes by: few values, so that there are ties."""
    return sum(map(ord, text)) % 5


class ByValue:
    """Prefers the higher value; of texts with an a and a higher one it prefers what is first; of
    two odd lengths it says nothing."""

    def compare(self, pairs):
        return [Preference(self.winner(one.first, one.second)) for one in pairs]

    def winner(self, first, second):
        if len(first) == len(second) == 3:
            return None
        if value(first) + value(second) == 5:
            return "first"
        lead = value(first) - value(second)
        return "tie" if lead == 0 else "first" if lead > 0 else "second"

    def identity(self):
        return {}


def build(folder, *more, name="online_dpo", moved=True):
    """An algorithm at its first step, whose weights are no more its reference's, and a batch."""
    cfg = configure(folder, folder / "unused", "algo.samples_every=0", *more, name=name)
    torch.manual_seed(0)
    data = LanguageData(cfg)
    algorithm = build_algorithm(cfg, data)
    algorithm.trainer = SimpleNamespace(global_step=0, is_global_zero=True)
    algorithm._scorer = Tournament(ByValue(), algorithm.config["algo"]["tournament"])
    options = algorithm.config["algo"]["reference"]
    if options is not None:
        algorithm.reference = ReferenceWeights(algorithm.trained_parameters(), **options)
    before = copy.deepcopy(algorithm.backbone.model)
    if moved:
        move(algorithm)
    return algorithm, before, next(iter(data.train_loader(max_steps=1)))


def move(algorithm, size=0.05):
    """Change all weights, as a step would."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in algorithm.trained_parameters():
            weight += size * torch.randn(weight.shape, generator=draw)


def experienced(algorithm, batch):
    """Experience of a batch, and the rows of its pools."""
    kept = []
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(algorithm, "keep_samples", kept.extend)
        return algorithm.collect(batch), kept


def learned(algorithm, experience):
    """Loss, weight and gradients of an experience, as an update sums them."""
    algorithm.zero_grad()
    loss = weight = 0.0
    for part in experience.parts:
        terms = algorithm.part_terms(part)
        terms.loss.backward()
        loss, weight = loss + terms.loss.detach(), weight + float(terms.weight)
    return loss / weight, weight, [one.grad / weight for one in algorithm.trained_parameters()]


def slow_logp(algorithm, model, row, candidate):
    """log p [T] of the tokens of a candidate, of a pass over this one sequence."""
    prefix, suffix = row["prefix_ids"], candidate["ids"]
    tokens = torch.tensor(prefix + suffix)
    logits_TV = model(input_ids=tokens[None]).logits[0].float()
    logits_TV = logits_TV.masked_fill(algorithm.backbone.forbidden_V, -torch.inf)
    logp_TV = torch.nn.functional.log_softmax(logits_TV, dim=-1)
    return torch.stack([logp_TV[n - 1, tokens[n]] for n in range(len(prefix), len(tokens))])


def with_prefixes(algorithm, batch, rows):
    """Rows with the tokens before their candidates, taken from the batch itself."""
    for number, row in enumerate(rows):
        assert row["prefix_id"] == str(int(batch["index"][number]))
        given = (batch["segment"][number] == 0) & (batch["response"][number] == 0)
        row["prefix_ids"] = batch["input_ids"][number][given].tolist()
    return rows


def slow_scores(texts, matches):
    """Mean outcomes of a pool, opponent after opponent, order after order."""
    judge, outcomes = ByValue(), {n: [] for n in range(len(texts))}
    for a, b in matches:
        there, back = judge.winner(texts[a], texts[b]), judge.winner(texts[b], texts[a])
        if texts[a] == texts[b]:
            won = 0.5
        elif there is None or back is None:
            continue
        elif (there, back) in (("first", "second"), ("second", "first")):
            won = 1.0 if there == "first" else 0.0
        else:
            won = 0.5
        outcomes[a].append(won)
        outcomes[b].append(1 - won)
    return [sum(found) / len(found) if found else math.nan for found in outcomes.values()]


@pytest.mark.parametrize("tournament", ["full", "pivot"])
def test_pools_and_scores(folder, tournament):
    algorithm, _, batch = build(folder, f"algo.tournament={tournament}")
    experience, rows = experienced(algorithm, batch)
    prefixes = algorithm.prefixes(batch)
    rollouts = iter(algorithm.roll_out(prefixes))
    numbers = range(5)
    matches = list(itertools.combinations(numbers, 2))
    matches = matches if tournament == "full" else [one for one in matches if 0 in one]
    differing = invalid = 0
    for row, prefix in zip(rows, prefixes, strict=True):
        pool = row["candidates"]
        # The original as it is in the data, the rollouts as they were drawn, tokens and all.
        assert [one["source"] for one in pool] == ["original"] + ["rollout"] * 4
        drawn = [next(rollouts) for _ in range(4)]
        assert [one["ids"] for one in pool] == [
            prefix.reference_ids, *(one.suffix_ids for one in drawn)
        ]  # fmt: skip
        assert pool[0]["ids"][-1] == algorithm.special.eos
        scores = [math.nan if one["score"] is None else one["score"] for one in pool]
        wanted = slow_scores([one["text"] for one in pool], matches)
        assert scores == pytest.approx(wanted, nan_ok=True)
        valid = [one for one in scores if one == one]
        differing += max(valid) > min(valid)
        invalid += row["invalid"]
        if max(valid) > min(valid):
            ((best, worst),) = row["lessons"]
            assert scores[best] == max(valid) and scores[worst] == min(valid)
        else:
            assert row["lessons"] == []
    assert differing > 1
    assert experience.metrics["kept_prefixes"] == differing
    assert experience.metrics["judge_invalid_rate"] == invalid / (len(matches) * 4)
    assert 0 <= experience.metrics["order_flip_rate"] < 1


def test_pairs_that_are_asked_for(folder):
    algorithm, _, batch = build(folder, "algo.pairing=all_pairs")
    for row in experienced(algorithm, batch)[1]:
        scores = [one["score"] for one in row["candidates"]]
        wanted = [(a, b) for a, b in itertools.permutations(range(5), 2)
                  if None not in (scores[a], scores[b]) and scores[a] > scores[b]]  # fmt: skip
        assert sorted(map(tuple, row["lessons"])) == wanted
    algorithm.config["algo"] |= {"pairing": "top_k_bottom_k", "k": 2}
    found = [row["lessons"] for row in experienced(algorithm, batch)[1]]
    assert max(map(len, found)) == 2


def check(found, gradients, wanted, algorithm):
    """A loss and its gradients are those of a slow loss."""
    algorithm.zero_grad()
    wanted.backward()
    torch.testing.assert_close(found.double(), wanted.detach().double(), atol=2e-5, rtol=1e-5)
    scale = max(float(one.abs().max()) for one in gradients)
    assert scale > 1e-3
    for one, weight in zip(gradients, algorithm.trained_parameters(), strict=True):
        torch.testing.assert_close(one, weight.grad, atol=1e-4 * scale, rtol=1e-3)


@pytest.mark.parametrize(
    ("pairing", "rows", "parts"),
    [("best_worst", 2, None), ("best_worst", 100, 1), ("all_pairs", 3, None)],
    ids=["pair_by_pair", "at_once", "all_pairs"],
)
def test_dpo_is_a_slow_computation(folder, pairing, rows, parts):
    options = (f"algo.pairing={pairing}", f"algo.rows_per_pass={rows}")
    algorithm, before, batch = build(folder, *options)
    experience, found = experienced(algorithm, batch)
    pools = with_prefixes(algorithm, batch, found)
    pairs = [(row, *lesson) for row in pools for lesson in row["lessons"]]
    assert len(experience.parts) == (parts or len(experience.parts))
    assert all(len(part["index"]) <= rows for part in experience.parts)
    assert rows == 100 or len(experience.parts) > 1
    loss, weight, gradients = learned(algorithm, experience)
    assert weight == len(pairs) > 1
    margins, chosen, rejected = [], [], []
    for row, best, worst in pairs:
        policy, reference = (
            [slow_logp(algorithm, model, row, row["candidates"][n]).sum() for n in (best, worst)]
            for model in (algorithm.backbone.model, before)
        )
        held = [one.detach() for one in reference]
        margins.append(BETA * ((policy[0] - held[0]) - (policy[1] - held[1])))
        chosen.append(policy[0].item())
        rejected.append(policy[1].item())
    margin = torch.stack(margins)
    assert margin.abs().max() > 1e-2
    logged = {name: float(one) for name, one in algorithm._logged(experience).items()}
    assert logged["dpo_loss"] == pytest.approx(float(loss), abs=1e-6)
    assert logged["dpo_margin_avg"] == pytest.approx(margin.mean().item(), abs=1e-5)
    assert logged["chosen_beats_rejected_rate"] == pytest.approx((margin > 0).float().mean().item())
    assert logged["logp_chosen"] == pytest.approx(sum(chosen) / len(chosen), rel=1e-5)
    assert logged["logp_rejected"] == pytest.approx(sum(rejected) / len(rejected), rel=1e-5)
    check(loss, gradients, -torch.nn.functional.logsigmoid(margin).mean(), algorithm)


@pytest.mark.parametrize("rows", [1, 100])
def test_rf_nll_is_the_likelihood_of_the_best(folder, rows):
    algorithm, _, batch = build(folder, f"algo.rows_per_pass={rows}", name="rf_nll")
    assert isinstance(algorithm, BestContinuation)
    experience, found = experienced(algorithm, batch)
    loss, weight, gradients = learned(algorithm, experience)
    assert len(experience.parts) == (4 if rows == 1 else 1)
    total = []
    for row in with_prefixes(algorithm, batch, found):
        ((best,),) = row["lessons"]
        scores = [one["score"] for one in row["candidates"] if one["score"] is not None]
        assert row["candidates"][best]["score"] == max(scores)
        model = algorithm.backbone.model
        total.append(slow_logp(algorithm, model, row, row["candidates"][best]))
    logp = torch.cat(total)
    assert weight == len(logp)
    logged = algorithm._logged(experience)
    assert float(logged["logp_chosen"]) == pytest.approx(logp.sum().item() / 4, rel=1e-5)
    check(loss, gradients, -logp.mean(), algorithm)


def test_the_policy_is_its_own_reference_at_first(folder):
    algorithm, _, batch = build(folder, moved=False)
    experience, _ = experienced(algorithm, batch)
    loss, _, _ = learned(algorithm, experience)
    assert float(loss) == pytest.approx(math.log(2))
    assert experience.metrics["kl"] == pytest.approx(0, abs=1e-8)


def test_distance_to_the_reference(folder):
    """The mean k3 per token of the first two rollouts of every prefix."""
    algorithm, before, batch = build(folder, "algo.kl_samples=2", "algo.rows_per_pass=3")
    experience, found = experienced(algorithm, batch)
    expected = []
    with torch.no_grad():
        for row in with_prefixes(algorithm, batch, found):
            kl = []
            for candidate in row["candidates"][1:3]:
                policy = slow_logp(algorithm, algorithm.backbone.model, row, candidate)
                ratio = (slow_logp(algorithm, before, row, candidate) - policy).double()
                kl.append((ratio.exp() - ratio - 1).mean().item())
            expected.append(sum(kl) / 2)
            assert row["kl"] == pytest.approx(expected[-1], rel=1e-3)
    assert experience.metrics["kl"] == pytest.approx(sum(expected) / 4, rel=1e-3) and kl[0] > 0


def test_rewrites_enter_the_pool(folder):
    algorithm, _, batch = build(folder)
    prefixes = algorithm.prefixes(batch)
    asked = []

    def rewrite(sources):
        asked.extend(sources)
        return {prefixes[0].id: " new text", prefixes[2].id: "b"}

    algorithm.config["algo"]["candidates"]["rewrite"] = {"_target_": "of no importance"}
    algorithm._rewriter = SimpleNamespace(rewrite=rewrite)
    _, rows = experienced(algorithm, batch)
    made = [row["candidates"][5:] for row in rows]
    # At most as long as a rollout, which is four tokens.
    assert [[one["text"] for one in pool] for pool in made] == [[" new"], [], ["b"], []]
    assert made[0][0]["source"] == "rewrite" and made[0][0]["retokenised"]
    assert not any(one["retokenised"] for one in rows[0]["candidates"][:5])
    assert made[0][0]["ids"] == algorithm.tokenizer.encode(" new", add_special_tokens=False)
    assert asked[1][1:] == (rows[1]["prefix"], algorithm.text(prefixes[1].reference_ids))


def test_a_batch_that_teaches_nothing_has_a_gradient_of_zero(folder):
    """Other ranks wait for it, so every weight takes part."""
    for name in ("online_dpo", "rf_nll"):
        algorithm, _, batch = build(folder, name=name)
        algorithm.scorer.judge = SimpleNamespace(
            compare=lambda pairs: [Preference(None, "silent")] * len(pairs)
        )
        experience, rows = experienced(algorithm, batch)
        assert [row["lessons"] for row in rows] == [[]] * 4 and len(experience.parts) == 1
        terms = algorithm.part_terms(experience.parts[0])
        terms.loss.backward()
        assert (float(terms.loss.detach()), float(terms.weight)) == (0, 0)
        assert all(bool((one.grad == 0).all()) for one in algorithm.trained_parameters())
        assert experience.metrics["judge_invalid_rate"] == 1
        assert len(terms.row_losses) == len(experience.parts[0]["index"])


@pytest.mark.parametrize(
    ("more", "judge", "message"),
    [
        (["algo.rows_per_pass=1"], JUDGE, "algo.rows_per_pass=1: a pair is learned from in one"),
        (["algo.reference=null"], JUDGE, "algo.reference=null: algo=online_dpo compares the"),
        ([], (), "judge=null: algo=online_dpo learns from what a judge prefers"),
        (
            ["algo.samples=1", "algo.candidates.original=false"], JUDGE,
            "algo.samples=1: without the original there is nothing to compare",
        ),
        (
            ["algo.pairing=top_k_bottom_k", "algo.k=3"], JUDGE,
            r"algo.k=3: a pool has 5 candidates .*; allowed 1 \.\. 2, or more of them",
        ),
        (
            ["algo.pairing=top_k_bottom_k", "algo.k=50", "algo.candidates.original=false"], JUDGE,
            r"algo.k=50: a pool has 4 candidates .*; allowed 1 \.\. 2",
        ),
    ],
    ids=["rows", "reference", "judge", "samples", "pairs", "many_pairs"],
)  # fmt: skip
def test_what_cannot_be_is_said_before_a_network_is_built(folder, more, judge, message):
    cfg = configure(folder, folder / "unused", *more, judge=judge)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ConfigError, match=message):
        patch.setattr(OnlinePreference, "_prepare", lambda *_: pytest.fail("it was built"))
        build_algorithm(cfg, LanguageData(cfg))


def test_so_many_pairs_as_a_full_pool_has(folder):
    """Four rollouts and the original are two pairs, with a rewrite three; k is of one pairing."""
    rewrite = "+algo.candidates.rewrite={_target_:decoding.rewrite.Rewriter}"
    for more in (["algo.pairing=top_k_bottom_k", "algo.k=2"],
                 ["algo.pairing=top_k_bottom_k", "algo.k=3", f"+{rewrite}"],
                 ["algo.k=50"]):  # fmt: skip
        cfg = configure(folder, folder / "unused", *more)
        assert build_algorithm(cfg, LanguageData(cfg)).config["algo"]["k"] == cfg.algo.k


def table(run_dir):
    rows = read_metrics(run_dir / "metrics.csv")
    return [{name: one for name, one in row.items() if name not in UNLIKE} for row in rows]


TWO_STEPS = ("trainer.max_steps=2", "trainer.val_check_interval=2")
PERIODIC = ("algo.reference.kind=periodic", "algo.reference.every=2", "algo.updates=2")


def test_stopped_and_resumed_is_the_unbroken_run(folder, tmp_path):
    weights = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OnlinePreference, "on_weights_moved", lambda self: weights.append(
            [one.detach().clone() for one in self.trained_parameters()]))  # fmt: skip
        fit(folder, tmp_path / "whole", *PERIODIC)
    with signalled(4), pytest.raises(Interrupted):
        fit(folder, tmp_path / "cut", *PERIODIC)
    assert last(tmp_path / "cut")["global_step"] == 4
    fit(folder, tmp_path / "cut", *PERIODIC)
    found, wanted = state(tmp_path / "cut"), state(tmp_path / "whole")
    assert equal(found, wanted) and wanted["online"]["reference"]["steps"] == 6
    assert table(tmp_path / "cut") == table(tmp_path / "whole")
    # The reference is the policy of the last even step, which here is the last one.
    assert len(weights) == 6
    assert all(map(torch.equal, wanted["online"]["reference"]["weights"], weights[5]))


def test_references_that_follow(folder, tmp_path):
    """ema by its recurrence; frozen is the start."""
    for kind in ("ema", "frozen"):
        seen = []
        with pytest.MonkeyPatch.context() as patch:
            original = OnlinePreference.collect

            def collect(self, batch, original=original, seen=seen):
                seen.append([one.detach().clone() for one in self.trained_parameters()])
                return original(self, batch)

            patch.setattr(OnlinePreference, "collect", collect)
            fit(folder, tmp_path / kind, f"algo.reference.kind={kind}", "trainer.max_steps=3",
                "algo.reference.decay=0.5", "trainer.val_check_interval=3")  # fmt: skip
        content = last(tmp_path / kind)
        after = [*content["state_dict"].values()]
        shadow = seen[0]
        if kind == "ema":
            final = [weight for weight in after if weight.is_floating_point()][: len(shadow)]
            for live in (seen[1], seen[2], final):
                shadow = [0.5 * a + 0.5 * b for a, b in zip(shadow, live, strict=True)]
        for one, other in zip(content["online"]["reference"]["weights"], shadow, strict=True):
            torch.testing.assert_close(one, other, atol=1e-7, rtol=1e-6)


def test_a_run_without_a_verdict_leaves_the_weights(folder, tmp_path):
    """A pattern that no reference has: nothing is valid, all prefixes are skipped and counted."""
    fit(folder, tmp_path, "judge.pattern=zebra", *TWO_STEPS)
    rows = [row for row in table(tmp_path) if "train/loss" in row]
    assert [row["train/loss"] for row in rows] == [0, 0]
    assert [row["train/kept_prefixes"] for row in rows] == [0, 0]
    assert [row["train/judge_invalid_rate"] for row in rows] == [1, 1]
    content = last(tmp_path)
    weights = content["online"]["reference"]["weights"]
    named = [one for one in content["state_dict"].values()]
    assert all(any(torch.equal(one, other) for other in named) for one in weights)


def test_the_better_candidate_becomes_likely(folder, tmp_path):
    """Answers of a letter and the end, of 256 squared: 20 steps on pairs of them and others."""
    path = tmp_path / "letters.txt"
    path.write_text("".join(f"{n % 9}>x\n\n" for n in range(64)))
    more = (
        f"data.files={path}", "data.split_paragraphs=true", "data.chunking.marker='>'",
        "data.chunking.suffix_len=1", "algo.suffix_tokens=2",
        "trainer.max_steps=20", "trainer.val_check_interval=20",
    )  # fmt: skip
    found = fit(folder, tmp_path / "run", *more)
    rows = [row for row in table(tmp_path / "run") if "train/loss" in row]
    assert rows[0]["train/dpo_loss"] == pytest.approx(math.log(2))
    assert rows[0]["train/logp_chosen"] < -5 < -1 < rows[-1]["train/logp_chosen"]
    assert found["val/nll"] < 1
