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
# # One accepted block and one rejected block
#
# A DFlash draft proposes several tokens at once; the target checks them in one pass and keeps
# those that it would have written itself. This notebook takes an answer of the target, asks the
# draft at every place of it, and looks at the block that goes best and at one whose first token
# is refused.

# %%
import json
import os
import sys
from pathlib import Path

ROOT = next(path for path in [Path.cwd(), *Path.cwd().parents] if (path / "main.py").is_file())
sys.path.insert(0, str(ROOT))

import matplotlib.pyplot as plt
import torch
from hydra import compose, initialize_config_dir

from decoding.drafts import NetworkDraft, NoDraft
from decoding.speculate import speculate
from decoding.verification import Greedy
from draft import DFlashDraft, accepted_tokens
from modes import regenerate, train
from objectives.acceptance import suffix_weights, survival

CHECKPOINT = Path(
    os.environ.get("CHECKPOINT", ROOT / "outputs/dflash_journey/drafts/m1_6/checkpoints/best.ckpt")
)
PROMPT = "Add 3 and 4. Explain your steps in a few sentences, then give the final answer."

# %% [markdown]
# Without a checkpoint, a draft is trained in a few seconds, for a target of random weights: its
# answers are bytes without a meaning, but they can be learnt and drafted like any others.

# %%
if not CHECKPOINT.is_file():
    folder = ROOT / "outputs/speculative_block"
    folder.mkdir(parents=True, exist_ok=True)
    questions = [{"id": str(n), "source": "sums", "prompt": f"{n} + {n * n}"} for n in range(64)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    tiny = ["model=tiny_causal", "model.hidden_size=32", "model.num_hidden_layers=3"]
    answers = ["mode=regenerate", f"mode.input={folder}/prompts.jsonl", "mode.max_new_tokens=32"]
    drafting = [
        "algo=dflash", "data=chat", f"data.files={folder}/answers/answers.jsonl", "block_size=8",
        "algo.draft.num_taps=null", "algo.draft.target_layer_ids=[0,1]", "algo.anchors=16",
        "algo.draft.num_hidden_layers=2", "trainer=cpu", "trainer.max_steps=150", "training.ema=0",
        "trainer.val_check_interval=150", "loader.global_batch_size=8", "optim.lr=5e-3",
        "model.length=128", "trainer.enable_progress_bar=false",
        "checkpointing.resume_from_ckpt=false",
    ]  # fmt: skip
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        asked = compose("config", [*tiny, *answers, f"paths.run_dir={folder}/answers"])
        trained = compose("config", [*tiny, *drafting, f"paths.run_dir={folder}/draft"])
    regenerate.run(asked)
    train.run(trained)
    CHECKPOINT = folder / "draft/checkpoints/best.ckpt"
    PROMPT = "7 + 49"

draft = DFlashDraft.load_from_checkpoint(CHECKPOINT)
target, shape = draft.target, draft.network.config
print(f"{target.name}: {shape.num_target_layers} layers, of which the draft reads", end=" ")
print(f"{list(shape.target_layer_ids)}; {shape.num_hidden_layers} layers of its own,", end=" ")
print(f"blocks of {shape.block_size}: the anchor and {shape.num_drafts} drafts")

# %% [markdown]
# ## The target's own answer
#
# Greedy decoding, one token per pass. It is what speculation must reproduce, token for token.

# %%
prompt = target.chat_ids([{"role": "user", "content": PROMPT}])
model = target.decoding_model
plain = speculate(
    model, NoDraft(), [prompt], Greedy(), max_new_tokens=64, stop_ids=target.stop_ids
)[0]
print(repr(target.tokenizer.decode(plain.token_ids)))

# %% [markdown]
# ## The draft at every place of the answer
#
# Each token of the answer is an anchor once. The draft sees the target's features strictly before
# the anchor, the anchor itself, and masks; it predicts the tokens after it, all in one pass. This
# is the computation of training: many anchors at once, none of which sees another.

# %%
ids = torch.tensor([prompt + plain.token_ids])
places = torch.arange(ids.shape[1])
batch = {
    "input_ids": ids,
    "response": (places >= len(prompt)).long()[None],
    "segment": torch.zeros_like(ids),
}
draft.anchors = draft.anchors_per_document = ids.shape[1]
with torch.no_grad():
    inputs = draft.draw_blocks(batch, torch.zeros(1, dtype=torch.long), (0,))
    reading = draft.taps.run(ids, position_ids=inputs["places"])
    hidden = draft.propose(ids, batch["segment"], inputs, reading.taps_BSE)
    probability = (hidden.float() @ target.head_VD.float().T).softmax(-1)
guess = probability.argmax(-1)
hits = (guess == inputs["labels"]) & inputs["valid"]
accepted = accepted_tokens(hits)
print("accepted per anchor:", [int(n) for n in accepted])

# %% [markdown]
# ## Two blocks, slot by slot
#
# $a_k$ is the probability that the draft gives to the target's token, $S_k = a_1 \cdots a_k$ the
# probability that slot $k$ is accepted, and $w_k = \sum_{m \ge k} S_m$ how much the expected
# accepted length gains from a better slot $k$: with EAL these are the weights of the slots, so
# the first slots, on which all others depend, weigh most.


# %%
def word(token: int) -> str:
    """A token as it reads."""
    return repr(target.tokenizer.decode([token]))


def show(block: int) -> None:
    """The slots of one block."""
    valid = inputs["valid"][block : block + 1]
    label = inputs["labels"][block]
    a = probability[block].gather(-1, label[:, None])[None, :, 0]
    s, w = survival(a, valid)[0], suffix_weights(a, valid)[0]
    anchor = ids[0, inputs["anchors"][0, block]]
    print(f"anchor {word(int(anchor))}: {int(accepted[block])} drafts accepted, then one token of")
    print("the target's own")
    print(f"{'slot':>4} {'draft':>16} {'target':>16}  {'a':>6} {'S':>6} {'w':>6}")
    alive = True
    for slot in range(int(valid.sum())):
        hit = bool(hits[block, slot])
        verdict = "accepted" if alive and hit else "REFUSED" if alive else "not looked at"
        alive = alive and hit
        print(
            f"{slot + 1:>4} {word(int(guess[block, slot])):>16} {word(int(label[slot])):>16}"
            f"  {float(a[0, slot]):6.3f} {float(s[slot]):6.3f} {float(w[slot]):6.3f}  {verdict}"
        )


whole = inputs["valid"].all(-1)
best = int(torch.where(whole, accepted, -1).argmax())
worst = int(torch.where(whole, accepted, 99).argmin())
show(best)
print()
show(worst)

# %% [markdown]
# ## Decoding with it
#
# Cycle after cycle: draft, verify, accept, and go on behind the last token that was committed.
# The answer is the plain one; only the number of passes of the target differs. No cycle commits
# more than `block_size` tokens: the drafts and one of the target's own.

# %%
proposer = NetworkDraft(draft.network, target.embedding_VD, target.decoding_head)
result = speculate(
    model, proposer, [prompt], Greedy(), max_new_tokens=64, stop_ids=target.stop_ids
)[0]
assert result.token_ids == plain.token_ids
tokens, cycles = len(result.token_ids) - 1, len(result.cycles)
tau = tokens / cycles
print(f"{tokens} tokens in {cycles} cycles: tau = {tau:.2f}, at most {shape.block_size}")

# %%
figure, axes = plt.subplots(figsize=(8, 2.6), layout="constrained")
axes.bar(range(len(result.cycles)), result.cycles)
axes.axhline(shape.block_size, color="black", linewidth=0.8)
axes.set_xlabel("cycle")
axes.set_ylabel("tokens committed")
plt.show()
