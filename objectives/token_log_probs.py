"""Log-probabilities of given tokens under the distribution that they were drawn from.

    log p(x) = log softmax(W h / T)_x, over the tokens that may be drawn

A token that was drawn from less than the whole vocabulary (a nucleus, an alphabet, all but the mask
token) has another probability than under the whole of it, and a policy gradient whose
log-probabilities leave that out is biased: the mean of exp(log p_full - log p_drawn) is then the
mass that was kept, and not 1.

Legend: P tokens, C of them in one piece, D features, V vocabulary.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Which tokens of every row may be drawn, of their probabilities [C, V].
Keep = Callable[[Tensor], Tensor]
_ROWS = 1024  # of logits alive at a time


def token_log_probs(
    hidden_PD: Float[Tensor, "P D"],
    head: Callable[[Tensor], Tensor],
    token_P: Int[Tensor, " P"],
    temperature: float = 1.0,
    forbidden_V: Bool[Tensor, " V"] | None = None,
    keep: Keep | None = None,
    rows: int = _ROWS,
) -> Float[Tensor, " P"]:
    """log p of every token in nats, in fp32, with its gradient.

    Logits are made `rows` at a time, and again in the backward pass, so that they are never all in
    memory.

    Args:
        hidden_PD: features of the places that predict.
        head: makes logits [C, V] of them.
        token_P: the tokens that were drawn.
        temperature: of the draws.
        forbidden_V: tokens that are never drawn.
        keep: marks what may be drawn, of probabilities [C, V]; no gradient flows through it. A
            token outside of it gets the log-probability that it has with it: it was drawn, so the
            two sets differ by rounding alone.
    """

    def part(hidden_CD: Tensor, token_C: Tensor) -> Tensor:
        logits_CV = head(hidden_CD).float()
        if forbidden_V is not None:
            logits_CV = logits_CV.masked_fill(forbidden_V, -torch.inf)
        return log_probs_of(logits_CV / temperature, token_C, keep)

    parts = zip(hidden_PD.split(rows), token_P.split(rows), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([part(*one) for one in parts])
    return torch.cat([_again(part, *one) for one in parts])


def _again(part: Callable[[Tensor, Tensor], Tensor], hidden_CD: Tensor, token_C: Tensor) -> Tensor:
    found = checkpoint(part, hidden_CD, token_C, use_reentrant=False)
    assert isinstance(found, Tensor)
    return found


def log_probs_of(
    logits_CV: Float[Tensor, "C V"], token_C: Int[Tensor, " C"], keep: Keep | None = None
) -> Float[Tensor, " C"]:
    """log softmax of some logits at given tokens, over what `keep` leaves."""
    if keep is not None:
        kept_CV = keep(logits_CV.detach().softmax(-1))
        kept_CV = kept_CV.scatter(-1, token_C[:, None], True)
        logits_CV = logits_CV.masked_fill(~kept_CV, -torch.inf)
    return logits_CV.log_softmax(-1).gather(-1, token_C[:, None])[:, 0]
