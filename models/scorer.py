"""The head that scores candidate blocks, and the scale of its scores.

    z = W_fuse [ RMSNorm(h) ; RMSNorm(E(c)) ]    h: the backbone's hidden states of the block, E(c)
                                                 the embeddings of its tokens
    z = decoder block(z), bidirectional          of Qwen3, as in the source
    r = MLP(mean of z over the written places)   Linear(D, D/2), GELU, Linear(D/2, 1)
    s = tanh(r) if bounded, else r
    gamma s, gamma = exp(log_scale)

Everything here is in fp32 whatever the backbone is in. With bounded scores gamma is what decides
how sharp a ranking can be (|gamma s| <= gamma), as in contrastive models of images and text (arXiv
2103.00020); held fixed, or held in half precision, it is what keeps the loss on a plateau.

Source: arXiv 2606.08357. Legend: Y candidates, S places of a block, D features.
"""

import math
from typing import cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3Config,
    Qwen3DecoderLayer,
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
)

SCALE_MODES = ("fixed", "learnable")
SCALE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class ScoreScale(nn.Module):
    """gamma = exp(log_scale), kept between two bounds by `clamp` after every step.

    Args:
        mode: fixed | learnable.
        init: gamma at the start.
        least, most: the bounds.
        dtype: float32, or bfloat16 to see what that does: an update that is smaller than half the
            spacing of its numbers is lost, and at gamma = 2.7 that is 0.2 percent.

    Raises:
        ValueError: a value that is not allowed.
    """

    def __init__(
        self, mode: str, init: float, least: float, most: float, dtype: str = "float32"
    ) -> None:
        super().__init__()
        if mode not in SCALE_MODES:
            raise ValueError(f"scorer.scale.mode={mode}: allowed {', '.join(SCALE_MODES)}")
        if dtype not in SCALE_DTYPES:
            raise ValueError(f"scorer.scale.dtype={dtype}: allowed {', '.join(SCALE_DTYPES)}")
        if not 0.0 < least <= init <= most:
            raise ValueError(
                f"scorer.scale.init={init}: allowed scorer.scale.min={least} .. max={most}, above 0"
            )
        self._bounds = math.log(least), math.log(most)
        value = torch.tensor(math.log(init), dtype=SCALE_DTYPES[dtype])
        self.log_scale = nn.Parameter(value, requires_grad=mode == "learnable")

    def forward(self) -> Float[Tensor, ""]:
        """gamma, in fp32."""
        return self.log_scale.float().exp()

    @torch.no_grad()
    def clamp(self) -> None:
        """Put gamma back between its bounds."""
        self.log_scale.clamp_(*self._bounds)


class ScoreHead(nn.Module):
    """Scores candidate blocks by their hidden states and tokens.

    Args:
        hidden_size, num_heads, num_key_value_heads, head_dim, intermediate_size: of the decoder
            blocks, as in the backbone.
        layers: decoder blocks.
        bounded: whether s = tanh(r).
        scale: gamma.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        num_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        intermediate_size: int,
        layers: int,
        bounded: bool,
        scale: ScoreScale,
    ) -> None:
        super().__init__()
        config = Qwen3Config(
            vocab_size=1,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_hidden_layers=layers,
            num_attention_heads=num_heads,
            num_key_value_heads=num_key_value_heads,
            head_dim=head_dim,
        )
        config._attn_implementation = "sdpa"
        self.norm_hidden, self.norm_token = Qwen3RMSNorm(hidden_size), Qwen3RMSNorm(hidden_size)
        self.fuse = nn.Linear(2 * hidden_size, hidden_size, bias=False)
        self.layers = nn.ModuleList([Qwen3DecoderLayer(config, n) for n in range(layers)])
        for layer in self.layers:
            cast(nn.Module, layer.self_attn).is_causal = False  # type: ignore[assignment]
        self.rotary = Qwen3RotaryEmbedding(config)
        self.norm = Qwen3RMSNorm(hidden_size)
        self.mlp = nn.Sequential(
            nn.Linear(hidden_size, hidden_size // 2), nn.GELU(), nn.Linear(hidden_size // 2, 1)
        )
        self.scale, self.bounded = scale, bounded
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @classmethod
    def beside(
        cls, model: PreTrainedModel, *, layers: int, bounded: bool, scale: ScoreScale
    ) -> "ScoreHead":
        """A head whose blocks have the sizes of a backbone's."""
        shape = model.config
        heads = shape.num_attention_heads
        return cls(
            hidden_size=shape.hidden_size,
            num_heads=heads,
            num_key_value_heads=shape.num_key_value_heads,
            head_dim=getattr(shape, "head_dim", None) or shape.hidden_size // heads,
            intermediate_size=shape.intermediate_size,
            layers=layers,
            bounded=bounded,
            scale=scale,
        )

    def forward(
        self,
        hidden_YSD: Float[Tensor, "Y S D"],
        token_YSD: Float[Tensor, "Y S D"],
        written_YS: Bool[Tensor, "Y S"],
    ) -> Float[Tensor, " Y"]:
        """gamma s; `written_YS` are the places that were not given."""
        with torch.autocast(hidden_YSD.device.type, enabled=False):
            parts = self.norm_hidden(hidden_YSD.float()), self.norm_token(token_YSD.float())
            z_YSD = self.fuse(torch.cat(parts, -1))
            place_1S = torch.arange(z_YSD.shape[1], device=z_YSD.device)[None]
            rotary = self.rotary(z_YSD, place_1S)
            for layer in self.layers:
                z_YSD = layer(z_YSD, position_embeddings=rotary, attention_mask=None)
            weight_YS1 = written_YS[..., None].float()
            pooled_YD = (self.norm(z_YSD) * weight_YS1).sum(1) / weight_YS1.sum(1).clamp(min=1.0)
            score_Y = self.mlp(pooled_YD)[:, 0]
            return self.scale() * (score_Y.tanh() if self.bounded else score_Y)
