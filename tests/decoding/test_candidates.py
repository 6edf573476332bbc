"""Candidate blocks: hand numbers, brute force over all blocks, and the law of the samples."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from decoding.candidates import (
    BeamBayes,
    BeamExact,
    Candidates,
    Proposal,
    SoftmaxSampling,
    duplicate_rate,
)

KEY = (7, 1)
PROPOSALS = [SoftmaxSampling(0.7), SoftmaxSampling(1.0, 8, False), BeamBayes(2), BeamExact()]
# Blocks by probability: 00 .30, 01 .24, 10 .15, 11 .12, 02 .06, 20 .05, 21 .04, 12 .03, 22 .01
HAND = torch.tensor([[[0.6, 0.3, 0.1], [0.5, 0.4, 0.1]]], dtype=torch.float64).log()


def propose(proposal, logits, count, *, fixed=None, tokens=None, key=KEY, rows=None) -> Candidates:
    shape = logits.shape[:2]
    fixed = torch.zeros(shape, dtype=torch.bool) if fixed is None else fixed
    tokens = torch.zeros(shape, dtype=torch.long) if tokens is None else tokens
    rows = torch.arange(len(logits)) if rows is None else rows
    return proposal(logits, fixed, tokens, count, key, rows)


def normal(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def every_block(log_p_SV, fixed_S, tokens_S):
    """(log p, block) of all blocks of positive probability, the most probable first."""
    choices = [
        [(0.0, given)] if is_fixed else [(x, v) for v, x in enumerate(row) if x > -math.inf]
        for row, is_fixed, given in zip(
            log_p_SV.tolist(), fixed_S.tolist(), tokens_S.tolist(), strict=True
        )
    ]
    blocks = [
        (sum(x for x, _ in block), tuple(v for _, v in block))
        for block in itertools.product(*choices)
    ]
    return sorted(blocks, reverse=True)


def listed(found, block=0):
    return [
        tuple(row)
        for row, valid in zip(
            found.tokens_MCS[block].tolist(), found.valid_MC[block].tolist(), strict=True
        )
        if valid
    ]


@pytest.mark.parametrize(
    ("proposal", "blocks", "p"),
    [
        (BeamExact(), ["00", "01", "10", "11", "02", "20"], [0.30, 0.24, 0.15, 0.12, 0.06, 0.05]),
        # A swap costs log 2 at the first place and log 1.25 at the second.
        (BeamBayes(0), ["00"], [0.30]),
        (BeamBayes(1), ["00", "01", "10"], [0.30, 0.24, 0.15]),
        (BeamBayes(2), ["00", "01", "10", "11"], [0.30, 0.24, 0.15, 0.12]),
        (BeamBayes(9), ["00", "01", "10", "11"], [0.30, 0.24, 0.15, 0.12]),
    ],
)
def test_beams_on_a_hand_made_posterior(proposal, blocks, p):
    found = propose(proposal, HAND, 6)
    assert listed(found) == [tuple(map(int, block)) for block in blocks]
    assert found.log_q_MC[0, : len(p)].exp().tolist() == pytest.approx(p)
    assert found.log_q_MC[0, len(p) :].tolist() == [-math.inf] * (6 - len(p))
    assert (found.tokens_MCS[0, len(p) :] == found.tokens_MCS[0, 0]).all()
    assert duplicate_rate(found) == 0


@st.composite
def posteriors(draw):
    """Logits [1, S, V] with forbidden tokens, fixed places and their tokens."""
    places, vocabulary = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    logits = normal(draw(st.integers(0, 2**31)), 1, places, vocabulary)
    for place in range(places):
        free = draw(st.integers(0, vocabulary - 1))
        for token in draw(st.sets(st.integers(0, vocabulary - 1))) - {free}:
            logits[0, place, token] = -math.inf
    flags = st.lists(st.booleans(), min_size=places, max_size=places)
    fixed = torch.tensor([draw(flags)])
    tokens = torch.arange(places)[None] + 90
    return logits, fixed, tokens


@given(posteriors(), st.integers(1, 9))
def test_the_exact_beam_is_the_head_of_all_blocks(posterior, count):
    logits, fixed, tokens = posterior
    found = propose(BeamExact(), logits, count, fixed=fixed, tokens=tokens)
    expected = every_block(logits[0].log_softmax(-1), fixed[0], tokens[0])[:count]
    assert listed(found) == [block for _, block in expected]
    log_q = found.log_q_MC[0, : len(expected)].tolist()
    assert log_q == pytest.approx([x for x, _ in expected])


@given(posteriors(), st.integers(1, 9), st.integers(0, 4))
def test_the_beam_of_swaps_equals_a_list_of_subsets(posterior, count, max_swap):
    logits, fixed, tokens = posterior
    log_p = logits[0].log_softmax(-1)
    best = log_p.sort(dim=-1, descending=True)
    swappable = [
        place
        for place in range(len(log_p))
        if not fixed[0, place] and (log_p[place] > -math.inf).sum() > 1
    ]
    expected = []
    for size in range(max_swap + 1):
        for subset in itertools.combinations(swappable, size):
            rank = [int(place in subset) for place in range(len(log_p))]
            value, block = 0.0, []
            for place, r in enumerate(rank):
                given = bool(fixed[0, place])
                value += 0.0 if given else float(best.values[place, r])
                block.append(int(tokens[0, place] if given else best.indices[place, r]))
            expected.append((value, tuple(block)))
    expected = sorted(expected, reverse=True)[:count]
    found = propose(BeamBayes(max_swap), logits, count, fixed=fixed, tokens=tokens)
    assert listed(found) == [block for _, block in expected]
    log_q = found.log_q_MC[0, : len(expected)].tolist()
    assert log_q == pytest.approx([x for x, _ in expected])


@given(posteriors(), st.integers(1, 9), st.sampled_from(PROPOSALS))
def test_what_holds_for_every_proposal(posterior, count, proposal):
    """Allowed tokens only, given ones kept, distinct, valid ones first, and their own log q."""
    logits, fixed, tokens = posterior
    count = min(count, 8)
    found = propose(proposal, logits, count, fixed=fixed, tokens=tokens)
    log_p = (logits[0] / proposal.temperature).log_softmax(-1)
    by_block = {block: x for x, block in every_block(log_p, fixed[0], tokens[0])}
    blocks = listed(found)
    assert len(set(blocks)) == len(blocks) >= 1
    assert found.valid_MC[0].tolist() == [True] * len(blocks) + [False] * (count - len(blocks))
    log_q = found.log_q_MC[0].tolist()
    assert log_q[: len(blocks)] == pytest.approx([by_block[block] for block in blocks])
    assert log_q[len(blocks) :] == [-math.inf] * (count - len(blocks))
    assert found.tokens_MCS.shape == (1, count, logits.shape[1])
    assert found.tokens_MCS.dtype == torch.int64
    assert isinstance(proposal, Proposal)
    if proposal.deterministic or proposal.include_greedy:
        greedy = torch.where(fixed, tokens, logits.argmax(-1))
        assert torch.equal(found.tokens_MCS[:, 0], greedy)
        # With a scorer of weight 0 the greedy block wins.
        assert torch.equal(found.log_q_MC.max(-1).values, found.log_q_MC[:, 0])


def test_how_often_a_beam_of_swaps_is_the_exact_one():
    """200 posteriors of 4 places and 3 tokens: the rest needs a third-best token."""
    logits = torch.distributions.Dirichlet(torch.ones(3, dtype=torch.float64))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        logits = logits.sample((200, 4)).log()
    exact = propose(BeamExact(), logits, 4)
    none, given = torch.zeros(4, dtype=torch.bool), torch.zeros(4, dtype=torch.long)
    log_p = logits.log_softmax(-1)
    for block in range(200):
        best = every_block(log_p[block], none, given)[:4]
        assert listed(exact, block) == [tokens for _, tokens in best]
    equal = [
        int((propose(BeamBayes(swap), logits, 4).tokens_MCS == exact.tokens_MCS)
            .flatten(1).all(-1).sum())
        for swap in (1, 2, 3, 4)
    ]  # fmt: skip
    print(f"equal to the exact top 4 of 200: R=1 {equal[0]}, R=2 {equal[1]}, R=3 {equal[2]}")
    assert 0 < equal[0] < equal[1] < 200
    # Three swaps cost at least as much as none, each alone and two of them.
    assert equal[1] == equal[2] == equal[3]


def chi_square(blocks_MS, q):
    """Statistic of [M, 2] blocks of 3 tokens against probabilities [9]."""
    counts = (blocks_MS[:, 0] * 3 + blocks_MS[:, 1]).bincount(minlength=9).double()
    expected = q * len(blocks_MS)
    return float(((counts - expected) ** 2 / expected).sum())


def test_samples_follow_the_tempered_posterior():
    """The first is a draw of q_T; the second, of what is left: sum_a q(a) q(c) / (1 - q(a))."""
    num, proposal = 6000, SoftmaxSampling(0.6, tries=64, include_greedy=False)
    found = propose(proposal, HAND.expand(num, -1, -1), 2)
    q = (HAND[0] / 0.6).softmax(-1)
    q = (q[0, :, None] * q[1]).flatten()
    second = ((q / (1 - q)).sum() - q / (1 - q)) * q
    assert found.valid_MC.all()
    # 26.1 is passed once in a thousand times with 8 degrees of freedom.
    assert chi_square(found.tokens_MCS[:, 0], q) < 26.1
    assert chi_square(found.tokens_MCS[:, 1], second) < 26.1
    at_one = (HAND[0, 0, :, None] + HAND[0, 1]).flatten().exp()
    assert chi_square(found.tokens_MCS[:, 0], at_one) > 200


def test_the_greedy_block_is_put_before_the_samples():
    logits = HAND.expand(500, -1, -1)
    plain = propose(SoftmaxSampling(1.0, 8, False), logits, 8)
    greedy = propose(SoftmaxSampling(1.0, 8), logits, 8)
    assert (greedy.tokens_MCS[:, 0] == 0).all()
    for block in range(500):
        drawn = [c for c in listed(plain, block) if c != (0, 0)]
        assert listed(greedy, block) == [(0, 0), *drawn]


def test_repeated_draws_are_counted():
    certain = torch.tensor([[[0.0, 99.0]], [[99.0, 0.0]]])
    found = propose(SoftmaxSampling(1.0, 3, False), certain, 3)
    assert found.duplicates_M.tolist() == [2, 2] and found.draws == 3
    assert listed(found, 0) == [(1,)] and listed(found, 1) == [(0,)]
    assert duplicate_rate(found) == pytest.approx(2 / 3)
    with_greedy = propose(SoftmaxSampling(1.0, 3), certain, 3)
    assert with_greedy.duplicates_M.tolist() == [3, 3] and duplicate_rate(with_greedy) == 1


def test_more_tries_leave_the_first_ones_as_they_are():
    logits = normal(0, 20, 3, 50)
    few = propose(SoftmaxSampling(1.0, 4, False), logits, 4)
    many = propose(SoftmaxSampling(1.0, 32, False), logits, 4)
    assert few.valid_MC.all() and torch.equal(few.tokens_MCS, many.tokens_MCS)
    other = propose(SoftmaxSampling(1.0, 4, False), logits, 4, key=(7, 2))
    assert not torch.equal(few.tokens_MCS, other.tokens_MCS)


@pytest.mark.parametrize("proposal", PROPOSALS, ids=lambda p: p.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_has_the_same_candidates_alone_and_in_a_batch(proposal, dtype):
    logits = (2 * normal(3, 9, 5, 1003)).to(dtype)
    fixed = torch.arange(45).view(9, 5) % 4 == 0
    tokens, rows = torch.arange(45).view(9, 5), torch.arange(9) * 11
    whole = propose(proposal, logits, 6, fixed=fixed, tokens=tokens, rows=rows)
    assert whole.log_q_MC.dtype == torch.float32
    for part in ([4], [8, 2], [1, 0, 7, 3]):
        some = propose(
            proposal, logits[part], 6, fixed=fixed[part], tokens=tokens[part], rows=rows[part]
        )
        for mine, theirs in zip(some[:3], whole[:3], strict=True):
            assert torch.equal(mine, theirs[part])


@pytest.mark.parametrize("proposal", PROPOSALS, ids=lambda p: p.name)
def test_a_fixed_place_needs_no_logits_and_a_free_one_does(proposal):
    logits = HAND.repeat(3, 1, 1)
    logits[0, 1], logits[1, 1], logits[2, 1] = math.nan, -math.inf, -math.inf
    fixed = torch.tensor([[False, True], [False, True], [False, False]])
    found = propose(proposal, logits, 3, fixed=fixed, tokens=torch.full((3, 2), 77))
    for block in (0, 1):
        assert set(listed(found, block)) <= {(0, 77), (1, 77), (2, 77)}
    assert found.valid_MC[:2, 0].all() and not found.valid_MC[2].any()
    assert (found.log_q_MC[2] == -math.inf).all()


@pytest.mark.parametrize(
    "logits",
    [
        torch.zeros(1, 2, 70),
        # log p rounds these to one value, of which the first would be taken.
        torch.zeros(1, 2, 5000).index_fill_(-1, torch.tensor([4321]), 1e-8),
        (4 * normal(1, 50, 4, 3000)).to(torch.bfloat16).round(),
    ],
    ids=["equal", "nearly equal", "ties"],
)
@pytest.mark.parametrize("proposal", [SoftmaxSampling(0.7), BeamBayes(2), BeamExact()])
def test_the_first_candidate_is_the_argmax_even_of_ties(proposal, logits):
    found = propose(proposal, logits, 4)
    assert torch.equal(found.tokens_MCS[:, 0], logits.argmax(-1))
    assert found.valid_MC[:, 0].all()


def test_no_gradient_flows_into_the_proposal():
    logits = HAND.clone().requires_grad_()
    for proposal in PROPOSALS:
        assert not propose(proposal, logits, 3).log_q_MC.requires_grad


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SoftmaxSampling(0.0), r"bon\.proposal\.temperature=0\.0: allowed \(0, inf\)"),
        (lambda: SoftmaxSampling(math.inf), r"bon\.proposal\.temperature=inf"),
        (lambda: SoftmaxSampling(1.0, 0), r"bon\.proposal\.tries=0: allowed an integer >= 1"),
        (lambda: BeamBayes(-1), r"bon\.proposal\.max_swap=-1: allowed an integer >= 0"),
        (lambda: propose(BeamExact(), HAND, 0), r"bon\.count=0: allowed an integer >= 1"),
        (
            lambda: propose(SoftmaxSampling(1.0, 2), HAND, 4),
            r"bon\.proposal\.tries=2: allowed at least 3 for bon\.count=4",
        ),
        (
            lambda: propose(BeamBayes(9), normal(0, 1, 32, 3), 4),
            r"bon\.proposal\.max_swap=9: allowed at most 16384 subsets of a block's 32 places",
        ),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
