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
# # One prefix, its thoughts and what is learned from them
#
# A model that thinks before it goes on (`algo=sft_thoughts`) reads a prefix, writes a thought and
# then a suffix. RLMT (`algo=rlmt`) rewards the suffix and teaches both. Here is one prefix: sixteen
# thoughts, the suffixes behind them, their rewards and advantages, which tokens carry loss, and
# what one gradient step does. Then: does the suffix use the thought at all?
#
# The task is adding digits, the model tiny and the sums few: this shows mechanics and is no
# evidence for anything.
#
# Tensors carry their shape: G prefixes, K samples of each, N samples, L places of a row, P tokens
# that the model chose.

# %%
import json
import os
import random
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

ROOT = next(path for path in [Path.cwd(), *Path.cwd().parents] if (path / "main.py").is_file())
sys.path.insert(0, str(ROOT))

import matplotlib.pyplot as plt
import numpy as np
import torch
from hydra import compose, initialize_config_dir

from algorithm import Algorithm
from decoding.rollout_record import RolloutSettings
from evaluation.gate_run import deranged
from evaluation.tables import text_table
from evaluation.thought_probe import probe_cells, thought_probe
from models.causal import forget_decoding_copy
from modes import insert_thoughts, train
from objectives.advantages import ADVANTAGES, group_advantages
from objectives.policy_gradient import policy_loss
from objectives.token_log_probs import token_log_probs
from rewards.continuation import Case
from rewards.verifiable import VerifiableReward

STUDY = ROOT / "outputs/thinking_study/sft/think_base/checkpoints/last.ckpt"
CHECKPOINT = Path(os.environ.get("CHECKPOINT", STUDY))
SAMPLES, SUFFIX_TOKENS = 16, 8

# %% [markdown]
# Without a checkpoint (`scripts/thinking/study.py` makes a better one) a tiny model is trained in
# under a minute: sums and differences of two digits with their working as the thought. Every sixth
# of them is held out; from these come the prefixes below.

# %%
if CHECKPOINT.is_file():
    draw, sums = random.Random(0), []
    for _ in range(24):
        terms = [f"{draw.choice('+-')} {draw.randint(1, 9)}" for _ in range(3)]
        sums.append(f"{draw.randint(1, 9)} {' '.join(terms)} =")
    thought_tokens = 64
else:
    pairs = [(a, b) for a in range(10) for b in range(10)]
    every = [f"{a} {sign} {b} =" for a, b in pairs for sign in "+-" if sign == "+" or a >= b]
    sums, thought_tokens = every[3::6], 16
    folder = ROOT / "outputs/one_thought"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "sums.jsonl").open("w") as file:
        for text in (one for one in every if one not in sums):
            a, sign, b, _ = text.split()
            total = int(a) + int(sign + b)
            file.write(json.dumps({"id": text, "text": f"{text} {total}\n"}) + "\n")
    quiet = ["trainer.enable_progress_bar=false", "+trainer.enable_model_summary=false"]
    working = [
        "mode=insert_thoughts", "mode/annotator=worked_sums", "mode.annotator.marker='='",
        f"mode.input={folder}/sums.jsonl", f"paths.run_dir={folder}/thoughts",
    ]  # fmt: skip
    tuning = [
        "algo=sft_thoughts", "model=tiny_thinker", "model.hidden_size=64", "model.length=64",
        "model.num_hidden_layers=2", "+model.init_std=0.02", "data=thoughts",
        f"data.files={folder}/thoughts/rows.jsonl", "data.end_suffix=true",
        "data.documents_per_row=null", "loader.global_batch_size=8", "training.ema=0",
        "optim.lr=5e-3", "lr_scheduler=cosine_warmup", "lr_scheduler.warmup_steps=20",
        "trainer=cpu", "trainer.max_steps=300", "trainer.val_check_interval=300",
        "checkpointing.resume_from_ckpt=false", f"paths.run_dir={folder}/sft", *quiet,
    ]  # fmt: skip
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        annotated, tuned = compose("config", working), compose("config", tuning)
    insert_thoughts.run(annotated)
    train.run(tuned)
    CHECKPOINT = folder / "sft/checkpoints/last.ckpt"

# %% [markdown]
# ## Thoughts and suffixes
#
# A sample has two stages: behind the prefix and `<think>` a thought is drawn, at most so many
# tokens; what the model does not close itself is closed from outside; then a suffix is drawn. The
# reward reads the suffix alone: 1 if its number is the true one. We sample for all prefixes and
# look at the one whose rewards are the most evenly mixed.

# %%
model = Algorithm.load_from_checkpoint(CHECKPOINT).eval()
tokenizer, reward = model.tokenizer, VerifiableReward(pattern=r"-?\d+")
open_id, close_id = (tokenizer.get_vocab()[text] for text in ("<think>", "</think>"))
settings = RolloutSettings(
    open_id, close_id, stop_ids=(model.special.eos,), thought_tokens=thought_tokens,
    suffix_tokens=SUFFIX_TOKENS, rows=512,
)  # fmt: skip


def value(text: str) -> int:
    """Of a chain sum, "7 - 2 + 5 ="."""
    return sum(int(term) for term in text.rstrip("=").replace("- ", "-").replace("+ ", "").split())


def word(ids: list[int]) -> str:
    """Tokens as they read."""
    return repr(tokenizer.decode(ids))[1:-1]


def rewards(rollouts: list) -> torch.Tensor:
    """Of the suffixes; no thought is shown."""
    cases = [
        Case(f"{one.prefix_id}/{one.k}", one.prefix_id, str(value(one.prefix_id)),
             tokenizer.decode(one.suffix_ids, skip_special_tokens=True))
        for one in rollouts
    ]  # fmt: skip
    return torch.tensor([one.score for one in reward.judge(cases)])


prompts = [(text, [*tokenizer.encode(text, add_special_tokens=False), open_id]) for text in sums]
everything = model.rollouts(settings).sample(prompts, SAMPLES)
reward_GK = rewards(everything).view(len(sums), SAMPLES)
chosen = int((reward_GK.mean(-1) - 0.5).abs().argmin())
group = everything[chosen * SAMPLES : (chosen + 1) * SAMPLES]
reward_K = reward_GK[chosen]
mixed = float((reward_GK.std(-1) > 0).float().mean())
print(f"{len(sums)} prefixes, mean reward {float(reward_GK.mean()):.3f}; {mixed:.0%} of them mixed")
print(f"the prefix: {sums[chosen]!r}, which is {value(sums[chosen])}\n")
cells = [
    [str(one.k), word(one.thought_ids), word(one.suffix_ids), f"{float(reward_K[one.k]):g}",
     "itself" if one.closed_autonomously else "from outside"]
    for one in group
]  # fmt: skip
print(text_table(["k", "thought", "suffix", "reward", "closed"], cells))

# %% [markdown]
# ## Advantages
#
# No value network is asked how good a prefix is: the samples of a prefix are compared with each
# other. With $r_k$ the rewards of one group,
#
# $$A_k^{\text{grpo}} = \frac{r_k - \bar r}{\sigma + \epsilon},\qquad
# A_k^{\text{dr\_grpo}} = r_k - \bar r,\qquad
# A_k^{\text{rloo}} = r_k - \overline{r_{j \ne k}} = \tfrac{K}{K - 1} A_k^{\text{dr\_grpo}} .$$
#
# Within a group the three differ by a factor alone. Between groups they do not: where one of
# sixteen is right, $\sigma$ is small, and grpo pulls harder than where eight are. A group without a
# difference teaches nothing, in any of them.

# %%
all_valid_GK = torch.ones_like(reward_GK, dtype=torch.bool)
advantage = {kind: group_advantages(reward_GK, all_valid_GK, kind) for kind in ADVANTAGES}
good, bad = int(reward_K.argmax()), int(reward_K.argmin())
counts_G, lines = reward_GK.sum(-1).int().tolist(), []
for right in sorted(set(counts_G)):
    g, mark = counts_G.index(right), "<-" if right == int(reward_K.sum()) else ""
    both = (int(reward_GK[g].argmax()), int(reward_GK[g].argmin()))
    ends = [" ".join(f"{float(a_GK[g, k]):+6.3f}" for k in both) for a_GK in advantage.values()]
    lines.append([str(right), *ends, mark])
print("advantages of a right and of a wrong sample; the arrow is this prefix")
print(text_table(["right of 16", *ADVANTAGES, ""], lines))
if good == bad:
    print("No rewards differ in any group: nothing can be learned from these samples.")

# %% [markdown]
# ## Which tokens carry loss
#
# Those that the model chose: thought and suffix. The prefix is given. The closing delimiter counts
# where the model wrote it (`algo.score_boundary`), and not where it was inserted. The third row is
# drawn with a limit of four tokens, so that its thought is cut off and closed from outside.

# %%
short = model.rollouts(replace(settings, thought_tokens=4)).sample(prompts[chosen : chosen + 1], 1)
shown = {"rewarded": group[good], "unrewarded": group[bad], "cut off": short[0]}
kinds = {"given": "0.85", "thought": "C0", "boundary": "C1", "suffix": "C2"}
longest = max(len(one.prompt_ids) + len(one.sampled_ids) for one in shown.values())
size = (0.36 * longest + 1.5, 2.2)
figure, axes = plt.subplots(figsize=size, layout="constrained")
for row, one in enumerate(shown.values()):
    sizes = [len(one.prompt_ids), len(one.thought_ids), len(one.boundary_ids), len(one.suffix_ids)]
    of_place = [kind for kind, n in zip(kinds, sizes, strict=True) for _ in range(n)]
    counts = [False] * len(one.prompt_ids) + one.chosen()
    ids = [*one.prompt_ids, *one.sampled_ids]
    for x, (token, kind, counted) in enumerate(zip(ids, of_place, counts, strict=True)):
        face = kinds[kind] if counted else "0.92"
        axes.add_patch(plt.Rectangle((x - 0.48, row - 0.4), 0.96, 0.8, fc=face, ec=kinds[kind]))
        text = word([token]).replace(" ", "␣").replace("<|im_end|>", "end")
        narrow = {"<think>": "<t>", "</think>": "</t>"}.get(text, text)
        axes.text(x, row, narrow, ha="center", va="center", fontsize=8, clip_on=True)
for kind, color in kinds.items():
    axes.plot([], [], "s", color=color, label=kind)
axes.set(xlim=(-0.6, longest - 0.4), ylim=(2.5, -0.5), xticks=[])
axes.set_yticks(range(3), shown)
axes.set_title("filled: carries loss; empty: does not", fontsize=10)
axes.legend(frameon=False, ncols=4, loc="upper center", bbox_to_anchor=(0.5, 0), fontsize=8)
plt.show()

# %% [markdown]
# ## One gradient step
#
# With $\rho_t = \pi(o_t) / \pi_{\text{old}}(o_t)$ the loss of a token is
#
# $$-\min\big(\rho_t A,\ \mathrm{clip}(\rho_t, 1 - \epsilon, 1 + \epsilon) A\big) + \beta\, k_3 ,$$
#
# summed over the tokens and divided by $K \cdot L_{\max}$ (`aggregation=constant`). In the first
# update $\rho = 1$, so the clip holds nothing and the gradient is $-A \nabla \log \pi$; and with
# the reference at the same weights $k_3 = 0$, without a gradient. First we see that training gives
# the tokens the probability that they were drawn with; else $\rho$ is wrong from the start.


# %%
def log_probs() -> tuple[torch.Tensor, torch.Tensor]:
    """log p [P] of the tokens that carry loss, under the weights of now, and whose they are."""
    longest = max(len(one.prompt_ids) + len(one.sampled_ids) for one in group)
    ids_NL = torch.zeros(len(group), longest, dtype=torch.long)
    segment_NL, response_NL = torch.full_like(ids_NL, -1), torch.zeros_like(ids_NL)
    for n, one in enumerate(group):
        first, end = len(one.prompt_ids), len(one.prompt_ids) + len(one.sampled_ids)
        ids_NL[n, :end] = torch.tensor([*one.prompt_ids, *one.sampled_ids])
        segment_NL[n, :end] = 0
        response_NL[n, first:end] = torch.tensor(one.chosen()).long()
    batch = {"input_ids": ids_NL, "segment": segment_NL, "response": response_NL}
    hidden_PD, place_P = model.predicting(batch)
    token_P = ids_NL.flatten()[place_P + 1]
    head, forbidden_V = model.backbone.logits, model.backbone.forbidden_V
    found_P = token_log_probs(hidden_PD, head, token_P, forbidden_V=forbidden_V)
    return found_P, place_P // longest


def surrogate(kind: str) -> torch.Tensor:
    """Loss of the group, with its gradient."""
    logp_P, sample_P = log_probs()
    terms = policy_loss(
        logp_P, drawn_P, drawn_P, sample_P, advantage[kind][chosen], all_valid_GK[chosen],
        ratio="token", aggregation="constant", longest=thought_tokens + SUFFIX_TOKENS,
        clip_low=0.2, clip_high=0.2, kl_coefficient=0.02, kl_level="token",
    )  # fmt: skip
    return terms.loss / terms.weight


with torch.no_grad():
    before_P, sample_P = log_probs()
drawn_P = torch.tensor([p for one in group for p in one.logprobs()])
print(f"{len(drawn_P)} tokens; training and sampling differ by at most", end=" ")
print(f"{float((before_P - drawn_P).abs().max()):.1e} nats")

weights = list(model.trained_parameters())
start = [weight.detach().clone() for weight in weights]
gradients = {kind: torch.autograd.grad(surrogate(kind), weights) for kind in ADVANTAGES}
norms = {k: float(sum(g.square().sum() for g in of) ** 0.5) for k, of in gradients.items()}
# One learning rate for all; with it dr_grpo moves the weights by a fixed length.
rate = 0.01 / max(norms["dr_grpo"], 1e-9)
after = {}
with torch.no_grad():
    for kind, of_kind in gradients.items():
        for weight, begin, gradient in zip(weights, start, of_kind, strict=True):
            weight.copy_(begin - rate * gradient)
        after[kind] = log_probs()[0]
    for weight, begin in zip(weights, start, strict=True):
        weight.copy_(begin)

lines = []
for kind, after_P in after.items():
    moved_K = torch.zeros(SAMPLES).index_add(0, sample_P, after_P - before_P)
    up, down = (float(moved_K[reward_K == r].mean()) for r in (1, 0))
    lines.append([kind, f"{norms[kind]:.4f}", f"{up:.3f}", f"{down:.3f}"])
print("mean change of log p of a sample, in nats")
print(text_table(["advantage", "gradient", "rewarded", "unrewarded"], lines))

# %% [markdown]
# Token by token, for one of each. Both samples have the same prefix and often the same beginning,
# which is pushed up by one and down by the other. What decides is where they part: there the
# rewarded token gains what its rivals lose.

# %%
move_P = after["dr_grpo"] - before_P
figure, rows = plt.subplots(2, figsize=(9, 4.4), layout="constrained", sharey=True)
for axes, (name, k) in zip(rows, {"rewarded": good, "unrewarded": bad}.items(), strict=True):
    one, move_T = group[k], move_P[sample_P == k].numpy()
    scored = [t for t, counts in zip(one.sampled_ids, one.chosen(), strict=True) if counts]
    axes.bar(range(len(move_T)), move_T, color=np.where(move_T > 0, "C2", "C3"))
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(move_T)), [word([t]).replace(" ", "␣") for t in scored], fontsize=8)
    total = float(before_P[sample_P == k].sum())
    gain = f"log p = {total:.2f}, moved by {float(move_T.sum()):+.3f}"
    a = float(advantage["dr_grpo"][chosen, k])
    axes.set_title(f"{name}, A = {a:+.3f}: {gain}", fontsize=10)
    axes.set_ylabel("nats")
plt.show()

# %% [markdown]
# ## Does the suffix use the thought?
#
# A suffix may be right because of its thought, or in spite of it. So the same suffix is drawn, with
# the same random numbers, behind its own thought, behind none, and behind one that the model wrote
# for another prefix. If all three look alike, thoughts are decoration, whatever the reward says.

# %%
other, own = deranged(sums, seed=0), {(one.prefix_id, one.k): one for one in everything}
opened, numbers = dict(prompts), [one.k for one in everything]
given = {
    "own": [one.thought_ids for one in everything],
    "blank": [[] for _ in everything],
    "swapped": [own[other[one.prefix_id], one.k].thought_ids for one in everything],
}
# The weights have been elsewhere since the last sampler was made.
forget_decoding_copy(model.backbone.model)
sampler, behind = model.rollouts(settings), {}
asked = [(one.prefix_id, opened[one.prefix_id]) for one in everything]
for condition, thoughts in given.items():
    behind[condition] = sampler.continue_thoughts(asked, thoughts, numbers)

figure, columns = plt.subplots(1, 3, figsize=(9, 2.8), layout="constrained", sharey=True)
for axes, (condition, drawn) in zip(columns, behind.items(), strict=True):
    here = [one.suffix_ids for one in drawn if one.prefix_id == sums[chosen]]
    said = Counter(
        reward.answer(tokenizer.decode(ids, skip_special_tokens=True)) or "none" for ids in here
    )
    listed = said.most_common(6)
    right = [answer == str(value(sums[chosen])) for answer, _ in listed]
    axes.bar(range(len(listed)), [n for _, n in listed], color=["C2" if r else "C7" for r in right])
    axes.set_xticks(range(len(listed)), [answer for answer, _ in listed])
    axes.set(title=condition, xlim=(-0.6, 5.6))
columns[0].set_ylabel("suffixes of 16")
figure.suptitle(f"numbers behind {sums[chosen]!r}; green: the right one", fontsize=10)
plt.show()

# %% [markdown]
# The same over all prefixes, with 95 % intervals that draw prefixes, as `mode=reward_gate
# mode.probe=true` prints it. A model that was always trained with a thought before the answer has
# never seen a blank one, so a low reward there says less than one behind another prefix's thought:
# that is as well-formed as its own, only wrong.

# %%
tables = {
    condition: [
        {"prefix_id": one.prefix_id, "reward": float(score), "suffix": word(one.suffix_ids)}
        for one, score in zip(drawn, rewards(drawn), strict=True)
    ]
    for condition, drawn in behind.items()
}
header, rows = probe_cells(thought_probe({"this model": tables}))
print(text_table(header[1:10], [row[1:10] for row in rows]))

# %% [markdown]
# The way from here: `algo=rlmt_paper training.from_pretrained=...` takes such steps on many
# prefixes (`docs/thinking.md`), and `scripts/thinking/study.py` measures what comes of it.
