"""Best of n with a model that is a table: what it says of a block is looked up by its tokens."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decoding.best_of import BestOf, _as_if_said, repeats, taken
from decoding.candidates import BeamBayes, BeamExact, SoftmaxSampling
from decoding.chain import Refinement
from decoding.commit import PrefixThreshold, Threshold
from decoding.soft_inputs import Hard
from objectives.refinement import predict

VOCAB, SIZE = 5, 3  # the last token is BLANK
BLANK = VOCAB - 1


class Table:
    """Logits of every place by all tokens of the block that is read: a row per block.

    Embeddings are one-hot, so that a hidden state is the number of the block that was read.
    """

    blank_id = BLANK
    forbidden_V = torch.arange(VOCAB) == BLANK

    def __init__(self, seed: int = 0, scale: float = 2.0) -> None:
        draw = torch.Generator().manual_seed(seed)
        shape = VOCAB**SIZE, SIZE, VOCAB
        self.logits_KSV = scale * torch.randn(shape, generator=draw, dtype=torch.float64)
        self.table_VD = torch.eye(VOCAB, dtype=torch.float64)
        self.looks = []

    def run(self, inputs_YSD, copies=1):
        """Hidden states [Y, S, 2]: the block that is read, and the place in it."""
        assert len(inputs_YSD) % copies == 0
        token_YS = inputs_YSD.argmax(-1)
        assert torch.equal(self.table_VD[token_YS], inputs_YSD), "hard tokens"
        number_Y = number_of(token_YS)
        self.looks.append((copies, token_YS))
        place_S = torch.arange(SIZE, dtype=torch.float64)
        return torch.stack(
            [number_Y[:, None].expand(-1, SIZE), place_S.expand(len(token_YS), -1)], -1
        )

    def logits(self, hidden_PD):
        number_P, place_P = hidden_PD.long().unbind(-1)
        return self.logits_KSV[number_P, place_P]


def number_of(token_YS):
    return (token_YS * VOCAB ** torch.arange(SIZE)).sum(-1).double()


def log_p_of(table, read_S):
    """[S, V] of a block that was read as these tokens."""
    logits = table.logits_KSV[int(number_of(torch.tensor([read_S])))]
    return logits.masked_fill(table.forbidden_V, -torch.inf).log_softmax(-1)


class ByBlock:
    """Scores by the tokens of a candidate; remembers what it was shown."""

    def __init__(self, seed=0):
        draw = torch.Generator().manual_seed(seed)
        self.score_K = torch.randn(VOCAB**SIZE, generator=draw, dtype=torch.float64)
        self.seen = []

    def __call__(self, hidden_XCSD, tokens_XCS, written_XS):
        number_XC = number_of(tokens_XCS)
        # Candidates are read as hard tokens, each at its own place.
        assert torch.equal(hidden_XCSD[..., 0, 0], number_XC)
        self.seen.append((tokens_XCS, written_XS))
        return self.score_K[number_XC.long()]


GREEDY = Refinement(2, PrefixThreshold(1.0), Hard())
TOKEN = torch.tensor([[0, 0, 0], [2, 0, 0]])
GIVEN = torch.tensor([[False, False, False], [True, False, False]])
ROWS = torch.tensor([5, 9])


def refined_by(table, refinement=GREEDY):
    return refinement.refine(table, TOKEN, GIVEN)


def rounds(table, best_of, refinement=GREEDY):
    refined = refined_by(table, refinement)
    return refined, list(best_of.rounds_of(table, refined, ROWS))


@pytest.mark.parametrize(
    "proposal", [BeamBayes(2), BeamExact(), SoftmaxSampling(1.0)], ids=lambda p: p.name
)
def test_later_rounds_hold_what_was_swapped_and_refine_the_rest(proposal):
    table = Table(1)
    refined, found = rounds(table, BestOf(5, proposal, rounds=3))
    assert len(found) == 3
    moved = 0
    for before, after in itertools.pairwise(found):
        first = found[0].tokens_XCS
        for x, c in itertools.product(range(2), range(5)):
            said = log_p_of(table, before.tokens_XCS[x, c].tolist()).argmax(-1)
            swapped = first[x, c] != refined.token_XS[x]
            for s in range(SIZE):
                kept = not swapped.any() or bool(GIVEN[x, s]) or bool(swapped[s])
                wanted = before.tokens_XCS[x, c, s] if kept else said[s]
                assert after.tokens_XCS[x, c, s] == wanted
                moved += int(wanted != before.tokens_XCS[x, c, s])
        assert torch.equal(after.tokens_XCS[:, 0], refined.token_XS)
    assert moved > 5


def test_a_sample_that_is_not_the_greedy_block_is_refined_wherever_it_stands():
    """Training draws no greedy candidate: the first one is a sample like the others."""
    table = Table(1, scale=0.5)
    proposal = SoftmaxSampling(1.0, 16, include_greedy=False)
    refined, found = rounds(table, BestOf(5, proposal, rounds=2))
    first, second = found[0].tokens_XCS[0, 0], found[1].tokens_XCS[0, 0]
    assert not torch.equal(first, refined.token_XS[0])
    said = log_p_of(table, first.tolist()).argmax(-1)
    swapped = first != refined.token_XS[0]
    assert torch.equal(second, torch.where(swapped, first, said))
    assert not torch.equal(second, first)
    for x, c in itertools.product(range(2), range(5)):
        if torch.equal(found[0].tokens_XCS[x, c], refined.token_XS[x]):
            assert torch.equal(found[1].tokens_XCS[x, c], refined.token_XS[x])


def test_repetitions_are_crossed_out_and_stay_so():
    """Behind any tokens this model says the same: candidates come back to what they were not."""
    table = Table(2)
    table.logits_KSV[:] = table.logits_KSV[number_of(torch.tensor([[BLANK] * 3])).long()]
    _, found = rounds(table, BestOf(5, BeamBayes(2), rounds=3))
    for one in found:
        for x in range(2):
            blocks = [tuple(t) for t in one.tokens_XCS[x].tolist()]
            for c in range(5):
                if one.valid_XC[x, c]:
                    assert blocks[c] not in blocks[:c]
                else:
                    assert one.log_q_XC[x, c] == -torch.inf
    assert found[0].valid_XC[0].all()
    for before, after in itertools.pairwise(found):
        for x, c in itertools.product(range(2), range(5)):
            same = [
                bool(before.valid_XC[x, j] and after.tokens_XCS[x, j].equal(after.tokens_XCS[x, c]))
                for j in range(c)
            ]
            assert after.valid_XC[x, c] == (before.valid_XC[x, c] and not any(same))
        gone = (before.valid_XC & ~after.valid_XC).sum(-1)
        assert torch.equal(after.repeated_X, gone) and after.draws == 5


def test_log_q_is_that_of_the_chains_last_distributions():
    for temperature in (1.0, 0.5):
        table = Table(3)
        best_of = BestOf(4, SoftmaxSampling(temperature), rounds=2)
        refined, found = rounds(table, best_of)
        for one in found:
            for x, c in one.valid_XC.nonzero().tolist():
                # The chain read BLANKs, then its own prefix: what its last pass has seen.
                read = int(refined.hidden_XSD[x, 0, 0])
                tokens = [read // VOCAB**s % VOCAB for s in range(SIZE)]
                tempered = (log_p_of(table, tokens) / temperature).log_softmax(-1)
                wanted = sum(
                    float(tempered[s, one.tokens_XCS[x, c, s]])
                    for s in range(SIZE)
                    if not GIVEN[x, s]
                )
                assert one.log_q_XC[x, c].item() == pytest.approx(wanted, abs=1e-5)


def test_log_q_of_all_blocks_sums_to_one():
    table = Table(4)
    best_of, refined = BestOf(4, SoftmaxSampling(0.7)), refined_by(table)
    every = torch.tensor(list(itertools.product(range(VOCAB), repeat=SIZE)))
    log_q = best_of.log_q_of(table, refined, every.expand(2, -1, -1))
    assert log_q[0].exp().sum().item() == pytest.approx(1.0, abs=1e-5)
    given = every[:, 0] == 2
    assert log_q[1, given].exp().sum().item() == pytest.approx(1.0, abs=1e-5)
    assert (log_q[:, (every[:, 1] == BLANK)] == -torch.inf).all()


@pytest.mark.parametrize(("agg", "combine"), [("perround", "mean"), ("lastround", "last")])
def test_the_winner_is_the_largest_l_plus_alpha_s(agg, combine):
    table, scores = Table(5), ByBlock(1)
    best_of = BestOf(5, BeamExact(), agg, rounds=2, alpha=2.0)
    refined, choice = best_of.choose(table, GREEDY, TOKEN, GIVEN, ROWS, scores)
    assert choice.passes == len(choice.rounds) == len(scores.seen) == 2
    assert all(torch.equal(written, ~GIVEN) for _, written in scores.seen)
    value = torch.stack([scores.score_K[number_of(r.tokens_XCS).long()] for r in choice.rounds])
    wanted = value.mean(0) if combine == "mean" else value[-1]
    torch.testing.assert_close(choice.aggregate_XC, wanted)
    last = choice.rounds[-1]
    total = (last.log_q_XC + 2.0 * wanted).masked_fill(~last.valid_XC, -torch.inf)
    assert choice.number_X.tolist() == total.argmax(-1).tolist()
    assert torch.equal(choice.token_XS, taken(last.tokens_XCS, choice.number_X))
    assert choice.number_X.any() and torch.equal(choice.token_XS[1, :1], TOKEN[1, :1])
    assert torch.equal(refined.token_XS, refined_by(table).token_XS)


@pytest.mark.parametrize(
    ("form", "alpha", "weight"),
    [("additive", 0.5, 0.5), ("convex", 0.5, 1.0), ("convex", 0.0, 0.0)],
)
def test_forms(form, alpha, weight):
    table, scores = Table(6), ByBlock(2)
    best_of = BestOf(5, BeamExact(), alpha=alpha, form=form)
    choice = best_of.choose(table, GREEDY, TOKEN, GIVEN, ROWS, scores)[1]
    value = choice.rounds[-1].log_q_XC + weight * choice.aggregate_XC
    assert choice.number_X.tolist() == value.argmax(-1).tolist()
    alone = BestOf(5, BeamExact(), form="scorer_only")
    choice = alone.choose(table, GREEDY, TOKEN, GIVEN, ROWS, scores)[1]
    assert choice.number_X.tolist() == choice.aggregate_XC.argmax(-1).tolist()


def test_gumbel_picks_follow_the_softmax():
    table, scores = Table(7, scale=0.5), ByBlock(3)
    blocks = 4000
    token, rows = torch.zeros(blocks, SIZE, dtype=torch.long), torch.arange(blocks)
    given = torch.zeros(blocks, SIZE, dtype=torch.bool)
    best_of = BestOf(4, BeamExact(), alpha=1.0, pick="gumbel", gumbel_temperature=0.5)
    choice = best_of.choose(table, GREEDY, token, given, rows, scores)[1]
    value = choice.rounds[-1].log_q_XC[0] + choice.aggregate_XC[0]
    wanted = (value / 0.5).softmax(-1)
    found = torch.bincount(choice.number_X, minlength=4) / blocks
    assert ((found - wanted).abs() < 4 * (wanted * (1 - wanted) / blocks).sqrt() + 1e-3).all()


def slow_select_each(table, scores, best_of, token_S, given_S, iterations, row):
    """One block: rank after every pass, go on from the winner read as hard tokens or BLANK."""
    current = [t if g else BLANK for t, g in zip(token_S, given_S, strict=True)]
    shown, number = [], 0
    for step in range(iterations):
        log_p = log_p_of(table, current)
        fixed, token = torch.tensor([given_S]), torch.tensor([current])
        drawn = best_of.propose(log_p[None], fixed, token, torch.tensor([row]), step)
        value = drawn.log_q_MC + best_of.alpha * scores.score_K[number_of(drawn.tokens_MCS).long()]
        number = int(value.masked_fill(~drawn.valid_MC, -torch.inf).argmax())
        won = drawn.tokens_MCS[0, number].tolist()
        shown.append(won)
        sure = [g or log_p[s, won[s]].exp() >= 0.3 for s, g in enumerate(given_S)]
        prefix = [all(sure[: s + 1]) or given_S[s] for s in range(SIZE)]
        if all(prefix):
            break
        current = [won[s] if prefix[s] else BLANK for s in range(SIZE)]
    return shown, number


@settings(max_examples=25)
@given(st.integers(0, 10**6))
def test_select_each_follows_its_winners(seed):
    table, scores = Table(seed), ByBlock(seed + 1)
    refinement = Refinement(3, PrefixThreshold(0.3), Hard())
    best_of = BestOf(4, BeamExact(), "select_each", alpha=1.5)
    refined, choice = best_of.choose(table, refinement, TOKEN, GIVEN, ROWS, scores)
    for x in range(2):
        shown, number = slow_select_each(
            table, scores, best_of, TOKEN[x].tolist(), GIVEN[x].tolist(), 3, int(ROWS[x])
        )
        assert choice.token_XS[x].tolist() == shown[-1] and int(choice.number_X[x]) == number
        assert refined.passes_X[x] == len(shown)
        new = [r for r in choice.rounds if r.new_X is None or bool(r.new_X[x])]
        assert len(new) == len(shown), "a finished block has no further rounds"
        for one, won in zip(new, shown, strict=True):
            assert won in one.tokens_XCS[x].tolist()
        # What it ends with stands in the last round, whenever that was.
        assert torch.equal(choice.rounds[-1].tokens_XCS[x], new[-1].tokens_XCS[x])
        assert torch.equal(choice.aggregate_XC[x], scores.score_K[
            number_of(new[-1].tokens_XCS[x]).long()
        ])  # fmt: skip
    assert choice.passes == len(choice.rounds) == int(refined.passes_X.max())
    counts = [r.valid_XC.sum(-1) * (True if r.new_X is None else r.new_X) for r in choice.rounds]
    assert torch.equal(choice.seen_X, sum(counts))


def test_a_choice_of_an_early_pass_is_a_flip():
    """Whatever the last pass chose: the chain went on from what it would not have said."""
    early = 0
    for seed in range(60):
        refinement = Refinement(3, PrefixThreshold(0.9), Hard())
        best_of = BestOf(4, BeamExact(), "select_each", alpha=1.5)
        _, choice = best_of.choose(Table(seed), refinement, TOKEN, GIVEN, ROWS, ByBlock(seed + 1))
        won = torch.stack(
            [
                best_of.winner(r, score, ROWS, n) > 0
                for n, (r, score) in enumerate(zip(choice.rounds, choice.score_RXC, strict=True))
            ]
        )
        running = torch.stack(
            [torch.ones(2, dtype=torch.bool) if r.new_X is None else r.new_X for r in choice.rounds]
        )
        assert torch.equal(choice.flipped_X, (won & running).any(0))
        early += int((choice.flipped_X & (choice.number_X == 0)).sum())
    assert early > 0


def test_every_pass_draws_anew():
    best_of = BestOf(4, BeamExact(), "select_each", pick="gumbel", gumbel_temperature=50.0)
    _, choice = best_of.choose(
        Table(1), Refinement(2, PrefixThreshold(1.0), Hard()), TOKEN.repeat(50, 1),
        GIVEN.repeat(50, 1), torch.arange(100), ByBlock(1),
    )  # fmt: skip
    picks = [
        best_of.winner(choice.rounds[0], choice.score_RXC[0], torch.arange(100), n)
        for n in range(3)
    ]
    assert not torch.equal(picks[0], picks[1]) and not torch.equal(picks[1], picks[2])
    assert torch.equal(
        picks[0], best_of.winner(choice.rounds[0], choice.score_RXC[0], torch.arange(100))
    )


def test_a_chosen_token_comes_first_in_the_mixture():
    logits = torch.tensor([[[3.0, 2.0, 1.0, 0.0, 9.0]] * 3])
    said = predict(logits, torch.arange(5) == 4, top=2)
    p = logits[0, 0, :4].softmax(-1)
    chosen = torch.tensor([[2, 1, 0]])
    found = _as_if_said(said, chosen, p[chosen])
    assert found.top_token_PT.tolist() == [[[2, 0], [1, 0], [0, 1]]]
    torch.testing.assert_close(found.top_probability_PT, p[found.top_token_PT])
    assert torch.equal(found.token_P, chosen)


@pytest.mark.parametrize("rule", [PrefixThreshold(0.3), Threshold(0.3)], ids=str)
def test_select_each_at_alpha_0_is_the_greedy_chain(rule):
    refinement = Refinement(3, rule, Hard())
    for seed in range(20):
        table = Table(seed)
        best_of = BestOf(4, BeamBayes(1), "select_each", alpha=0.0)
        refined, choice = best_of.choose(table, refinement, TOKEN, GIVEN, ROWS, ByBlock(seed))
        greedy = refined_by(table, refinement)
        assert torch.equal(choice.token_XS, greedy.token_XS) and not choice.number_X.any()
        for found, wanted in zip(refined, greedy, strict=True):
            # What a pass thinks of a given place is not asked.
            open_places = ~GIVEN if found.shape == GIVEN.shape else ...
            torch.testing.assert_close(found[open_places], wanted[open_places])


def test_candidates_share_one_pass_side_by_side():
    table = Table(8)
    rounds(table, BestOf(4, BeamBayes(1), rounds=2))
    copies = [copies for copies, _ in table.looks]
    assert copies == [1, 1, 4, 4]
    assert [len(tokens) for _, tokens in table.looks] == [2, 2, 8, 8]


def test_helpers_by_hand():
    tokens = torch.tensor([[[1, 2], [1, 3], [1, 2], [1, 3], [1, 2]]])
    valid = torch.ones(1, 5, dtype=torch.bool)
    assert repeats(tokens, valid).tolist() == [[False, False, True, True, True]]
    # What has been crossed out takes nobody's place.
    valid[0, 1] = False
    assert repeats(tokens, valid).tolist() == [[False, False, True, False, True]]
    assert taken(tokens, torch.tensor([1])).tolist() == [[1, 3]]
