"""Small models for tests of decoding: random networks, and a denoiser that knows the truth."""

from dataclasses import dataclass

import torch
from torch import Tensor

from decoding.autoregressive import AutoregressiveDenoiser
from decoding.denoise import ActiveBlock, Canvas, Generation, generate
from decoding.denoiser import BlockDenoiser, Denoiser, WindowDenoiser
from decoding.reveal import RevealRule
from decoding.settings import SamplingConfig
from models.dit import DiT
from objectives.noise import LogLinear

VOCAB = 11


@dataclass(frozen=True)
class Special:
    bos: int = 0
    eos: int = 1
    pad: int = 2
    mask: int = 10


class Model:
    """Stands for an algorithm: `kind` is mdlm, bd3lm or ar."""

    def __init__(self, kind: str, length: int = 16, block_size: int = 4, **options) -> None:
        self.kind, self.length, self.block_size = kind, length, block_size
        self.special, self.noise, self.starts_with_bos = Special(), LogLinear(), True
        self.backbone = random_dit(length, **options)

    def new_denoiser(self, dtype: torch.dtype, kv_cache: bool) -> Denoiser:
        mask, backbone = self.special.mask, self.backbone.for_inference(dtype)
        if self.kind == "mdlm":
            return WindowDenoiser(backbone, mask)
        if self.kind == "ar":
            return AutoregressiveDenoiser(backbone, mask, kv_cache)
        return BlockDenoiser(backbone, mask, self.block_size, kv_cache)


def random_dit(length: int, time_conditioning: bool = False, vocab: int = VOCAB) -> DiT:
    """Weights with which the context changes predictions; dropout on, as while training."""
    torch.manual_seed(0)
    network = DiT(
        vocab_size=vocab,
        hidden_size=32,
        n_blocks=2,
        n_heads=2,
        length=length,
        cond_dim=8,
        dropout=0.5,
        time_conditioning=time_conditioning,
    )
    for name, weight in network.named_parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=1.5 / weight.shape[1] ** 0.5)
        elif "adaLN" in name:
            torch.nn.init.normal_(weight)
    return network.train()


def sample(kind: str, num_samples: int = 3, model: dict | None = None, **options) -> Generation:
    """Generate with a random model; `options` are those of the sampling, or of `generate`."""
    names = ("prompt_ids", "seed", "on_step", "first_sample")
    call = {name: options.pop(name) for name in names if name in options}
    return generate(Model(kind, **(model or {})), num_samples, SamplingConfig(**options), **call)


class Oracle:
    """A denoiser that knows the joint distribution of a few tokens: its true conditionals.

    Args:
        joint: probabilities of all token tuples, one axis per position; the mask token is the id
            after the last one.
    """

    device = torch.device("cpu")

    def __init__(self, joint: Tensor) -> None:
        self.joint, self.mask_id = joint, joint.shape[0]

    def begin(self, batch_size: int, length: int) -> list[tuple[int, int]]:
        assert length == self.joint.dim()
        return [(0, length)]

    def logits(self, x_BL: Tensor, start: int, end: int, rows_M: Tensor) -> Tensor:
        log_p = [self.conditional(x_BL[row // end].tolist(), row % end) for row in rows_M.tolist()]
        return torch.stack(log_p)

    def conditional(self, tokens: list[int], position: int) -> Tensor:
        """log p(token at position | the tokens that are not masked), with -inf for the mask."""
        if tokens[position] != self.mask_id:  # padding of a batch: any answer will do
            return torch.zeros(self.mask_id + 1)
        known = tuple(slice(None) if token == self.mask_id else token for token in tokens)
        free = [place for place, token in enumerate(tokens) if token == self.mask_id]
        others = [axis for axis, place in enumerate(free) if place != position]
        marginal = self.joint[known].sum(others) if others else self.joint[known]
        return torch.cat([(marginal / marginal.sum()).log(), torch.tensor([-torch.inf])])


def sample_oracle(oracle: Oracle, rule: RevealRule, num_samples: int, seed: int = 0) -> Canvas:
    """Fill `num_samples` masked sequences with the oracle's predictions."""
    length = oracle.joint.dim()
    x_BL = torch.full((num_samples, length), oracle.mask_id)
    rows_B, config = torch.arange(num_samples), SamplingConfig(strategy=rule, float64=True)
    canvas = Canvas(x_BL, x_BL == oracle.mask_id, rows_B, seed, config, None)
    rule.run(ActiveBlock(canvas, oracle, LogLinear(), 0, canvas.masked_BL))
    return canvas
