"""NCE losses and their diagnostics: hand numbers, gradients, duplicates."""

import math

import pytest
import torch

from objectives.contrastive import (
    LOSSES,
    NCETerms,
    binary,
    duplicates,
    graded_target,
    nce_loss,
    ranking,
)
from objectives.nce_statistics import scale_gradient

LN2 = math.log(2)


def slots(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def every(x_MC):
    return torch.ones(x_MC.shape, dtype=torch.bool)


def batch(seed, blocks=6, width=5):
    """Scores, log q, and slots of which the first is valid."""
    draw = torch.Generator().manual_seed(seed)
    score, log_q = torch.randn(2, blocks, width, generator=draw, dtype=torch.float64) * 2
    valid = torch.rand(blocks, width, generator=draw) < 0.7
    valid[:, 0] = True
    return score, -log_q.abs(), valid


def test_ranking_by_hand():
    """Odds 2 : 1 : 1 leave the truth a half; without the second slot two thirds."""
    score = slots([LN2, 0.0, 0.0], [LN2, 9.0, 0.0])
    valid = torch.tensor([[True, True, True], [True, False, True]])
    terms = nce_loss("ranking", score, torch.zeros_like(score), valid)
    assert terms.loss_M.tolist() == pytest.approx([LN2, math.log(1.5)])
    assert terms.weight_M.tolist() == [1, 1]
    assert terms.posterior_MC[1].tolist() == pytest.approx([2 / 3, 0, 1 / 3])
    assert terms.target_MC.tolist() == [[1, 0, 0]] * 2


def test_ranking_corrected_by_hand():
    """exp(s) / q is 1 / 0.5 = 2 for the truth, 1 / 0.25 = 4 and 3 / 0.5 = 6: a sixth."""
    score = slots([0.0, 0.0, math.log(3)])
    log_q = slots([0.5, 0.25, 0.5]).log()
    terms = nce_loss("ranking_corrected", score, log_q, every(score))
    assert terms.loss_M.item() == pytest.approx(math.log(6))


def test_binary_by_hand():
    """Two negatives: l = s - ln 2, odds 2 / 2, 4 / 2, 1 / 2; losses ln 2 + ln 3 + ln 1.5."""
    score = slots([LN2, 2 * LN2, 0.0, 50.0])
    valid = torch.tensor([[True, True, True, False]])
    terms = nce_loss("binary", score, torch.zeros_like(score), valid)
    assert terms.loss_M.item() == pytest.approx(LN2 + math.log(3) + math.log(1.5))
    assert terms.posterior_MC[0].tolist() == pytest.approx([1 / 2, 2 / 3, 1 / 3, 0])


def test_one_binary_negative_is_the_loss_of_edlm():
    score = slots([0.3, -1.1])
    expected = -math.log(1 / (1 + math.exp(-0.3))) - math.log(1 / (1 + math.exp(-1.1)))
    assert nce_loss("binary", score, score, every(score)).loss_M.item() == pytest.approx(expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_nothing_invalid_is_looked_at(loss):
    """Values at invalid slots may be anything; the other slots lose or gain nothing by them."""
    score, log_q, valid = batch(0)
    expected = nce_loss(loss, score, log_q, valid)
    hole = torch.where(valid, 0.0, torch.tensor([math.nan, math.inf, -math.inf, 1e30, 7.0]))
    spoiled = (score + hole).requires_grad_(True)
    terms = nce_loss(loss, spoiled, log_q + hole, valid)
    torch.testing.assert_close(terms, expected)
    terms.loss_M.sum().backward()
    assert spoiled.grad is not None
    assert (spoiled.grad[~valid] == 0).all() and spoiled.grad.isfinite().all()
    for row in range(len(score)):
        kept = valid[row]
        alone = nce_loss(loss, score[row : row + 1, kept], log_q[row : row + 1, kept],
                         torch.ones(1, int(kept.sum()), dtype=torch.bool))  # fmt: skip
        torch.testing.assert_close(terms.loss_M[row], alone.loss_M[0])


@pytest.mark.parametrize("loss", LOSSES)
def test_blocks_without_a_rival_or_a_truth_do_not_count(loss):
    score = slots([1.0, math.nan, math.nan], [1.0, 2.0, 3.0], [math.nan] * 3).requires_grad_(True)
    valid = torch.tensor([[True, False, False], [False, True, True], [False] * 3])
    terms = nce_loss(loss, score, score.detach(), valid)
    assert terms.loss_M.tolist() == terms.weight_M.tolist() == [0, 0, 0]
    assert scale_gradient(terms, score).tolist() == [0, 0, 0]
    terms.loss_M.sum().backward()
    assert score.grad is not None and (score.grad == 0).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients(loss):
    """posterior - y by slot, and its product with gamma s for log gamma, against autograd."""
    score, log_q, valid = batch(1)
    log_scale = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    scaled = log_scale.exp() * score
    scaled.retain_grad()
    terms = nce_loss(loss, scaled, log_q, valid)
    terms.loss_M.sum().backward()
    torch.testing.assert_close(scaled.grad, terms.posterior_MC - terms.target_MC)
    found = scale_gradient(terms, scaled)
    assert log_scale.grad is not None
    torch.testing.assert_close(found.sum(), log_scale.grad)


def test_half_precision_is_computed_in_single():
    score = torch.tensor([[300.0, 299.0]], dtype=torch.bfloat16)
    terms = nce_loss("ranking", score, score, every(score))
    assert terms.loss_M.dtype == torch.float32
    # 299 is no bfloat16; it is stored as 300 (spacing 2, ties to even), and the loss is ln 2.
    assert terms.loss_M.item() == pytest.approx(LN2, abs=1e-4)


def test_graded_targets():
    """ListNet: the cross-entropy of two distributions; the truth need not be there."""
    errors = torch.tensor([[0, 2, 1, 1], [0, 3, 3, 5]])
    valid = torch.tensor([[False, True, True, True], [False, True, True, True]])
    y = graded_target(errors, valid, 1 / LN2)
    torch.testing.assert_close(
        y, torch.tensor([[0, 1, 2, 2], [0, 4, 4, 1]]) / torch.tensor([[5.0], [9.0]])
    )
    hard = graded_target(errors, valid, 0)
    assert hard.tolist() == [[0, 0, 1, 0], [0, 1, 0, 0]]
    score = slots([8.0, 0.0, LN2, LN2], [8.0, 1.0, 1.0, 1.0])
    terms = ranking(score, score, valid, y.double())
    entropy = -(0.2 * math.log(0.2) + 0.8 * math.log(0.4))
    assert terms.loss_M.tolist() == pytest.approx([entropy, math.log(3)])
    assert terms.weight_M.tolist() == [1, 1]
    first = binary(score, score, valid, hard.double())
    # l = s - ln 2: the target, slot 2, has odds 2 / 2, the negatives 1 / 2 and 2 / 2.
    expected = LN2 + math.log(3 / 2) + LN2
    assert first.loss_M[0].item() == pytest.approx(expected)
    assert graded_target(errors, torch.zeros_like(valid), 1).abs().sum() == 0
    with pytest.raises(ValueError, match=r"nce.target_temperature=-1: allowed"):
        graded_target(errors, valid, -1)


def test_a_loss_of_ones_own():
    def doubled(score_MC, log_q_MC, valid_MC, target_MC=None) -> NCETerms:
        terms = ranking(score_MC, log_q_MC, valid_MC, target_MC)
        return terms._replace(loss_M=2 * terms.loss_M)

    score, log_q, valid = batch(2)
    ours = nce_loss(doubled, score, log_q, valid).loss_M
    torch.testing.assert_close(ours, 2 * nce_loss("ranking", score, log_q, valid).loss_M)
    with pytest.raises(ValueError, match=r"nce\.loss=triplet: allowed ranking, ranking_corr"):
        nce_loss("triplet", score, log_q, valid)


TOKENS = torch.tensor(
    [[[1, 2], [1, 2], [3, 4], [3, 4], [1, 2]], [[1, 2], [1, 9], [1, 3], [2, 2], [1, 9]]]
)


def test_duplicates_by_hand():
    found = duplicates(TOKENS)
    assert found.positive_MC.int().tolist() == [[0, 1, 0, 0, 1], [0, 0, 0, 0, 0]]
    assert found.earlier_MC.int().tolist() == [[0, 0, 0, 1, 1], [0, 0, 0, 0, 1]]
    assert found.any_MC.sum(-1).tolist() == [3, 1]


def test_duplicates_of_what_counts():
    """An empty slot equals nothing, and padding makes no difference between candidates."""
    exists = torch.tensor([[1, 0, 1, 1, 1], [1, 1, 1, 1, 1]]).bool()
    found = duplicates(TOKENS, exists, torch.tensor([[True, True], [True, False]]))
    assert found.positive_MC.int().tolist() == [[0, 0, 0, 0, 1], [0, 1, 1, 0, 1]]
    assert found.earlier_MC.int().tolist() == [[0, 0, 0, 1, 0], [0, 0, 1, 0, 1]]


def test_duplicates_equal_a_slow_loop():
    tokens = torch.randint(0, 2, (40, 6, 3), generator=torch.Generator().manual_seed(0))
    found = duplicates(tokens)
    for m, row in enumerate(tokens.tolist()):
        assert found.positive_MC[m].tolist() == [j > 0 and row[j] == row[0] for j in range(6)]
        assert found.earlier_MC[m].tolist() == [row[j] in row[1:j] for j in range(6)]
