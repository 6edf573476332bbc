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
# # Look inside a masked diffusion model
#
# A checkpoint is opened with nothing but its file. Then: what it is, how it denoises a text step by
# step, how hard its task is at every masking rate, who may look at whom in block diffusion, and how
# training weighs words by their depth.

# %%
import os
import sys
import textwrap
from pathlib import Path

ROOT = next(path for path in [Path.cwd(), *Path.cwd().parents] if (path / "main.py").is_file())
sys.path.insert(0, str(ROOT))

import matplotlib.pyplot as plt
import torch
import yaml
from hydra import compose, initialize_config_dir

from data.grammar import Grammar
from dataloader import LanguageData
from decoding.settings import SamplingConfig
from diffusion import Diffusion
from models.attention import block_diffusion_mask
from modes import train
from objectives.reweighting import DepthReweighting

torch.manual_seed(0)
CHECKPOINT = Path(
    os.environ.get("CHECKPOINT", ROOT / "outputs/quickstart/train/checkpoints/best.ckpt")
)

# %% [markdown]
# Without a checkpoint, a short training run makes one. `compose` reads the same configuration as
# the command line and takes the same overrides.

# %%
if not CHECKPOINT.is_file():
    run_dir = ROOT / "outputs/look_inside"
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = compose("config", [f"paths.run_dir={run_dir}", "trainer.max_steps=200"])
    train.run(config)
    CHECKPOINT = run_dir / "checkpoints/best.ckpt"

# %% [markdown]
# ## What is in the file
#
# The weights (here the moving average, which is what validation measured), the whole configuration
# and the tokenizer.

# %%
model = Diffusion.load_from_checkpoint(CHECKPOINT)
parameters = sum(weight.numel() for weight in model.parameters())
print(yaml.dump({name: model.config[name] for name in ("algo", "model", "optim")}))
print(f"{parameters:,} parameters, {model.special.vocab_size} tokens")

# %% [markdown]
# ## Denoising, step by step
#
# Half of a validation text is hidden. Each forward pass predicts hidden tokens given those that are
# visible, and reveals one; `on_step` is called after every pass. Hidden tokens are drawn as boxes.

# %%
data = LanguageData(model.config, model.tokenizer)
rows = data.rows("validation")
original = torch.as_tensor(rows.take([0])["input_ids"].astype("int64"))
hidden = torch.rand(original.shape) < 0.5
hidden[:, 0] = False
prompt = original.masked_fill(hidden, model.special.mask)


def as_text(ids: torch.Tensor) -> str:
    """Tokens as text, a box for every hidden one."""
    pieces, run = [], []
    for token in [*ids.tolist(), model.special.mask]:
        if token == model.special.mask:
            pieces += [model.tokenizer.decode(run, skip_special_tokens=True), "▢"]
            run = []
        else:
            run.append(token)
    return textwrap.fill("".join(pieces[:-1]), 100)


frames = [prompt[0]]
generation = model.sample(
    1,
    SamplingConfig(nucleus_p=0.9),
    prompt,
    on_step=lambda x_BL: frames.append(x_BL[0].cpu().clone()),
)
for number in torch.linspace(0, len(frames) - 1, 5).long().tolist():
    print(f"after {number} of {generation.nfe} passes\n{as_text(frames[number])}\n")
print(f"the original\n{as_text(original[0])}")

# %% [markdown]
# The same for every position at once: a row per pass, light where a token is known.

# %%
known = torch.stack(frames) != model.special.mask
figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
axes.imshow(known, aspect="auto", cmap="Blues_r", interpolation="nearest")
axes.set(xlabel="position", ylabel="forward passes", title="tokens known")
plt.show()

# %% [markdown]
# ## How hard is it at every masking rate?
#
# The likelihood bound of MDLM is the mean over the masking rate $t$ of the cross-entropy per masked
# token: $-\log p(x) \le L \int_0^1 \mathrm{CE}(t)\,dt$. With few tokens hidden the context says a
# lot; with all of them hidden only the token frequencies are left. So the area under this curve is
# the validation loss.

# %%
RATES, DRAWS, NUM_ROWS = 8, 8, min(64, len(rows))
loader = data.eval_loader("validation", limit_rows=NUM_ROWS)
rate_parts, loss_parts = [], []
for batch in loader:
    tokens_B = model.scored_places(batch).sum(-1)
    for draw in range(DRAWS):
        masked_BL = model.corrupt_for_bound(batch, draw)["xt"] == model.special.mask
        rate_parts.append(masked_BL.sum(-1) / tokens_B)
    loss_parts.append((model.nll(batch, DRAWS) / tokens_B[:, None]).T.flatten())
rate, loss = torch.cat(rate_parts), torch.cat(loss_parts)

bins = (rate * RATES).ceil().long().clamp(1, RATES) - 1
groups = [loss[bins == number] for number in range(RATES)]
centres = [(number + 0.5) / RATES for number, group in enumerate(groups) if len(group) > 1]
means = [group.mean().item() for group in groups if len(group) > 1]
errors = [(group.std() / len(group) ** 0.5).item() for group in groups if len(group) > 1]

figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
axes.errorbar(centres, means, yerr=errors, marker="o", capsize=3, label="cross-entropy")
axes.axhline(loss.mean(), color="grey", linestyle="--", label="its mean: the bound")
axes.set(xlabel="masking rate t", ylabel="nats per masked token")
axes.legend(frameon=False)
plt.show()
print(f"{loss.mean():.3f} nats per token over {NUM_ROWS} rows, {DRAWS} draws each")

# %% [markdown]
# ## Who sees whom in block diffusion
#
# BD3-LM trains all blocks in one pass over $[x_t ; x_0]$. A noisy token sees its own noisy block
# and the clean blocks before it; a clean token sees the clean blocks up to its own. Everything else
# is neither visible nor computed.

# %%
LENGTH, BLOCK = 16, 4
figure, axes = plt.subplots(figsize=(4.5, 4.5), layout="constrained")
axes.imshow(block_diffusion_mask(LENGTH, BLOCK), cmap="Blues", interpolation="nearest")
for edge in range(BLOCK, 2 * LENGTH, BLOCK):
    width = 1.5 if edge == LENGTH else 0.4
    axes.axhline(edge - 0.5, color="black", linewidth=width)
    axes.axvline(edge - 0.5, color="black", linewidth=width)
middles = [LENGTH / 2 - 0.5, 1.5 * LENGTH - 0.5]
axes.set_xticks(middles, ["keys of $x_t$", "keys of $x_0$"])
axes.set_yticks(middles, ["queries of $x_t$", "queries of $x_0$"], rotation=90, va="center")
axes.set_title(f"[2L, 2L] mask, L = {LENGTH}, blocks of {BLOCK}")
plt.show()

# %% [markdown]
# ## What depth weighs
#
# `masking=dependency` lets training dwell on words by their depth in the dependency tree. Within a
# block, $u = n\,\mathrm{softmax}(\pm\hat d)$ over its $n$ words and $w = (1-\alpha) + \alpha u$,
# which averages 1. Here a sentence of the grammar, whose trees are known, is one block.

# %%
text = "the teacher who sings thinks that the cats near the house sleep"
sentence = Grammar().parse(text.split())
depths = torch.tensor([sentence.depths])
heights = torch.full_like(depths, max(sentence.depths))
no_draw = torch.zeros(depths.shape)
choices = {
    "deep words heavy, share 1": DepthReweighting(1.0),
    "root heavy, share 1": DepthReweighting(1.0, reverse=True),
    "root heavy, share 1/16": DepthReweighting(0.0625, reverse=True),
}
figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
places = range(len(sentence.words))
for name, reweighting in choices.items():
    weights = reweighting.weights(depths, heights, no_draw, len(places))[0]
    axes.plot(places, weights, marker="o", label=f"{name} (mean {weights.mean():.2f})")
ticks = [f"{w}\n{d}" for w, d in zip(sentence.words, sentence.depths, strict=True)]
axes.set_xticks(places, ticks, fontsize=8)
axes.set(xlabel="word and its depth", ylabel="training weight")
axes.legend(frameon=False)
plt.show()
