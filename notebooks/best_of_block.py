# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # One block, its four candidates and their scores
#
# A model of `algo=draft_refine` writes a block of tokens at once and refines it. A scorer
# (`algo=nce`) looks at a few versions of the result and may prefer another one than the model's
# own. Here is one block: its draft pass by pass, the four candidates that come of it, what each of
# them scores, and from which weight on another one wins. Then: whether that pays.
#
# Tensors carry their shape: M blocks, X blocks of a batch, C candidates, J the truth and they,
# S places of a block, K passes, A weights alpha.

# %%
import json
import os
import random
import sys
from pathlib import Path

ROOT = next(path for path in [Path.cwd(), *Path.cwd().parents] if (path / "main.py").is_file())
sys.path.insert(0, str(ROOT))

import matplotlib.pyplot as plt
import numpy as np
import torch
from hydra import compose, initialize_config_dir

from decoding.chain import predict_places
from evaluation.grouped import Groups
from evaluation.scorer import ALPHAS, picked, sweep
from evaluation.scorer_quality import calibration
from evaluation.scorer_report import show
from evaluation.scorer_run import scored_blocks
from modes import train
from objectives.contrastive import ranking
from objectives.nce_statistics import bound_floor
from objectives.refinement import allowed_log_probabilities
from scorer import CandidateScorer

JOURNEY = ROOT / "outputs/refine_journey/nce/beam_lastround/checkpoints/last.ckpt"
CHECKPOINT = Path(os.environ.get("CHECKPOINT", JOURNEY))

# %% [markdown]
# Without a checkpoint (`scripts/refine/journey.py` makes a better one) a small chain is trained in
# about a minute, each stage from the one before: a causal model, masked blocks, refined drafts, the
# scorer. Which animal its sentences name cannot be known, but the letters must fit each other.

# %%
if not CHECKPOINT.is_file():
    folder, draw, before = ROOT / "outputs/best_of_block", random.Random(0), []
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "answers.jsonl").open("w") as file:
        for number in range(1000):
            one, other = draw.sample(["cat", "rat", "dog", "hog", "hen", "fox"], 2)
            verb, last = draw.choice(["sees", "hears", "likes", "calls"]), draw.choice([one, other])
            text = f"the {one} {verb} the {other}, not the {last}"
            row = {"id": str(number), "source": "animals", "prompt": f"{number}"}
            file.write(json.dumps(row | {"response": text, "finish": "stop"}) + "\n")
    shared = [
        "model=tiny_causal", "model.hidden_size=64", "model.num_hidden_layers=2",
        "+model.init_std=0.02", "model.length=128", "data=chat", "data.thinking=true",
        f"data.files={folder}/answers.jsonl", "data.align=4", "data.valid_fraction=0.1",
        "loader.global_batch_size=8", "training.ema=0", "optim.lr=3e-3", "trainer=cpu",
        "lr_scheduler=cosine_warmup", "lr_scheduler.warmup_steps=10",
        "trainer.enable_progress_bar=false", "+trainer.enable_model_summary=false",
        "checkpointing.resume_from_ckpt=false",
    ]  # fmt: skip
    stages = {
        "ar": (100, "algo=sft_raw", "data.align=null"),
        "masked": (100, "algo=masked_adapt", "block_size=4"),
        "refined": (100, "algo=draft_refine", "block_size=4", "algo.injection.tokens=5e4"),
        "nce": (60, "algo=nce", "block_size=4", "bon.rounds=2"),
    }
    for name, (steps, *options) in stages.items():
        options += [f"trainer.max_steps={steps}", f"trainer.val_check_interval={steps}", *before]
        with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
            config = compose("config", [*shared, *options, f"paths.run_dir={folder / name}"])
        train.run(config)
        CHECKPOINT = folder / name / "checkpoints/best.ckpt"
        before = [f"training.from_pretrained={CHECKPOINT}"]

# %%
scorer = CandidateScorer.load_from_checkpoint(CHECKPOINT)
best_of, refinement, shape = scorer.best_of, scorer.refinement, scorer.backbone.model.config
gamma = float(scorer.head.scale().detach())
print(f"{shape.num_hidden_layers} layers of {shape.hidden_size}; blocks of {scorer.block_size}")
print(f"at most {refinement.iterations} passes, {refinement.commit}")
print(f"{best_of.count} candidates by {best_of.proposal.name}, {best_of.rounds} rounds", end=", ")
print(f"gamma = {gamma:.2f}")

# %% [markdown]
# ## A block to look at
#
# The checkpoint keeps a few batches of held-out text. Every block of an answer is written behind
# its *true* past, so that we know what it should be. `scored_blocks` refines all of them, proposes
# their candidates and scores these. We take a block with all its candidates that the model gets
# wrong and the scorer puts right at as many weights alpha as possible; of these the least certain.

# %%
blocks = scored_blocks(scorer, scorer.eval_batches)
weights = [alpha for alpha in ALPHAS if np.isfinite(alpha)]
pick_AM = np.stack([picked(blocks, alpha) for alpha in weights])
right_AM = (pick_AM > 0) & blocks.is_truth_MC[np.arange(len(blocks.valid_MC)), pick_AM]
times_M = right_AM.sum(0) * blocks.valid_MC.all(-1)
chosen = int(np.lexsort((blocks.entropy_M, times_M))[-1])

x = chosen
for batch in scorer.eval_batches:
    layout = scorer.layout(batch)
    here = layout.exists_BM.flatten().nonzero()[:, 0]
    if x < len(here):
        x = int(here[x])
        break
    x -= len(here)
batch = {**batch, "layout": layout}


def word(token: int) -> str:
    """A token as it reads."""
    return repr(scorer.tokenizer.decode([int(token)]))[1:-1].replace(" ", "␣")


row, place = divmod(x, layout.block_BM.shape[1])
number = layout.block_BM[row, place]
past = slice(int(layout.start_BN[row, number]), int(layout.stop_BN[row, number]))
target_S, written_S = layout.target_BMS[row, place], layout.predict_BMS[row, place]
print("the past: ", repr(scorer.tokenizer.decode(batch["input_ids"][row, past])))
print("the truth:", " ".join(word(t) for t in target_S))
print("given:    ", " ".join(word(t) for t in target_S[~written_S]) or "-")

# %% [markdown]
# ## The draft, pass by pass
#
# Before the first pass every place $i$ that is not given reads BLANK. A pass predicts all places at
# once, $p_i$; it says the token $c_i = \arg\max p_i$, with the probability $a_i = p_i(c_i)$. The
# rule `prefix_threshold` commits from the left up to the first place with $a_i < \eta$, anew in
# every pass, so that a token can still be revised. What the next pass reads is
#
# $$e_i = E(c_i) \text{ where committed},\qquad
# e_i = a_i E(c_i) + (1 - a_i)\,E(\mathrm{BLANK}) \text{ elsewhere}:$$
#
# the less sure a place is, the more of it stays blank. "Reads" is that share of the token, measured
# on the next pass's real input. The chain ends when all is committed, or at the most passes.

# %%
token_XS, given_XS = layout.target_BMS.flatten(0, 1), ~layout.predict_BMS.flatten(0, 1)
passes = []
with torch.no_grad():
    reader, refined, rounds = scorer.candidates(batch, layout, best_of)
    state, table_VD = refinement.start(reader, token_XS, given_XS), reader.table_VD
    for _ in range(refinement.iterations):
        hidden_XSD = reader.run(state.inputs_XSD)
        said = predict_places(reader, hidden_XSD, refinement.soft_inputs.top)
        state = refinement.advance(reader, state, said, given_XS)
        blank_D, token_SD = table_VD[reader.blank_id], table_VD[state.token_XS[x]]
        whole_SD, read_SD = token_SD - blank_D, state.inputs_XSD[x] - blank_D
        share_S = (read_SD * whole_SD).sum(-1) / whole_SD.square().sum(-1)
        sure_S = said.confidence_P[x].where(written_S, 1.0)
        passes.append((state.token_XS[x], sure_S, state.committed_XS[x], share_S))
        if state.committed_XS[x].all():
            break

# The same chain as the one whose candidates we shall see (`select_each` chooses on the way).
assert best_of.score_agg == "select_each" or torch.equal(state.token_XS[x], refined.token_XS[x])
needed = refined.passes_X[layout.exists_BM.flatten()].bincount()[1:].tolist()
print(f"{len(passes)} passes; blocks of this batch that needed 1, 2, ...: {needed}")

# %%
size = (1.5 * len(target_S) + 1.6, 0.85 * len(passes) + 1.2)
figure, axes = plt.subplots(figsize=size, layout="constrained")
sure_KS = torch.stack([sure_S for _, sure_S, _, _ in passes])
image = axes.imshow(sure_KS, cmap="Blues", vmin=0, vmax=1, aspect="auto")
for k, (token_S, _, committed_S, share_S) in enumerate(passes):
    for s, token in enumerate(token_S):
        said = f"{word(token)}  {sure_KS[k, s]:.2f}" if written_S[s] else f"{word(token)}  given"
        color = "white" if sure_KS[k, s] > 0.6 else "black"
        text = f"{said}\nreads {share_S[s]:.2f}"
        axes.text(s, k, text, ha="center", va="center", color=color, fontsize=10)
        if committed_S[s]:
            box = plt.Rectangle((s - 0.46, k - 0.44), 0.92, 0.88, fill=False, ec="C1", lw=2)
            axes.add_patch(box)
axes.set_xticks(range(len(target_S)), [word(t) for t in target_S])
axes.set_yticks(range(len(passes)), [f"pass {k + 1}" for k in range(len(passes))])
axes.set(xlabel="the truth of every place", title="what is said, how surely; framed: committed")
figure.colorbar(image, label="probability")
plt.show()

# %% [markdown]
# ## Four candidates
#
# The last pass leaves one distribution per place, and so one of whole blocks, in which places know
# nothing of each other: $q(c) = \prod_i p_i(c_i)$. Its most probable block is the refined one.
# `beam_bayes` adds the cheapest changes: a swap of place $i$ to its second-best token costs
#
# $$\Delta_i = \log p_i(\text{best}) - \log p_i(\text{second}),\qquad
# \log q(c_{\text{swapped}}) = \log q(c_0) - \sum_{i\ \text{swapped}} \Delta_i ,$$
#
# with at most `max_swap` places at once. A given place is not swapped.

# %%
with torch.no_grad():
    logits_SV = reader.logits(refined.hidden_XSD[x])
best = allowed_log_probabilities(logits_SV, reader.forbidden_V).topk(2)
print("place    best       p   second       p   cost of the swap")
for s in (~refined.fixed_XS[x]).nonzero()[:, 0]:
    (first, second), (p1, p2) = best.indices[s], best.values[s].exp()
    cost = best.values[s, 0] - best.values[s, 1]
    print(f"{s:>5} {word(first):>7}  {p1:6.4f} {word(second):>8}  {p2:6.4f}   {cost:6.2f}")

# %% [markdown]
# All candidates are shown to the backbone at once, as hard tokens, each seeing the past and itself:
# that is a *round*. With a second round (`bon.rounds=2`) the places that were not swapped are
# refined in between, given the swap, so that a changed letter may pull the others along; the greedy
# candidate 0 stays as it is, and a repetition is crossed out. $\log q$ is always that of the same
# $q$, of the tokens as they are now.


# %%
def written(tokens_S: torch.Tensor) -> str:
    """A candidate; in brackets what differs from the refined block."""
    pairs = zip(tokens_S, refined.token_XS[x], strict=True)
    return " ".join(f"[{word(t)}]" if t != g else f" {word(t)} " for t, g in pairs)


for number, found in enumerate(rounds, start=1):
    print(f"round {number}: log q   wrong tokens")
    for c, tokens_S in enumerate(found.tokens_XCS[x]):
        wrong = int((tokens_S != target_S)[written_S].sum())
        note = "" if wrong else "  the truth"
        note = note if found.valid_XC[x, c] else "  crossed out"
        print(f"{c}  {found.log_q_XC[x, c]:10.2f}   {wrong}   {written(tokens_S)}{note}")

exists_X, first, last = layout.exists_BM.flatten(), rounds[0], rounds[-1]
moved = int((first.tokens_XCS != last.tokens_XCS).any(-1)[exists_X].sum())
crossed = int((first.valid_XC & ~last.valid_XC)[exists_X].sum())
print(f"{moved} candidates of this batch changed later, {crossed} of them into another one")

# %% [markdown]
# ## What the scorer says
#
# $q$ multiplies the places as if they were independent. The scorer sees the candidate whole: hidden
# states of the backbone that has read *this* block, and its tokens, through a bidirectional layer,
#
# $$s = \tanh \mathrm{MLP}\big(\operatorname{mean}_i z_i\big) \in (-1, 1),\qquad
# S = \gamma s,\qquad \gamma = e^{\text{log scale}} .$$
#
# It was trained to find the truth among the truth and its candidates, $-\log
# \mathrm{softmax}(S)_{\text{truth}}$. Decoding picks the largest of $\log q + \alpha S$: with
# $\alpha = 0$ that is the refined block, and candidate $j$ passes candidate 0 at
#
# $$\alpha^*_j = \frac{\log q_0 - \log q_j}{S_j - S_0}\quad
# \text{if } S_j > S_0,\text{ else never.}$$
#
# A star marks the winner of a column.

# %%
valid_C, log_q_C = blocks.valid_MC[chosen], blocks.log_q_MC[chosen]
score_C = blocks.score_MC[chosen]
names = [written(tokens_S) for tokens_S in rounds[-1].tokens_XCS[x]]
print("     log q       S" + "".join(f"  alpha={alpha:<4g}" for alpha in weights))
for c in np.flatnonzero(valid_C):
    values = log_q_C[c] + np.array(weights) * score_C[c]
    stars = ["*" if pick == c else " " for pick in pick_AM[:, chosen]]
    cells = "".join(f"  {value:8.2f} {star}" for value, star in zip(values, stars, strict=True))
    print(f"{c}  {log_q_C[c]:7.2f} {score_C[c]:+7.2f}{cells}  {names[c]}")
print(f"the truth, read as clean text: S = {blocks.truth_score_M[chosen]:+.2f}")
for c in np.flatnonzero(valid_C & (score_C > score_C[0])):
    crossing = (log_q_C[0] - log_q_C[c]) / (score_C[c] - score_C[0])
    print(f"candidate {c} passes candidate 0 at alpha = {crossing:.2f}")

# %% [markdown]
# The same as lines: the lead over candidate 0. The highest line wins; its height at 0 is what $q$
# thinks of a candidate, its slope what the scorer does.

# %%
figure, axes = plt.subplots(figsize=(7, 3.8), layout="constrained")
alpha_A = np.linspace(0, 2, 101)
lead_CA = (log_q_C - log_q_C[0])[:, None] + alpha_A * (score_C - score_C[0])[:, None]
for c in np.flatnonzero(valid_C):
    true = " (the truth)" if blocks.is_truth_MC[chosen, c] else ""
    axes.plot(alpha_A, lead_CA[c], label=f"{c}: {names[c]}{true}", linewidth=2.5 if true else 1.3)
axes.set(xlabel="alpha", ylabel="lead over candidate 0, nats")
axes.legend(frameon=False, prop={"family": "monospace", "size": 9})
axes.grid(alpha=0.3)
plt.show()

# %% [markdown]
# ## What gamma allows
#
# As $|s| < 1$ (`scorer.bounded=true`, the default), two scores differ by less than $2\gamma$, hence
#
# - the truth among $n$ others gets at most $1 / (1 + n e^{-2\gamma})$ of the softmax, so that the
#   loss is at least $\ln(1 + n e^{-2\gamma})$, however well the scorer orders them;
# - a candidate that is $2\alpha\gamma$ or more behind in $\log q$ cannot win, whatever it says;
# - for these $s$ the loss is least at one $\gamma$, as a larger one makes mistakes dearer; training
#   goes there if it may (`scorer.scale.mode=learnable`) and rounding lets it (`dtype=float32`).

# %%
wrong_MC = blocks.valid_MC & (blocks.errors_MC > 0)
score_MJ = torch.from_numpy(np.c_[blocks.truth_score_M, blocks.score_MC])
exists_MJ = torch.from_numpy(np.c_[np.ones(len(wrong_MC), dtype=bool), wrong_MC])
counts_M = exists_MJ[:, 1:].any(-1)


def loss_at(scale: float) -> float:
    """Mean ranking loss of the truth against wrong candidates, had the scores another scale."""
    scaled_MJ = score_MJ.masked_fill(~exists_MJ, 0.0) * scale / gamma
    terms = ranking(scaled_MJ, torch.zeros_like(scaled_MJ), exists_MJ, None)
    return float(terms.loss_M[counts_M].mean())


scales = np.geomspace(0.1, 20, 60)
rivals_M = torch.from_numpy(wrong_MC.sum(-1))[counts_M]
floors = [bound_floor(scale, rivals_M).mean() for scale in scales]
figure, (bars, curve) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
edges = np.linspace(-gamma, gamma, 31)
bars.hist(blocks.truth_score_M, edges, density=True, alpha=0.55, label="the truth")
bars.hist(blocks.score_MC[wrong_MC], edges, density=True, alpha=0.55, label="wrong candidates")
bars.set(xlabel="S, from -gamma to gamma", ylabel="density")
bars.legend(frameon=False)
curve.plot(scales, [loss_at(scale) for scale in scales], label="loss with these s")
curve.plot(scales, floors, color="grey", linestyle=":", label="floor: all s at their bounds")
curve.axvline(gamma, color="C1", linewidth=1, label=f"gamma = {gamma:.2f}")
curve.set(xscale="log", xlabel="gamma", ylabel="nats per block", ylim=(0, None))
curve.legend(frameon=False)
plt.show()

behind_M = blocks.log_q_MC[:, 0] - blocks.log_q_MC[:, 1:].max(-1)
print("alpha    2 alpha gamma   blocks within its reach   of these another one won")
for alpha, pick_M in zip(weights, pick_AM, strict=True):
    reach_M = behind_M < 2 * alpha * gamma
    assert not scorer.head.bounded or not ((pick_M > 0) & ~reach_M).any()
    print(f"{alpha:<8g} {2 * alpha * gamma:13.2f} {reach_M.sum():>25} {(pick_M > 0).sum():>26}")

# %% [markdown]
# ## Does it pay?
#
# On one block anything can be shown. On all of them: a flip is *right* if the truth wins and
# *wrong* if candidate 0 was the truth; there are also flips from one wrong block to another, which
# change nothing. So
#
# $$\text{gain} = P(\text{picked is the truth}) - P(\text{candidate 0 is})
# = P(\text{flip})\,\big(P(\text{right} \mid \text{flip}) - P(\text{wrong} \mid \text{flip})\big),$$
#
# at most that of an oracle, which picks the truth wherever it is among the candidates. Brackets and
# whiskers are 95 % intervals over rows of text; with 0 in it, nothing has been shown.

# %%
groups = Groups(blocks.group_M)
found = sweep(blocks, groups)
print(f"{found[0].blocks} blocks; alpha=inf is the score alone")
print("alpha   picked = truth   flips  right  wrong   gain")
for one in found:
    counts = f"{one.bon.value:14.3f} {one.flips:>7} {one.right:>6} {one.wrong:>6}"
    print(f"{one.alpha:<7g} {counts}   {show(one.gain, '+')}")

# %%
figure, (gains, curve) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
gain_A = np.array([[one.gain.value, one.gain.low, one.gain.high] for one in found], dtype=float)
ends = [gain_A[:, 0] - gain_A[:, 1], gain_A[:, 2] - gain_A[:, 0]]
gains.errorbar(range(len(found)), gain_A[:, 0], yerr=ends, marker="o", capsize=3, label="gain")
most = found[0].oracle.value - found[0].greedy.value
gains.axhline(most, color="grey", linestyle=":", label="oracle: all that there is to gain")
gains.axhline(0.0, color="grey", linewidth=1)
gains.set_xticks(range(len(found)), [f"{one.alpha:g}" for one in found])
gains.set(xlabel="alpha", ylabel="picked = truth, against greedy")
gains.legend(frameon=False, loc="upper right", bbox_to_anchor=(1, 0.94))

quality = calibration(blocks, groups)
curve.plot([0, 1], [0, 1], color="grey", linestyle="--", linewidth=1)
for one in (filled for filled in quality.bins if filled.interval is not None):
    ends = [[max(one.rate - one.interval.low, 0)], [max(one.interval.high - one.rate, 0)]]
    curve.errorbar(one.mean, one.rate, yerr=ends, marker="o", capsize=3, color="C0")
curve.set(xlabel="softmax of S among the candidates", ylabel="is the truth")
curve.set_title(f"{quality.decidable} blocks with the truth among them")
plt.show()

# %% [markdown]
# Left: on a beam the $S$ of a perfect scorer is the log-probability of the text up to a constant
# (`objectives/pairing.py`) and deserves all the weight; a weak one with much weight overrules good
# drafts. The best alpha belongs to this checkpoint and proposal, and the one that is best *here*
# flatters itself: `mode=scorer_eval` chooses it on half of the rows and reports the gain on the
# others. Right: on the diagonal the softmax of the scores means what it says; a scorer that is too
# sure of itself lies above it for small p and below it for large p. All of it, with the tables:
#
#     python main.py mode=scorer_eval mode.blocks=data eval.checkpoint_path=...
