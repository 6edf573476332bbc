"""Masked diffusion, block diffusion and autoregression: one backbone, three ways to corrupt.

    MDLM    all of x_t at once, bidirectional                     arXiv 2406.07524
    BD3LM   [x_t ; x_0], blocks denoised given clean past blocks  arXiv 2503.09573
    AR      the next token, causal

A batch is corrupted on the host, next to the data: noise is a hash of (seed, step, position in the
global batch), so it is the same on any number of ranks, and the number of masked rows is known
without asking the device. The network then computes logits for exactly those rows.

Legend: B sequences, L tokens, K blocks, S block size, M masked rows, D features.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from algorithm import Algorithm, Likelihood, LossTerms
from decoding.autoregressive import AutoregressiveDenoiser
from decoding.denoise import Generation, Prompt, generate
from decoding.denoiser import BlockDenoiser, Denoiser, WindowDenoiser
from decoding.settings import SamplingConfig
from models.attention import BlockDiffusionAttention, FullAttention
from models.dit import AttentionPattern
from objectives.corruption import FULL_INTERVAL, SHUFFLE, Corruption, MaskingProcess
from objectives.keyed import keyed_uniform
from objectives.likelihood import head_cross_entropy, masked_cross_entropy, row_sums
from objectives.masking import maskable_per_block
from objectives.reweighting import DepthReweighting
from runtime.config import instantiate

_LOGIT_ROWS = 4096  # rows of fp32 logits alive at a time in an evaluation


class BlockLosses(NamedTuple):
    """N blocks: time, mean loss over the S places, tokens masked and maskable, and P(count | t)."""

    time_N: Tensor
    loss_N: Tensor
    count_N: Tensor
    maskable_N: Tensor
    pmf_NC: Tensor | None


class Diffusion(Algorithm):
    """Common part: a denoiser that predicts tokens at selected rows of a corrupted input."""

    def __init__(self, config: dict[str, Any], tokenizer: dict) -> None:
        super().__init__(config, tokenizer)
        config = self.config
        self.length = config["model"]["length"]
        self.block_size = config["block_size"]
        self.seed = config["seed"]
        self.ignore_bos = config["algo"]["ignore_bos"]
        self.backbone = instantiate(
            {k: v for k, v in config["model"].items() if k != "name"},
            vocab_size=self.special.vocab_size,
            time_conditioning=config["algo"]["time_conditioning"],
        )
        noise = {k: v for k, v in config["noise"].items() if k not in ("name", "type")}
        if config["algo"]["mdlm_loss_scale"]:
            noise["eps"] = 1e-3
        self.noise = instantiate(noise)
        self._patterns: dict[str, AttentionPattern] = {}

    @property
    def starts_with_bos(self) -> bool:
        """Whether the first token is given instead of generated."""
        return self.ignore_bos

    @property
    def is_exact(self) -> bool:
        """Whether every draw of the bound is the likelihood itself: blocks of one token."""
        return self.block_size == 1

    def corrupt(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """Inputs, rows, targets and weights of a training batch (host tensors)."""
        raise NotImplementedError

    def corrupt_for_bound(self, batch: dict[str, Tensor], draw: int) -> dict[str, Tensor]:
        """The same for one Monte-Carlo draw of the unweighted likelihood bound."""
        raise NotImplementedError

    def network_input(self, inputs: dict[str, Tensor]) -> Tensor:
        """Token ids in the order that the attention pattern expects."""
        return inputs["xt"]

    def new_pattern(self, device: torch.device) -> AttentionPattern:
        """The attention pattern of training."""
        raise NotImplementedError

    def new_denoiser(self, dtype: torch.dtype, kv_cache: bool) -> Denoiser:
        """The way to decode with these weights, cast to `dtype` (`decoding.denoise.generate`)."""
        raise NotImplementedError

    def sample(
        self,
        num_samples: int,
        config: SamplingConfig | None = None,
        prompt_ids: Prompt | None = None,
        seed: int = 0,
        on_step: Callable[[Tensor], None] | None = None,
        first_sample: int = 0,
    ) -> Generation:
        """Generate a batch; see `decoding.denoise.generate` for the arguments.

        Without `config`, with the sampling options that the model was trained with.
        """
        if config is None:
            options = self.config["sampling"]
            strategy = options["strategy"] and instantiate(options["strategy"])
            config = SamplingConfig.from_options(options, strategy, self.config["algo"]["T"])
        return generate(self, num_samples, config, prompt_ids, seed, on_step, first_sample)

    def attention(self) -> AttentionPattern:
        """The training pattern on the model's device, built once."""
        key = str(self.device)
        if key not in self._patterns:
            self._patterns[key] = self.new_pattern(self.device)
        return self._patterns[key]

    def on_before_batch_transfer(
        self, batch: dict[str, Any], dataloader_idx: int
    ) -> dict[str, Any]:
        """Corrupt on the host, before the batch travels to the device."""
        if self.trainer.training:
            batch["inputs"] = self.corrupt(batch, self.trainer.global_step)
        else:
            batch["draws"] = [self.corrupt_for_bound(batch, d) for d in range(self.eval_draws)]
        return batch

    def features(self, inputs: dict[str, Tensor]) -> Tensor:
        """[M, D] features of the selected rows."""
        return self.backbone(
            self.network_input(inputs),
            self.attention(),
            rows_M=inputs["rows"],
            sigma_BS=inputs.get("sigma"),
        )

    def loss_terms(self, batch: dict[str, Any]) -> LossTerms:
        """Weighted cross-entropy of the selected rows, as a sum."""
        inputs = batch["inputs"]
        head = self.backbone.output_layer.linear
        loss, loss_M = head_cross_entropy(
            self.features(inputs),
            head.weight,
            head.bias,
            inputs["targets"],
            inputs["weights"],
            self.special.mask,
        )
        owner_M = inputs["rows"] // self.length
        per_row = row_sums(loss_M * inputs["weights"], owner_M, len(batch["index"]))
        return LossTerms(loss, inputs["scored"], per_row)

    def evaluate(self, batch: dict[str, Any], draw: int) -> Likelihood:
        """Unweighted bound on -log p of every row (exact for AR and for blocks of one token)."""
        inputs = batch["draws"][draw]
        loss_M = self.cross_entropy(inputs)
        owner_M = inputs["rows"] // self.length
        nll_B = row_sums(loss_M * inputs["weights"], owner_M, len(batch["index"]))
        return Likelihood(nll_B, (self.scored_places(batch) & batch["token_mask"]).sum(-1))

    def cross_entropy(self, inputs: dict[str, Tensor]) -> Tensor:
        """[M] cross-entropy of the selected rows, a part of their logits at a time."""
        parts = zip(
            self.features(inputs).split(_LOGIT_ROWS),
            inputs["targets"].split(_LOGIT_ROWS),
            strict=True,
        )
        return torch.cat(
            [
                masked_cross_entropy(self.backbone.logits(part_CD), target_C, self.special.mask)
                for part_CD, target_C in parts
            ]
        )

    @torch.no_grad()
    def token_nll(self, batch: dict[str, Any], draw: int) -> Tensor:
        """[B, L] what every token adds to the bound of `evaluate`, nats, in double precision.

        The bound is additive over tokens: one that this draw hides adds its cross-entropy times its
        weight m/n, the others nothing. Over draws its mean is the token's share of the bound; the
        rows sum to `evaluate`.
        """
        inputs = batch["draws"][draw]
        terms_M = self.cross_entropy(inputs) * inputs["weights"]
        total_BL = torch.zeros(inputs["x0"].shape, dtype=torch.float64, device=terms_M.device)
        total_BL.view(-1)[self.predicted_places(inputs["rows"])] = terms_M.double()
        return total_BL

    def predicted_places(self, rows_M: Tensor) -> Tensor:
        """[M] the places of the flattened [B * L] whose tokens these rows predict: their own."""
        return rows_M

    @torch.no_grad()
    def nll(self, batch: dict[str, Tensor], num_draws: int = 1) -> Tensor:
        """Bound on -log p in nats, [B, draws], outside of any trainer (notebooks, tests)."""
        draws = []
        for draw in range(num_draws):
            inputs = self.corrupt_for_bound(batch, draw)
            moved = {k: v.to(self.device) for k, v in inputs.items()}
            draws.append(self.evaluate({**batch, "draws": {draw: moved}}, draw).nll)
        return torch.stack(draws, dim=-1)

    def token_weights(self, batch: dict[str, Tensor]) -> Tensor:
        """[B, L] how much training dwells on every token: 1 where nothing is reweighted."""
        return torch.ones(batch["input_ids"].shape)

    def scored_places(self, batch: dict[str, Tensor]) -> Tensor:
        """[B, L] places that the likelihood counts: not the beginning-of-sequence token."""
        scored_BL = batch["loss_mask"]
        if self.ignore_bos:
            scored_BL = scored_BL.clone()
            scored_BL[:, 0] = False
        return scored_BL

    def select(
        self, batch: dict[str, Tensor], xt_BL: Tensor, rows_BL: Tensor, weight_BL: Tensor
    ) -> dict[str, Tensor]:
        """Gather what the loss needs: the rows to predict, their tokens and weights."""
        rows_M = rows_BL.flatten().nonzero()[:, 0]
        return {
            "xt": xt_BL,
            "x0": batch["input_ids"],
            "rows": rows_M,
            "targets": batch["input_ids"].flatten()[rows_M],
            "weights": weight_BL.flatten()[rows_M],
            "scored": self.scored_places(batch).sum(),
        }


class MDLM(Diffusion):
    """Masked diffusion: every token is masked with probability p(t), one t per sequence.

    Loss per token p'(t)/p(t) * -log p_theta(x_l | x_t) at masked places (SUBS parameterisation).
    """

    process: MaskingProcess

    def __init__(self, config: dict[str, Any], tokenizer: dict) -> None:
        super().__init__(config, tokenizer)
        training = self.config["training"]
        self.process = MaskingProcess(
            self.noise,
            self.block_size,
            self.seed,
            training["resample"],
            training["antithetic_sampling"],
            (training["sampling_eps_min"], training["sampling_eps_max"]),
        )
        self.reweighting = _reweighting(self.config["masking"])

    def new_pattern(self, device: torch.device) -> AttentionPattern:
        """Everything sees everything."""
        return FullAttention(self.length, False, self.backbone.attn_backend, device)

    def new_denoiser(self, dtype: torch.dtype, kv_cache: bool) -> Denoiser:
        """The whole window at once; there is nothing to cache."""
        return WindowDenoiser(self.backbone.for_inference(dtype), self.special.mask)

    def maskable_places(self, batch: dict[str, Tensor]) -> Tensor:
        """[B, L] places that are hidden and revealed: all but a beginning-of-sequence token.

        Padding too, scored or not: left visible it would tell how long the text is, which nobody
        tells a sampler.
        """
        maskable_BL = torch.ones_like(batch["loss_mask"])
        maskable_BL[:, 0] = not self.ignore_bos
        return maskable_BL

    @property
    def required_features(self) -> tuple[str, ...]:
        """Those that the weights of tokens are made of."""
        return self.reweighting.features if self.reweighting.active else ()

    def token_weights(self, batch: dict[str, Tensor]) -> Tensor:
        """[B, L] training weight of every token, mean 1 over the words of a block."""
        if not self.reweighting.active:
            return super().token_weights(batch)
        # Keyed by the row alone: a control whose weights changed from epoch to epoch would be none.
        uniform_BL = keyed_uniform((self.seed, SHUFFLE), batch["index"], self.length)
        depth_BL, height_BL = (batch[name] for name in self.reweighting.features)
        return self.reweighting.weights(depth_BL, height_BL, uniform_BL, self.block_size)

    def corrupt(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """Draw times, masks and weights, keyed by the optimiser step."""
        return self.draw(batch, batch["position"], (step,))[0]

    def draw(
        self,
        batch: dict[str, Tensor],
        position_B: Tensor,
        counter: tuple[int, ...],
        interval: tuple[float, float] | None = None,
    ) -> tuple[dict[str, Tensor], Corruption]:
        """Inputs of the training loss for one draw of the process, and the draw itself.

        1. the weights of the tokens, which shape the schedule or the loss; 2. times and masks;
        3. x_t and the rows that are scored.
        """
        weights_BL = self.token_weights(batch) if self.reweighting.active else None
        in_schedule = self.reweighting.target == "schedule"
        maskable_BL = self.maskable_places(batch)
        noise = self.process.draw(
            maskable_BL, position_B, counter, weights_BL if in_schedule else None, interval
        )
        weight_BL = noise.weight_BL
        if weights_BL is not None and not in_schedule:
            weight_BL = weight_BL * weights_BL
        return self._inputs(batch, noise.mask_BL, weight_BL, noise.probability_BK), noise

    @torch.no_grad()
    def block_losses(
        self, batch: dict[str, Tensor], counter: tuple[int, ...], interval: tuple[float, float]
    ) -> BlockLosses:
        """Training losses of a batch's blocks for times in `interval`: what a search compares."""
        inputs, noise = self.draw(batch, batch["index"], counter, interval)
        loss_M = self.cross_entropy(inputs) * inputs["weights"]
        block_N = row_sums(loss_M, inputs["rows"] // self.block_size, noise.time_BK.numel())
        maskable_BL = self.maskable_places(batch)
        return BlockLosses(
            noise.time_BK.flatten(),
            block_N / self.block_size,
            maskable_per_block(noise.mask_BL, self.block_size).flatten(),
            maskable_per_block(maskable_BL, self.block_size).flatten(),
            self.process.count_probabilities(maskable_BL, noise),
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the interval of times, which a search may have chosen."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["sampling_interval"] = list(self.process.interval)

    def restore(self, checkpoint: dict[str, Any]) -> None:
        """Take over the interval."""
        if checkpoint.get("sampling_interval") is not None:
            low, high = checkpoint["sampling_interval"]
            self.process.interval = (low, high)

    def corrupt_for_bound(self, batch: dict[str, Tensor], draw: int) -> dict[str, Tensor]:
        """Mask n of each block's m places, n uniform on 1..m, with weight m/n.

        The bound of continuous time with the masking probability integrated out. The noise depends
        on the row and the draw alone, so every checkpoint is measured on the same masks.
        """
        noise = self.process.draw_for_bound(self.maskable_places(batch), batch["index"], draw)
        return self._inputs(batch, noise.mask_BL, noise.weight_BL, noise.rate_BK)

    def _inputs(
        self, batch: dict[str, Tensor], mask_BL: Tensor, weight_BL: Tensor, rate_BK: Tensor
    ) -> dict[str, Tensor]:
        """x_t, the rows that are scored, and where the network is conditioned on it the noise level
        -log(1 - p) of every input token."""
        xt_BL = batch["input_ids"].masked_fill(mask_BL, self.special.mask)
        inputs = self.select(batch, xt_BL, mask_BL & self.scored_places(batch), weight_BL)
        if self.backbone.time_conditioning:
            sigma_BK = -torch.log1p(-rate_BK.float() * (1.0 - FULL_INTERVAL[0]))
            inputs["sigma"] = self.expand_sigma(sigma_BK.repeat_interleave(self.block_size, dim=1))
        return inputs

    def expand_sigma(self, sigma_BL: Tensor) -> Tensor:
        """Noise levels in the order of the network's input."""
        return sigma_BL


class BD3LM(MDLM):
    """Block diffusion: each block is an MDLM given the clean blocks before it, all in one pass."""

    def new_pattern(self, device: torch.device) -> AttentionPattern:
        """[x_t ; x_0]: noisy blocks see themselves and the clean past."""
        backend = self.backbone.attn_backend
        return BlockDiffusionAttention(self.length, self.block_size, backend, device)

    def new_denoiser(self, dtype: torch.dtype, kv_cache: bool) -> Denoiser:
        """Block after block, the finished ones in the cache."""
        backbone = self.backbone.for_inference(dtype)
        return BlockDenoiser(backbone, self.special.mask, self.block_size, kv_cache)

    def network_input(self, inputs: dict[str, Tensor]) -> Tensor:
        """[x_t ; x_0], without the last clean block: nobody looks at it."""
        return torch.cat([inputs["xt"], inputs["x0"][:, : -self.block_size]], dim=1)

    def expand_sigma(self, sigma_BL: Tensor) -> Tensor:
        """Each noisy block at its own level, the clean half at zero."""
        clean_BL = torch.zeros_like(sigma_BL[:, : -self.block_size])
        return torch.cat([sigma_BL, clean_BL], dim=1)


class AR(Diffusion):
    """Autoregression with the same backbone: -log p(x_l | x_<l), exact."""

    def new_pattern(self, device: torch.device) -> AttentionPattern:
        """Causal."""
        return FullAttention(self.length, True, self.backbone.attn_backend, device)

    @property
    def starts_with_bos(self) -> bool:
        """The first token is always given."""
        return True

    def new_denoiser(self, dtype: torch.dtype, kv_cache: bool) -> Denoiser:
        """Token after token, the past in the cache."""
        backbone = self.backbone.for_inference(dtype)
        return AutoregressiveDenoiser(backbone, self.special.mask, kv_cache)

    def scored_places(self, batch: dict[str, Tensor]) -> Tensor:
        """The first token has nothing before it and is never predicted."""
        scored_BL = batch["loss_mask"].clone()
        scored_BL[:, 0] = False
        return scored_BL

    def predicted_places(self, rows_M: Tensor) -> Tensor:
        """The next ones."""
        return rows_M + 1

    def corrupt(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """Nothing is hidden: row l predicts token l + 1 with weight 1."""
        x0_BL = batch["input_ids"]
        next_BL = self.scored_places(batch).roll(-1, dims=1)
        inputs = self.select(batch, x0_BL, next_BL, torch.ones(x0_BL.shape))
        inputs["targets"] = x0_BL.flatten()[self.predicted_places(inputs["rows"])]
        if self.backbone.time_conditioning:
            inputs["sigma"] = torch.zeros(x0_BL.shape)
        return inputs

    def corrupt_for_bound(self, batch: dict[str, Tensor], draw: int) -> dict[str, Tensor]:
        """The same: there is nothing to draw."""
        return self.corrupt(batch, draw)


def _reweighting(masking: dict[str, Any]) -> DepthReweighting:
    """What `masking` says; runs of earlier versions say nothing but `name: none`."""
    return instantiate(masking) if "_target_" in masking else DepthReweighting()
