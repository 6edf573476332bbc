"""Sampled tokens per CPU-second, one thread, beside a straightforward sampler.

    python benchmarks/sampling.py [--tokens N]

model=small (12 x 768) with random weights, vocabulary 30,522, block 16, nucleus 0.9, first-hitting:
`k` tokens are revealed per forward pass. The reference recomputes the whole context in every pass,
with logits for the block in full and a sorted float64 nucleus. "NFE" counts passes per sequence.
Several tokens per pass change the law that samples follow: `scripts/grammar_table.py` and
`scripts/reveal_quality.py` measure what that costs in quality.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from decoding.denoiser import BlockDenoiser

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

VOCABULARY, BLOCK = 30_522, 16
# name, cache, tokens per pass, batch
CELLS = {
    "reference": (None, 1, 1),
    "no cache": (False, 1, 1),
    "cache": (True, 1, 1),
    "cache, k=4": (True, 4, 1),
    "cache, batch 8": (True, 1, 8),
    "cache, batch 8, k=4": (True, 4, 8),
}


class RandomModel:
    """What `decoding.denoise.generate` needs, around a DiT with random weights."""

    starts_with_bos = True

    def __init__(self, length: int) -> None:
        import torch

        from data.tokenization import SpecialIds
        from models.dit import DiT
        from objectives.noise import LogLinear

        torch.manual_seed(0)
        self.length, self.noise = length, LogLinear()
        self.special = SpecialIds(bos=0, eos=1, pad=2, mask=VOCABULARY - 1, vocab_size=VOCABULARY)
        self.backbone = DiT(
            vocab_size=VOCABULARY, hidden_size=768, n_blocks=12, n_heads=12, length=length
        ).eval()
        # Zero-initialised parts would make every prediction uniform.
        for parameter in self.backbone.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.02)

    def new_denoiser(self, dtype: "torch.dtype", kv_cache: bool) -> "BlockDenoiser":
        """Block diffusion with the cache or without it."""
        from decoding.denoiser import BlockDenoiser

        backbone = self.backbone.for_inference(dtype)
        return BlockDenoiser(backbone, self.special.mask, BLOCK, kv_cache)


def reference_sample(model: RandomModel, tokens: int, low: bool) -> int:
    """First-hitting, one token per pass, nothing kept between passes; returns the passes made."""
    import torch
    import torch.nn.functional as F

    from models.attention import block_causal_mask

    net, passes = model.backbone, 0
    x = torch.full((1, tokens), model.special.mask)
    x[:, 0] = model.special.bos

    def logits(end: int) -> "torch.Tensor":
        """Of the last block, everything before it computed again."""
        ids, mask = x[:, :end], block_causal_mask(end, BLOCK)
        cond = F.silu(net.sigma_map(torch.zeros(1)))[:, None]
        cos, sin = net.rotary_emb(torch.arange(end))
        h = net.vocab_embed(ids)
        for block in net.blocks:
            parts = block.adaLN_modulation(cond).chunk(6, dim=-1)
            shift1, scale1, gate1, shift2, scale2, gate2 = parts
            y = F.layer_norm(h, h.shape[-1:]) * block.norm1.weight * (1 + scale1) + shift1
            q, k, v = (
                part.unflatten(-1, (net.n_heads, -1)).transpose(1, 2)
                for part in block.attn_qkv(y).chunk(3, dim=-1)
            )
            q, k = (
                (a * cos + torch.cat([-a.chunk(2, -1)[1], a.chunk(2, -1)[0]], -1) * sin).to(v.dtype)
                for a in (q, k)
            )
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            h = h + gate1 * block.attn_out(y.transpose(1, 2).flatten(2))
            y = F.layer_norm(h, h.shape[-1:]) * block.norm2.weight * (1 + scale2) + shift2
            h = h + gate2 * block.mlp(y)
        shift, scale = net.output_layer.adaLN_modulation(cond).chunk(2, dim=-1)
        y = F.layer_norm(h, h.shape[-1:]) * net.output_layer.norm_final.weight
        return net.logits((y * (1 + scale) + shift)[:, end - BLOCK :])

    for end in range(BLOCK, tokens + 1, BLOCK):
        here = slice(end - BLOCK, end)
        while (x[:, here] == model.special.mask).any():
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=low):
                p = logits(end).double().softmax(-1)
            passes += 1
            ordered, places = p.sort(-1, descending=True)
            ordered[ordered.cumsum(-1) - ordered > 0.9] = 0.0
            noise = -torch.log(torch.rand_like(ordered))
            drawn = places.gather(-1, (ordered / noise).argmax(-1, keepdim=True))[..., 0]
            masked = (x[0, here] == model.special.mask).nonzero()[:, 0]
            chosen = masked[torch.randint(len(masked), (1,))]
            x[0, here.start + chosen] = drawn[0, chosen]
    return passes


def cell(name: str, precision: str, tokens: int) -> dict:
    """Measure one cell in this process."""
    from decoding.denoise import generate
    from decoding.reveal import FirstHitting
    from decoding.settings import SamplingConfig
    from models.precision import use_fastest_exact_matmul
    from runtime.memory import keep_freed_memory

    cache, per_pass, batch = CELLS[name]
    model = RandomModel(tokens)
    if cache is None:
        reference_sample(model, BLOCK, precision == "bf16")
        start = time.process_time()
        passes = reference_sample(model, tokens, precision == "bf16")
    else:
        use_fastest_exact_matmul()
        keep_freed_memory()
        options = {"nucleus_p": 0.9, "kv_cache": cache, "precision": precision}
        config = SamplingConfig(strategy=FirstHitting(per_pass), **options)
        generate(model, batch, SamplingConfig(length=BLOCK, **options))
        start = time.process_time()
        passes = generate(model, batch, config).nfe
    seconds = time.process_time() - start
    return {"rate": batch * (tokens - 1) / seconds, "nfe": passes}


def run_alone(name: str, precision: str, tokens: int) -> dict:
    """This file again, in a fresh process with one thread."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--cell", name, precision, "--tokens", str(tokens)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--cell", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        print(json.dumps(cell(*options.cell, options.tokens)))
        return
    from evaluation.tables import text_table

    rows = []
    for precision in ("fp32", "bf16"):
        baseline = None
        for name in CELLS:
            figures = run_alone(name, precision, options.tokens)
            baseline = baseline or figures["rate"]
            ratio = figures["rate"] / baseline
            rows.append((f"{precision} {name}", figures["nfe"], figures["rate"], ratio))
            print(rows[-1], file=sys.stderr, flush=True)
    print(text_table(("cell", "NFE", "tok/CPU-s", "x reference"), rows))


if __name__ == "__main__":
    main()
