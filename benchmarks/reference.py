"""A straightforward training step and sampler: what one would write first.

Same network, same weights, same objective as the project, without any of its economies: logits for
all positions, both halves of [x_t ; x_0] through every layer and the head, one dense attention
mask, the conditioning recomputed per layer and sequence, log-probabilities over the whole tensor,
an optimiser with default settings and a per-tensor moving average. `tests/test_benchmarks.py`
checks that its loss equals that of the project.

Legend: B batch, S sequence (2L for block diffusion), V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import block_diffusion_mask
from models.dit import DiT


def rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


class ReferenceStep:
    """Loss of a batch with a DiT's weights.

    Args:
        network: holds the weights.
        block_size: block diffusion with this block size; None is MDLM.
    """

    def __init__(self, network: DiT, block_size: int | None) -> None:
        self.network, self.block_size = network, block_size
        self.length = network.length
        self.mask = None
        if block_size is not None:
            self.mask = block_diffusion_mask(self.length, block_size)

    def logits(self, ids_BS: Tensor) -> Tensor:
        """All logits of the noisy half."""
        net = self.network
        sigma_B = torch.zeros(len(ids_BS))
        cond = F.silu(net.sigma_map(sigma_B))[:, None]
        positions = torch.arange(self.length)
        if self.block_size is not None:
            positions = positions.repeat(2)
        angle = torch.outer(positions.float(), net.rotary_emb.inv_freq).repeat(1, 2)
        cos, sin = angle.cos(), angle.sin()
        x = net.vocab_embed.embedding[ids_BS]
        for block in net.blocks:
            parts = block.adaLN_modulation(cond).chunk(6, dim=-1)
            shift1, scale1, gate1, shift2, scale2, gate2 = parts
            h = self.norm(x, block.norm1.weight) * (1 + scale1) + shift1
            q, k, v = (
                part.unflatten(-1, (net.n_heads, -1)).transpose(1, 2)
                for part in block.attn_qkv(h).chunk(3, dim=-1)
            )
            q, k = ((a * cos + rotate_half(a) * sin).to(v.dtype) for a in (q, k))
            h = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)
            h = block.attn_out(h.transpose(1, 2).flatten(2))
            x = x + gate1 * F.dropout(h, block.dropout, block.training)
            h = self.norm(x, block.norm2.weight) * (1 + scale2) + shift2
            x = x + gate2 * F.dropout(block.mlp(h), block.dropout, block.training)
        shift, scale = net.output_layer.adaLN_modulation(cond).chunk(2, dim=-1)
        h = self.norm(x, net.output_layer.norm_final.weight) * (1 + scale) + shift
        return net.output_layer.linear(h)[:, : self.length]

    @staticmethod
    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return F.layer_norm(x.float(), x.shape[-1:]) * weight

    def loss(self, x0_BL: Tensor, xt_BL: Tensor, weight_BL: Tensor, mask_id: int) -> Tensor:
        """Mean over all tokens of weight * -log p(x_0 | x_t), SUBS over every position."""
        ids = xt_BL if self.block_size is None else torch.cat([xt_BL, x0_BL], dim=1)
        logits = self.logits(ids).float()
        logits[:, :, mask_id] += -1e6
        log_p = logits - torch.logsumexp(logits, dim=-1, keepdim=True)
        visible = xt_BL != mask_id
        log_p[visible] = -1e6
        log_p[visible, xt_BL[visible]] = 0.0
        log_p_x0 = torch.gather(log_p, -1, x0_BL[..., None])[..., 0]
        return (weight_BL * -log_p_x0).sum() / x0_BL.numel()


class ReferenceTrainer:
    """Optimiser and moving average with default settings."""

    def __init__(self, network: nn.Module) -> None:
        self.parameters = list(network.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=3e-4, weight_decay=0.0)
        self.shadow = [p.detach().clone() for p in self.parameters]

    def step(self, loss: Tensor) -> None:
        """Backward, clip, update, average."""
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for shadow, p in zip(self.shadow, self.parameters, strict=True):
                shadow.sub_((shadow - p) * (1 - 0.9999))
