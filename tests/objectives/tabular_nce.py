"""A scorer with a free number per context and block, trained to its optimum without sampling noise.

Every block and every set of negatives is enumerated and weighted with its probability, so a loss is
an expectation and Newton's method finds where it is least.

Legend: X contexts, K blocks there are, N different (truth, negatives) pairs, C slots.
"""

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from objectives.contrastive import nce_loss
from objectives.pairing import decode_score

PLACES, VOCABULARY = 2, 3
BLOCKS = VOCABULARY**PLACES


class World(NamedTuple):
    """What is true and what is proposed."""

    log_p_XK: Tensor
    logits_XSV: Tensor

    def log_q(self, temperature: float = 1.0) -> Tensor:
        """[X, K] of the factorised proposal."""
        log_q_XSV = (self.logits_XSV / temperature).log_softmax(-1)
        return (log_q_XSV[:, 0, :, None] + log_q_XSV[:, 1, None, :]).flatten(1)


def random_world(contexts: int = 200, seed: int = 0) -> World:
    """q factorises, p0 is q times noise that does not."""
    draw = torch.Generator().manual_seed(seed)
    logits_XSV = 1.5 * torch.randn(
        contexts, PLACES, VOCABULARY, generator=draw, dtype=torch.float64
    )
    noise_XK = 0.4 * torch.randn(contexts, BLOCKS, generator=draw, dtype=torch.float64)
    world = World(noise_XK, logits_XSV)
    return world._replace(log_p_XK=(world.log_q() + noise_XK).log_softmax(-1))


class Sets(NamedTuple):
    """Training sets: slot 0 the truth. `slots` is [N, C], or [X, N, C] if contexts differ."""

    slots: Tensor
    weight_XN: Tensor


def drawn(world: World, temperature: float = 1.0, negatives: int = 2) -> Sets:
    """Independent draws from q_T, as multisets with their multinomial probabilities."""
    log_q_XK = world.log_q(temperature)
    sets = torch.tensor(list(itertools.combinations_with_replacement(range(BLOCKS), negatives)))
    count_NK = torch.nn.functional.one_hot(sets, BLOCKS).sum(1).double()
    orders_N = math.lgamma(negatives + 1) - torch.lgamma(count_NK + 1).sum(-1)
    return _with_truths(world, sets, (orders_N + log_q_XK @ count_NK.T).exp())


def drawn_distinct(world: World, negatives: int = 2) -> Sets:
    """Draws from q without replacement."""
    q_XK = world.log_q().exp()
    sequences = torch.tensor(list(itertools.permutations(range(BLOCKS), negatives)))
    weight_XN, left_XN = torch.ones(2, len(q_XK), len(sequences), dtype=torch.float64)
    for slot_N in sequences.T:
        weight_XN, left_XN = weight_XN * q_XK[:, slot_N] / left_XN, left_XN - q_XK[:, slot_N]
    return _with_truths(world, sequences, weight_XN)


def _with_truths(world: World, sets_NC: Tensor, weight_XN: Tensor) -> Sets:
    truth_N1 = torch.arange(BLOCKS).repeat_interleave(len(sets_NC))[:, None]
    weight_XKN = world.log_p_XK.exp()[..., None] * weight_XN[:, None]
    slots_NC = torch.cat([truth_N1, sets_NC.repeat(BLOCKS, 1)], dim=1)
    return Sets(slots_NC, weight_XKN.flatten(1))


def beam(world: World, width: int = 4) -> Sets:
    """The most probable blocks of q, always."""
    beam_XC = world.log_q().topk(width).indices
    truth_XK1 = torch.arange(BLOCKS).expand(len(beam_XC), -1)[..., None]
    slots_XKC = torch.cat([truth_XK1, beam_XC[:, None].expand(-1, BLOCKS, -1)], dim=-1)
    return Sets(slots_XKC, world.log_p_XK.exp())


def valid_slots(slots_NC: Tensor, dedup: bool) -> Tensor:
    """What counts: all, or no copies of the truth or of an earlier negative."""
    same_NCC = slots_NC[..., :, None] == slots_NC[..., None, :]
    return ~(same_NCC.tril(-1).any(-1) & dedup)


class Fit(NamedTuple):
    """The score where the expected loss is least, and that loss, the mean over contexts."""

    score_XK: Tensor
    loss: float


def fit(loss: str, sets: Sets, log_q_XK: Tensor, dedup: bool = False, l2: float = 0.0) -> Fit:
    """Newton's method on the gradient of the loss as it is trained.

    Args:
        loss: which.
        sets: enumerated training sets.
        log_q_XK: of the blocks.
        dedup: whether copies are masked.
        l2: coefficient of half the squared scores; what nothing else bounds needs one.
    """
    expanded = len(log_q_XK), *sets.slots.shape[-2:]
    index_XN = sets.slots.expand(expanded).flatten(1)
    log_q_MC = log_q_XK.gather(1, index_XN).view(-1, expanded[-1])
    valid_MC = valid_slots(sets.slots, dedup).expand(expanded).reshape(log_q_MC.shape)
    slots_NCK = torch.nn.functional.one_hot(sets.slots, BLOCKS).double()
    ridge_KK = (l2 + 1e-12) * torch.eye(BLOCKS, dtype=torch.float64)
    score_XK = torch.zeros_like(log_q_XK)
    for _ in range(60):
        score_XK.requires_grad_(True)
        score_MC = score_XK.gather(1, index_XN).view(log_q_MC.shape)
        terms = nce_loss(loss, score_MC, log_q_MC, valid_MC)
        loss_X = (terms.loss_M.view(len(log_q_XK), -1) * sets.weight_XN).sum(-1)
        (slope_XK,) = torch.autograd.grad(loss_X.sum(), score_XK)
        score_XK = score_XK.detach()
        posterior_XNC = terms.posterior_MC.view(expanded)
        curved_XKK = _curvature(loss, posterior_XNC, slots_NCK, sets.weight_XN) + ridge_KK
        step_XK = torch.linalg.solve(curved_XKK, slope_XK + l2 * score_XK)
        if not l2 and loss != "binary":
            step_XK = step_XK - step_XK.mean(-1, keepdim=True)
        score_XK = score_XK - step_XK.clamp(-2.0, 2.0)
        if step_XK.abs().max() < 1e-8:
            return Fit(score_XK, float(loss_X.detach().mean()))
    raise AssertionError(f"{loss}: still moving by {step_XK.abs().max():.1e}")


def _curvature(loss: str, posterior_XNC: Tensor, slots_NCK: Tensor, weight_XN: Tensor) -> Tensor:
    """w (diag(pi) - pi pi^T) of a softmax, w pi (1 - pi) of independent slots."""
    slots = "xnck" if slots_NCK.ndim == 4 else "nck"
    if loss == "binary":
        own_XNC = weight_XN[..., None] * posterior_XNC * (1 - posterior_XNC)
        return torch.einsum(f"xnc,{slots}->xk", own_XNC, slots_NCK).diag_embed()
    pi_XNK = torch.einsum(f"xnc,{slots}->xnk", posterior_XNC, slots_NCK)
    mass_XNK = weight_XN[..., None] * pi_XNK
    return mass_XNK.sum(1).diag_embed() - mass_XNK.mT @ pi_XNK


def picked_mass(
    world: World, score_XK: Tensor, alpha: float, form: str = "additive", width: int = 4
) -> float:
    """Mean over contexts of p0(picked) / max p0, picked from the best blocks of q at T = 1."""
    log_q_XK = world.log_q()
    beam_XC = log_q_XK.topk(width).indices
    value_XC = decode_score(log_q_XK, score_XK, alpha, form).gather(1, beam_XC)
    picked_X = beam_XC.gather(1, value_XC.argmax(-1, keepdim=True))
    p_XK = world.log_p_XK.exp()
    return float((p_XK.gather(1, picked_X)[:, 0] / p_XK.max(-1).values).mean())


def largest_error(score_XK: Tensor, wanted_XK: Tensor) -> float:
    """Largest deviation once the constant of every context is removed."""
    difference_XK = score_XK - wanted_XK
    return float((difference_XK - difference_XK.mean(-1, keepdim=True)).abs().max())
