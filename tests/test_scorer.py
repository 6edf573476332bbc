"""CandidateScorer: its slots, losses and statistics by hand, however a batch is cut."""

import itertools
import math

import pytest
import torch

from objectives.nce_statistics import SUMS
from scorer import Slots
from tests.block_runs import build, plain, prepared
from tests.scorer_runs import KINDS, SAMPLES, learned, rounds_of, scorer_of, slow_loss, slow_rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return learned(tmp_path_factory.mktemp("scorer"))


def test_the_slots_are_the_truth_and_what_decoding_proposes(folder):
    """Slot 0 stands in the clean text; as a candidate it would look the same."""
    algorithm, _, batch = scorer_of(folder)
    layout = batch["layout"]
    reader, refined, [(slots, _)] = rounds_of(algorithm, batch)
    assert torch.equal(slots.block_X, layout.exists_BM.flatten().nonzero()[:, 0])
    truth = layout.target_BMS.flatten(0, 1)
    assert torch.equal(slots.tokens_XJS[:, 0], truth[slots.block_X])
    with torch.no_grad():
        again = reader.run(algorithm.backbone.embed(truth))[slots.block_X]
    torch.testing.assert_close(slots.hidden_XJSD[:, 0], again, rtol=1e-4, atol=1e-5)
    assert torch.equal(slots.tokens_XJS[:, 1], refined.token_XS[slots.block_X])
    assert slots.exists_XJ[:, :2].all() and slots.written_XS.any(-1).all()
    given = ~slots.written_XS[:, None].expand_as(slots.tokens_XJS)
    same = slots.tokens_XJS == slots.tokens_XJS[:, :1]
    assert given.any() and same[given].all()


@pytest.mark.parametrize("dedup", [True, False])
@pytest.mark.parametrize(
    ("kind", "chosen"),
    [("ranking", ()), ("ranking", SAMPLES), ("ranking_corrected", KINDS["corrected"]),
     ("binary", KINDS["binary"])],
)  # fmt: skip
def test_the_loss_is_that_of_its_slots(folder, kind, chosen, dedup):
    algorithm, _, batch = scorer_of(folder, *chosen, f"nce.dedup={str(dedup).lower()}")
    terms = algorithm.loss_terms(batch)
    sums = dict(zip(SUMS, algorithm._sums.tolist(), strict=True))
    _, _, [(slots, score)] = rounds_of(algorithm, batch)
    losses, rows, copies, slots_there = [], [0.0] * 4, 0, 0
    for x, counted, same, scores, log_q in slow_rows(slots, score, dedup):
        copies += same
        slots_there += int(slots.exists_XJ[x, 1:].sum())
        if len(counted) > 1:
            losses.append(slow_loss(kind, counted, scores, log_q))
            rows[int(slots.block_X[x]) // batch["layout"].block_BM.shape[1]] += losses[-1]
    assert terms.loss.item() == pytest.approx(sum(losses), rel=1e-4)
    assert terms.weight.item() == sums["blocks"] == len(losses) > 10
    assert terms.row_losses.tolist() == pytest.approx(rows, rel=1e-4)
    assert sums["loss"] == pytest.approx(sum(losses), rel=1e-4)
    assert (sums["copies"], sums["slots"]) == (copies, slots_there)
    assert copies > 0, "without copies nothing is tested"


@pytest.mark.parametrize("name", KINDS)
def test_a_batch_is_the_sum_of_its_rows(folder, name):
    """However it is cut: rounds, candidates and their random numbers are those of a row."""
    algorithm, data, _ = scorer_of(folder, *KINDS[name])
    rows = next(iter(data.train_loader(max_steps=1, accumulate=2)))
    whole = algorithm.loss_terms(prepared(algorithm, rows, 3))
    parts, rounds = [], set()
    for row in range(4):
        part = {key: column[row : row + 1] for key, column in rows.items()}
        batch = prepared(algorithm, part, 3)
        parts.append(algorithm.loss_terms(batch))
        rounds.add(len(rounds_of(algorithm, batch)[-1]))
    assert len(rounds) == (2 if name == "select_each" else 1)
    assert whole.weight.item() == sum(part.weight.item() for part in parts) > 10
    assert whole.loss.item() == pytest.approx(sum(p.loss.item() for p in parts), rel=1e-4)
    alone = [float(part.row_losses[0]) for part in parts]
    assert whole.row_losses.tolist() == pytest.approx(alone, rel=1e-4)


def test_which_rounds_count(folder):
    """perround is the mean of its rounds, lastround the last one alone."""
    found = {}
    for name in ("perround", "lastround"):
        # Before it has learned anything the backbone says something else behind other tokens.
        algorithm, _, batch = build(folder, "nce", "bon.rounds=3", f"bon.score_agg={name}")
        with torch.no_grad():
            algorithm.backbone.head_VD.mul_(4)
            _, _, rounds = rounds_of(algorithm, batch)
            means = [
                (float((t.loss_M * t.weight_M).sum()), float(t.weight_M.sum()))
                for t, _ in (algorithm.round_loss(*one) for one in rounds)
            ]
        assert len(means) == 3 and len({loss for loss, _ in means}) == 3
        terms = algorithm.loss_terms(batch)
        found[name] = float(terms.loss.detach() / terms.weight), means
    loss, means = found["lastround"]
    assert loss == pytest.approx(means[-1][0] / means[-1][1], rel=1e-5)
    loss, means = found["perround"]
    assert loss == pytest.approx(sum(m[0] for m in means) / sum(m[1] for m in means), rel=1e-5)


def test_log_q_of_the_truth_and_of_samples(folder):
    """Under the distributions of the chain's last pass, tempered, over the written places."""
    algorithm, _, batch = scorer_of(folder, *KINDS["corrected"])
    reader, refined, [(slots, _)] = rounds_of(algorithm, batch)
    assert not algorithm.negatives.proposal.include_greedy
    assert algorithm.best_of.proposal.include_greedy
    logits = reader.logits(refined.hidden_XSD).detach()[slots.block_X]
    logits[..., algorithm.special.mask] = -math.inf
    log_q = (logits / 0.7).log_softmax(-1)
    for x, j in itertools.product(range(len(log_q)), range(slots.tokens_XJS.shape[1])):
        if slots.exists_XJ[x, j]:
            wanted = sum(
                float(log_q[x, s, slots.tokens_XJS[x, j, s]])
                for s in range(4)
                if slots.written_XS[x, s]
            )
            assert slots.log_q_XJ[x, j].item() == pytest.approx(wanted, rel=1e-4, abs=1e-4)


def test_samples_are_drawn_anew_in_every_step_and_held_in_validation(folder):
    algorithm, data, _ = scorer_of(folder, *SAMPLES, "bon.proposal.temperature=3.0")
    rows = next(iter(data.train_loader(max_steps=1, accumulate=2)))

    def tokens(batch):
        _, _, [found] = algorithm.candidates(batch, batch["layout"], algorithm.negatives)
        return found.tokens_XCS[batch["layout"].exists_BM.flatten()]

    first, again, other = (tokens(prepared(algorithm, rows, step)) for step in (1, 1, 2))
    assert torch.equal(first, again)
    assert (first != other).any(-1).any(-1).float().mean() > 0.9
    held = [tokens({**rows, "layout": algorithm.layout(rows)}) for _ in range(2)]
    assert torch.equal(*held)


def test_some_blocks_of_every_row(folder):
    """Each is as likely as any other, the first one of the row included."""
    chosen = ("nce.blocks_per_row=2", "data.documents_per_row=3")
    algorithm, data, _ = scorer_of(folder, *chosen, data=plain)
    rows = next(iter(data.train_loader(max_steps=1, accumulate=2)))
    written = algorithm.layout(rows).written_BN
    assert written[:, 0].all() and (written.sum(-1) < written.shape[1]).any()
    counts = torch.zeros(written.shape)
    for step in range(300):
        layout = prepared(algorithm, rows, step)["layout"]
        assert (layout.written_BN.sum(-1) == 2).all() and not (layout.written_BN & ~written).any()
        counts += layout.written_BN
    share = counts / 300
    wanted = 2 / written.sum(-1, keepdim=True)
    error = (wanted * (1 - wanted) / 300).sqrt()
    assert ((share - wanted).abs() < 5 * error)[written].all()


def by_hand(*, tokens, exists=None, scored=None):
    tokens_XJS = torch.tensor(tokens)
    shape = tokens_XJS.shape
    exists_XJ = torch.ones(shape[:2], dtype=torch.bool) if exists is None else exists
    written = torch.ones(shape[0], shape[2], dtype=torch.bool)
    hidden, log_q = torch.zeros(*shape, 32), torch.zeros(shape[:2])
    scored = written if scored is None else torch.tensor(scored)
    return Slots(tokens_XJS, hidden, log_q, exists_XJ, written, scored, torch.arange(shape[0]))


def test_the_best_candidate_as_the_positive(folder):
    """Errors 2, 0, 1 and 0 again: the second slot is the target, though it is the truth itself."""
    algorithm, _, _ = scorer_of(folder, "nce.positive=fewest_errors", "bon.count=4")
    slots = by_hand(tokens=[[[1, 2, 3], [1, 8, 9], [1, 2, 3], [1, 2, 9], [1, 2, 3]]])
    score = torch.tensor([[5.0, 0.1, 0.4, 0.2, 9.0]])
    terms, sums = algorithm.round_loss(slots, score)
    odds = [math.exp(v) for v in (0.1, 0.4, 0.2)]
    assert terms.loss_M.item() == pytest.approx(-math.log(odds[1] / sum(odds)), rel=1e-5)
    named = dict(zip(SUMS, sums.tolist(), strict=True))
    assert named["ln_slots"] == pytest.approx(math.log(3), rel=1e-6)
    algorithm.target_temperature = 0.5
    terms, _ = algorithm.round_loss(slots, score)
    target = torch.tensor([-2.0, 0.0, -1.0]).div(0.5).softmax(-1)
    wanted = -(target * torch.tensor([0.1, 0.4, 0.2]).log_softmax(-1)).sum()
    assert terms.loss_M.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_behind_the_end_of_a_text_nothing_counts(folder):
    """The second slot says the same, the third is the second again; the fourth is wrong."""
    algorithm, _, _ = scorer_of(folder)
    tokens = [[[5, 1, 1], [5, 1, 7], [5, 1, 8], [6, 1, 1]]]
    slots = by_hand(tokens=tokens, scored=[[True, True, False]])
    terms, sums = algorithm.round_loss(slots, torch.zeros(1, 4))
    assert terms.loss_M.item() == pytest.approx(math.log(2))
    assert dict(zip(SUMS, sums.tolist(), strict=True))["copies"] == 2


def test_a_batch_of_copies_teaches_nothing_and_is_no_error(folder, monkeypatch):
    algorithm, _, batch = scorer_of(folder)
    slots = by_hand(tokens=[[[1, 2, 3]] * 5, [[4, 5, 6]] * 5])
    score = torch.randn(2, 5, requires_grad=True)
    terms, sums = algorithm.round_loss(slots, score)
    assert terms.loss_M.tolist() == [0, 0] and terms.weight_M.tolist() == [0, 0]
    assert torch.isfinite(sums).all()
    monkeypatch.setattr(algorithm, "_rounds", lambda batch: iter([(slots, score, terms, sums)]))
    found = algorithm.loss_terms(batch)
    found.loss.backward()
    assert found.weight > 0 and torch.isfinite(found.loss / found.weight)
    assert not score.grad.any()


@pytest.mark.parametrize("name", KINDS)
def test_the_gradient_of_gamma_is_that_of_autograd(folder, name):
    algorithm, _, batch = scorer_of(folder, *KINDS[name])
    terms = algorithm.loss_terms(batch)
    sums = dict(zip(SUMS, algorithm._sums.tolist(), strict=True))
    [wanted] = torch.autograd.grad(terms.loss, algorithm.head.scale.log_scale)
    assert sums["gamma_gradient"] == pytest.approx(wanted.item(), rel=1e-3, abs=1e-4)


def test_the_scale_has_a_rate_of_its_own_and_no_decay(folder):
    algorithm, _, _ = scorer_of(folder, "optim.lr=2e-3", "optim.weight_decay=0.1")
    head, scale = algorithm.parameter_groups()
    assert scale["params"] == [algorithm.head.scale.log_scale]
    assert scale["lr"] == pytest.approx(2e-2) and scale["weight_decay"] == 0.0
    assert len(head["params"]) + 1 == len(list(algorithm.head.parameters()))
    assert "lr" not in head
    fixed, _, _ = scorer_of(folder, "scorer.scale.mode=fixed")
    assert len(fixed.parameter_groups()) == 1
    assert not any(p is fixed.head.scale.log_scale for p in fixed.trained_parameters())
