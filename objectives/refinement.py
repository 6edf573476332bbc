"""A model that refines its own drafts: what a pass predicts, and how training draws its passes.

Source: arXiv 2606.08357 (forward-free diffusion by looped refinement). A block begins as BLANKs;
pass k predicts all of its places at once from what pass k - 1 left. Training makes T passes, T
uniform on 1 .. K, the first T - 1 without a gradient, and takes the cross-entropy of all places in
the last one; a share g of the BLANKs is replaced by the true tokens at the start.

Legend: P places, V vocabulary, T most probable tokens kept, K passes.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from objectives.keyed import keyed_phase


class Prediction(NamedTuple):
    """What a pass says of P places.

    Attributes:
        token_P: the most probable token.
        confidence_P: its probability, in fp32.
        entropy_P: of the whole distribution, nats.
        top_token_PT, top_probability_PT: the T most probable tokens, best first; T may be 0.
    """

    token_P: Tensor
    confidence_P: Tensor
    entropy_P: Tensor
    top_token_PT: Tensor
    top_probability_PT: Tensor


def predict(
    logits_PV: Float[Tensor, "*P V"], forbidden_V: Bool[Tensor, " V"], top: int = 0
) -> Prediction:
    """Softmax in fp32 over the tokens that may be written.

    Args:
        logits_PV: of any number of leading axes.
        forbidden_V: tokens that are never written: BLANK, and ids that no tokenizer knows.
        top: T.
    """
    log_p_PV = allowed_log_probabilities(logits_PV, forbidden_V)
    best_P, token_P = log_p_PV.max(-1)
    p_PV = log_p_PV.exp()
    entropy_P = -torch.where(p_PV > 0, p_PV * log_p_PV, 0.0).sum(-1)
    top_PT, top_token_PT = log_p_PV.topk(top, dim=-1)
    return Prediction(token_P, best_P.exp(), entropy_P, top_token_PT, top_PT.exp())


def allowed_log_probabilities(
    logits_PV: Float[Tensor, "*P V"], forbidden_V: Bool[Tensor, " V"]
) -> Float[Tensor, "*P V"]:
    """log softmax in fp32 over the tokens that may be written; -inf for the others."""
    precise_PV = logits_PV.double() if logits_PV.dtype == torch.float64 else logits_PV.float()
    return precise_PV.masked_fill(forbidden_V, -torch.inf).log_softmax(-1)


def injection_rate(
    tokens_seen: float | int, start: float | int, end: float | int, tokens: float | int
) -> float:
    """g, the share of BLANKs that begin as the truth: from `start` to `end`, linear in the tokens
    seen by training, and `end` from `tokens` on."""
    progress = min(1.0, tokens_seen / tokens) if tokens > 0 else 1.0
    return start + (end - start) * progress


def number_of_passes(key: tuple[int, ...], most: int) -> int:
    """T uniform on 1 .. `most`, by the key alone: every rank makes the same number."""
    return 1 + int(keyed_phase(key) * most)


def filled_left(
    predict_MS: Bool[Tensor, "M S"], size: int
) -> tuple[Bool[Tensor, "M S S"], Bool[Tensor, "M S S"]]:
    """The chain rule inside a block: S inputs, of which number v predicts place v.

    log p(block | past) = sum_v log p(x_v | past, x_<v, BLANK at v and behind), exactly: the terms
    are normalised one by one, in the order of `sequential` decoding from hard tokens.

    Args:
        predict_MS: places that are not given.
        size: S.

    Returns:
        hidden: [M, v, S] places that are BLANK in input v. wanted: [M, v, S] the place that input v
        is asked for, if it is not given.
    """
    place_S = torch.arange(size, device=predict_MS.device)
    behind_VS = place_S[None, :] >= place_S[:, None]
    here_VS = place_S[None, :] == place_S[:, None]
    return predict_MS[:, None] & behind_VS, predict_MS[:, None] & here_VS


def token_errors(
    token_MS: Int[Tensor, "*#M S"],
    target_MS: Int[Tensor, "*#M S"],
    predict_MS: Bool[Tensor, "*#M S"],
) -> Int[Tensor, "..."]:
    """How many places of every block are wrong; leading axes broadcast."""
    return ((token_MS != target_MS) & predict_MS).sum(-1)
