"""Losses of single drafted slots with their gradients, in one pass over the frozen head.

The engine of `objectives/fused_acceptance.py`, which says why it is enough. Logits exist for a
chunk of rows at a time, are replaced in place by their softmax (or by gradients), multiplied back.

Legend: U unique target positions, R rows (slots that count), C rows of a chunk, G rows whose logits
stay in the processor's cache, D features, V vocabulary. Losses in nats.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_CACHED_ELEMENTS = 2**20  # logits that a CPU handles together


@dataclass(frozen=True)
class Teacher:
    """p of the rows: `index_R` points to e and H(p), or to the target's hidden states."""

    index_R: Tensor
    expected_UD: Tensor | None
    entropy_U: Tensor | None
    hidden_UD: Tensor | None


@dataclass(frozen=True)
class Pass:
    """What is computed of every row, and in which precision."""

    acceptance: bool
    kl: bool
    verification: str
    temperature: float
    chunk: int
    dtype: torch.dtype

    @property
    def exact(self) -> torch.dtype:
        """Of softmax and sums."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32


class Head:
    """The frozen projection and a buffer of logits for each model that is projected."""

    def __init__(self, weight_VD: Tensor, how: Pass, rows: int, buffers: int) -> None:
        self.weight_VD = weight_VD.to(how.dtype)
        self.exact = how.exact
        shape = buffers, min(how.chunk, rows), len(weight_VD)
        self.buffers = torch.empty(shape, dtype=how.dtype, device=weight_VD.device)

    def logits(self, low_CD: Tensor, buffer: int = 0) -> Tensor:
        """W h, in the buffer."""
        return torch.mm(low_CD, self.weight_VD.t(), out=self.buffers[buffer, : len(low_CD)])

    def features(self, matrix_CV: Tensor) -> Tensor:
        """W^T x of every row x."""
        return (matrix_CV @ self.weight_VD).to(self.exact)


@dataclass(frozen=True)
class _Rows:
    """Of every row: losses, most probable token, directions of the gradients (None: not asked)."""

    accept_R: Tensor
    kl_R: Tensor
    nll_R: Tensor
    top_R: Tensor
    accept_RD: Tensor | None
    kl_RD: Tensor | None

    @staticmethod
    def empty(hidden_RD: Tensor, labels_R: Tensor, how: Pass) -> "_Rows":
        """Room for all rows."""
        accept_R, kl_R, nll_R = hidden_RD.new_zeros(3, len(hidden_RD), dtype=how.exact)
        accept_RD = torch.empty_like(hidden_RD) if how.acceptance else None
        kl_RD = torch.empty_like(hidden_RD) if how.kl else None
        return _Rows(accept_R, kl_R, nll_R, torch.empty_like(labels_R), accept_RD, kl_RD)

    def part(self, rows: slice) -> "_Rows":
        """Views of some rows."""
        views: dict[str, Any] = {key: x if x is None else x[rows] for key, x in vars(self).items()}
        return replace(self, **views)


def slices(rows: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most `size` out of `rows`."""
    return (slice(start, start + size) for start in range(0, rows, size))


def _groups(logits_CV: Tensor) -> Iterator[slice]:
    rows, vocabulary = logits_CV.shape
    return slices(rows, rows if logits_CV.is_cuda else max(_CACHED_ELEMENTS // vocabulary, 1))


def _softmax(
    z_GV: Tensor, exact: torch.dtype, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """softmax(z / T), its logsumexp (told by the largest entry, without another pass), argmax."""
    if temperature != 1.0:
        z_GV = z_GV.to(exact) / temperature
    highest_G1, top_G1 = z_GV.max(-1, keepdim=True)
    q_GV = z_GV.softmax(-1, dtype=exact)
    lse_G1 = highest_G1.to(exact) - q_GV.gather(1, top_G1).log()
    return q_GV, lse_G1[:, 0], top_G1[:, 0]


def soften_(
    logits_CV: Tensor, exact: torch.dtype, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Replace logits by their softmax; return logsumexp and argmax of every row."""
    lse_C = logits_CV.new_empty(len(logits_CV), dtype=exact)
    top_C = torch.empty(len(logits_CV), dtype=torch.long, device=logits_CV.device)
    for group in _groups(logits_CV):
        q_GV, lse_C[group], top_C[group] = _softmax(logits_CV[group], exact, temperature)
        logits_CV[group] = q_GV
    return lse_C, top_C


def _of_labels(logits_CV: Tensor, labels_C: Tensor, exact: torch.dtype) -> Tensor:
    return logits_CV.gather(1, labels_C[:, None])[:, 0].to(exact)


def _chunk_with_summary(
    head: Head, low_CD: Tensor, labels_C: Tensor, teacher: Teacher | None, out: _Rows, how: Pass
) -> None:
    """a = q(y), and KL by e and H(p). A temperature costs the logits a second time."""
    q_CV = head.logits(low_CD)
    label_C = _of_labels(q_CV, labels_C, how.exact)
    lse_C, out.top_R[:] = soften_(q_CV, how.exact)
    out.nll_R[:] = lse_C - label_C
    out.accept_R[:] = out.nll_R
    cold = how.kl and how.temperature == 1.0
    g_CD = head.features(q_CV) if how.acceptance or cold else None
    if out.accept_RD is not None and g_CD is not None:
        out.accept_RD[:] = g_CD - head.weight_VD[labels_C]
    if teacher is None:
        return
    assert teacher.expected_UD is not None and teacher.entropy_U is not None
    if how.temperature != 1.0:
        q_CV = head.logits(low_CD)
        lse_C, _ = soften_(q_CV, how.exact, how.temperature)
        g_CD = head.features(q_CV) if how.kl else None
    e_CD = teacher.expected_UD[teacher.index_R].to(how.exact)
    inner_C = (low_CD.to(how.exact) * e_CD).sum(-1) / how.temperature
    out.kl_R[:] = lse_C - inner_C - teacher.entropy_U[teacher.index_R]
    if out.kl_RD is not None and g_CD is not None:
        out.kl_RD[:] = (g_CD - e_CD) / how.temperature


def _label_acceptance(
    q_GV: Tensor, p_GV: Tensor, labels_G: Tensor, nll_G: Tensor
) -> tuple[Tensor, Tensor]:
    minus_one_G1 = torch.full_like(nll_G, -1.0)[:, None]
    return nll_G, q_GV.scatter_add(1, labels_G[:, None], minus_one_G1)


def _match_acceptance(
    q_GV: Tensor, p_GV: Tensor, labels_G: Tensor, nll_G: Tensor
) -> tuple[Tensor, Tensor]:
    shared_GV = p_GV * q_GV
    a_G1 = shared_GV.sum(1, keepdim=True).clamp(min=torch.finfo(q_GV.dtype).tiny)
    return -a_G1[:, 0].log(), q_GV - shared_GV / a_G1


def _overlap_acceptance(
    q_GV: Tensor, p_GV: Tensor, labels_G: Tensor, nll_G: Tensor
) -> tuple[Tensor, Tensor]:
    a_G1 = torch.minimum(p_GV, q_GV).sum(1, keepdim=True)
    a_G1 = a_G1.clamp(min=torch.finfo(q_GV.dtype).tiny)
    below_GV = torch.where(q_GV < p_GV, q_GV, 0.0)
    return -a_G1[:, 0].log(), (below_GV.sum(1, keepdim=True) * q_GV - below_GV) / a_G1


# -log of a slot's acceptance, and its gradient with respect to the draft's logits.
_ACCEPTANCE: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "greedy": _label_acceptance,
    "match": _match_acceptance,
    "overlap": _overlap_acceptance,
}


def _chunk_with_distribution(
    head: Head, low_CD: Tensor, labels_C: Tensor, teacher: Teacher | None, out: _Rows, how: Pass
) -> None:
    """Any acceptance: both logits, each replaced by the gradient of one loss."""
    assert teacher is not None and teacher.hidden_UD is not None
    accept, exact, warmth = _ACCEPTANCE[how.verification], how.exact, how.temperature
    draft_CV = head.logits(low_CD)
    target_CV = head.logits(teacher.hidden_UD[teacher.index_R].to(how.dtype), buffer=1)
    label_C = _of_labels(draft_CV, labels_C, exact)
    for group in _groups(draft_CV):
        z_GV, t_GV = draft_CV[group], target_CV[group]
        (q_GV, lse_G, out.top_R[group]), (p_GV, p_lse_G, _) = (
            _softmax(x_GV, exact) for x_GV in (z_GV, t_GV)
        )
        out.nll_R[group] = lse_G - label_C[group]
        out.accept_R[group], accept_GV = accept(q_GV, p_GV, labels_C[group], out.nll_R[group])
        if warmth != 1.0:
            (q_GV, lse_G, _), (p_GV, p_lse_G, _) = (
                _softmax(x_GV, exact, warmth) for x_GV in (z_GV, t_GV)
            )
        inner_G = (p_GV * (t_GV.to(exact) - z_GV)).sum(-1) / warmth
        out.kl_R[group] = inner_G + lse_G - p_lse_G
        draft_CV[group] = accept_GV
        target_CV[group] = (q_GV - p_GV) / warmth
    if out.accept_RD is not None:
        out.accept_RD[:] = head.features(draft_CV)
    if out.kl_RD is not None:
        out.kl_RD[:] = head.features(target_CV)


class SlotLosses(torch.autograd.Function):
    """-log a and KL of every row; their gradients are ready when the values are."""

    @staticmethod
    def forward(
        ctx: Any, hidden_RD: Tensor, head_VD: Tensor, labels_R: Tensor, teacher: Teacher | None,
        how: Pass,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """-log a, KL, -log q(y) and argmax q of every row."""
        whole = teacher is not None and teacher.hidden_UD is not None
        chunk_of = _chunk_with_distribution if whole else _chunk_with_summary
        head = Head(head_VD, how, len(hidden_RD), 2 if whole else 1)
        low_RD, rows = hidden_RD.to(how.dtype), _Rows.empty(hidden_RD, labels_R, how)
        for part in slices(len(hidden_RD), how.chunk):
            target = teacher and replace(teacher, index_R=teacher.index_R[part])
            chunk_of(head, low_RD[part], labels_R[part], target, rows.part(part), how)
        ctx.save_for_backward(rows.accept_RD, rows.kl_RD)
        # A term that nobody asked for fails loudly when it is differentiated.
        constant = [] if how.acceptance else [rows.accept_R]
        constant += [] if how.kl else [rows.kl_R]
        ctx.mark_non_differentiable(*constant, rows.nll_R, rows.top_R)
        return rows.accept_R, rows.kl_R, rows.nll_R, rows.top_R

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_accept_R: Tensor, grad_kl_R: Tensor, *_: Tensor
    ) -> tuple[Tensor | None, ...]:
        """The directions of the two losses, times what flows into them, added."""
        pairs = zip((grad_accept_R, grad_kl_R), ctx.saved_tensors, strict=True)
        found = [(x_R[:, None].to(d_RD.dtype), d_RD) for x_R, d_RD in pairs if d_RD is not None]
        total_RD = found[0][0] * found[0][1]
        for grad_R1, direction_RD in found[1:]:
            total_RD.addcmul_(grad_R1, direction_RD)
        return total_RD, None, None, None, None
